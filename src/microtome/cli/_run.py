"""`microtome run`: capture sites of one prompt into a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from microtome.cli._model import Device, Dtype, Json, ModelOption, Opening, Revision, Trust, out, print_json
from microtome.errors import OutputError, error

if TYPE_CHECKING:
    from microtome.run import Run

ENDINGS = (".safetensors", ".zarr")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("run")(run)


def run(
    prompt: Annotated[str, typer.Argument(help="The prompt, as text.")],
    capture: Annotated[
        list[str], typer.Option("--capture", "-c", help='Address to keep, such as "*.mlp.post"; repeatable.')
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write: .safetensors or .zarr.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would keep and take, and do not run.")] = False,
    budget: Annotated[
        int | None, typer.Option(help="Bytes that may be kept; 80 % of the free memory without it.")
    ] = None,
    as_json: Json = False,
    model: ModelOption = None,
    device: Device = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust: Trust = False,
) -> None:
    """Run a prompt, keep what is named, and write it to a file with its axes and provenance."""
    if not plan:
        _check_output(output, force)
    opened = Opening(model, device, dtype, revision, trust).open()
    if plan:
        planned = opened.plan(prompt, capture)
        if as_json:
            print_json(
                {
                    "bytes": planned.bytes_by_address,
                    "logits_bytes": planned.logits_bytes,
                    "flops": planned.flops,
                    "seconds": planned.seconds,
                }
            )
        else:
            out.print(str(planned), markup=False)
        return
    result = opened.run(prompt, capture=capture, budget=budget)
    assert output is not None
    _write(result, output)
    best = result.logits[0, -1].float().softmax(-1).topk(5)
    answers = dict(zip(opened.to_words(best.indices), [round(p, 4) for p in best.values.tolist()], strict=True))
    kept = [(str(a), list(result.dims(a)), list(x.shape), x.nbytes) for a, x in result.captured.items()]
    if as_json:
        rows = [{"address": a, "axes": d, "shape": s, "bytes": b} for a, d, s, b in kept]
        print_json({"file": str(output), "next": answers, "captured": rows})
        return
    table = Table("site", "axes", "shape", "KiB", box=None, pad_edge=False)
    for address, dims, shape, size in kept[:20]:
        table.add_row(address, " ".join(dims), " x ".join(map(str, shape)), f"{size / 1024:,.1f}")
    out.print(table)
    if len(kept) > 20:
        out.print(f"and {len(kept) - 20} more")
    out.print("next: " + ", ".join(f"{word!r} {p:.3f}" for word, p in answers.items()), markup=False)
    out.print(f"written to {output}", markup=False)


def _check_output(output: Path | None, force: bool) -> None:
    if output is None:
        raise error(OutputError, "no file to write to", do="name one with -o, or pass --plan")
    if output.suffix not in ENDINGS:
        raise error(
            OutputError,
            f"cannot write {output.name}",
            got=output.suffix or "no ending",
            allowed=" or ".join(ENDINGS),
            do="choose one of these endings",
        )
    if output.exists() and not force:
        raise error(OutputError, f"{output} exists", do="name another file, or pass --force")
    if not output.parent.is_dir():
        raise error(OutputError, f"no folder {output.parent}", do="make it first")


def _write(result: Run, output: Path) -> None:
    import shutil

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = output.with_name(f".{output.name}.part")
    try:
        if output.suffix == ".zarr":
            _write_zarr(result, partial)
            shutil.rmtree(output, ignore_errors=True)
        else:
            tensors = {str(a): x.detach().cpu().contiguous() for a, x in result.captured.items()} | {
                "tokens": result.tokens
            }
            axes = {str(a): list(result.dims(a)) for a in result.captured}
            notes = {k: json.dumps(v) for k, v in (result.provenance | {"axes": axes, "words": result.words}).items()}
            save_file(tensors, partial, metadata=notes)
        partial.replace(output)
    except (OSError, SafetensorError) as problem:
        raise error(
            OutputError, f"cannot write {output}", got=str(problem), do="check the folder and its space"
        ) from problem
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _write_zarr(result: Run, folder: Path) -> None:
    from importlib.util import find_spec

    if find_spec("zarr") is None:
        raise error(OutputError, "writing .zarr needs the package zarr", do="pip install zarr, or write .safetensors")
    result.dataset().to_zarr(folder, mode="w")
