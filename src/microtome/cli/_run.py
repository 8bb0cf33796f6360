"""`microtome run`: capture sites of one prompt into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from microtome.cli._examples import shown
from microtome.cli._model import LOADING, Json, Opening, opens, out, print_json, working
from microtome.cli._options import Budget
from microtome.cli._results import Force, check_output
from microtome.context import bytes_of
from microtome.errors import OutputError, error
from microtome.files import atomic, whole_file

if TYPE_CHECKING:
    from microtome.model import Model
    from microtome.run import Plan, Run

ENDINGS = (".safetensors", ".zarr")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("run", epilog=shown('microtome run "The capital of France is" -c "*.mlp.post" -o run.safetensors'))(run)


@opens()
def run(
    prompt: Annotated[str, typer.Argument(help="The prompt, as text or as a JSON list of chat messages.")],
    capture: Annotated[
        list[str], typer.Option("--capture", "-c", help='Address to keep, such as "*.mlp.post"; repeatable.')
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write: .safetensors or .zarr.")] = None,
    edits: Annotated[Path | None, typer.Option(help="File of edits to run under, from `save_edits`.")] = None,
    force: Force = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would keep and take, and do not run.")] = False,
    budget: Budget = None,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Run a prompt, keep what you name, and write it to a file with its axes and provenance."""
    from microtome.anatomy import parse

    for address in capture:
        parse(address)
    if edits is not None:
        whole_file(edits)
    limit = None if budget is None else bytes_of(budget)
    if plan:
        _show_plan(opening.open().plan(_read(prompt), capture), as_json)
        return
    file = _checked(output, force)
    opening.check()
    with working(LOADING):
        from microtome.edit import load_edits

        changes = [] if edits is None else load_edits(edits)
    opened = opening.open()
    with working("running the prompt"):
        result = opened.run(_read(prompt), capture=capture, edits=changes, budget=limit)
        _write(result, file)
    _show(result, _next(opened, result), file, as_json)


def _read(prompt: str) -> Any:
    from microtome.run import prompt_from_text

    return prompt_from_text(prompt)


def _show_plan(on_plan: Plan, as_json: bool) -> None:
    if not as_json:
        out.print(str(on_plan), markup=False)
        return
    kept = {"bytes": on_plan.bytes_by_address, "logits_bytes": on_plan.logits_bytes}
    print_json(kept | {"flops": on_plan.flops, "seconds": on_plan.seconds})


def _next(model: Model, result: Run) -> list[tuple[str, float]]:
    """The five likeliest next tokens; none where a model has no next token."""
    if not model.anatomy.causal:
        return []
    best = result.logits[0, -1].float().softmax(-1).topk(min(5, model.anatomy.d_vocab))
    return list(zip(model.to_words(best.indices), best.values.tolist(), strict=True))


def _show(result: Run, following: list[tuple[str, float]], file: Path, as_json: bool) -> None:
    kept: list[dict[str, Any]] = [
        {"address": str(a), "axes": list(result.dims(a)), "shape": list(x.shape), "bytes": x.nbytes}
        for a, x in result.captured.items()
    ]
    if as_json:
        words = [{"word": word, "probability": p} for word, p in following]
        print_json({"file": str(file), "next": words, "captured": kept})
        return
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in kept:
        layer, _, rest = row["address"].partition(".")
        name = f"*.{rest}" if layer.isdigit() else row["address"]
        shape = " x ".join(map(str, row["shape"]))
        groups.setdefault((name, " ".join(row["axes"]), shape), []).append(row)
    table = Table("site", "axes", "shape", "sites", "KiB", box=None, pad_edge=False)
    for (name, axes, shape), rows in groups.items():
        size = sum(row["bytes"] for row in rows) / 1024
        table.add_row(name if len(rows) > 1 else rows[0]["address"], axes, shape, str(len(rows)), f"{size:,.1f}")
    for column in table.columns[3:]:
        column.justify = "right"
    out.print(table, markup=False)
    if following:
        out.print("next: " + ", ".join(f"{word!r} {p:.3f}" for word, p in following), markup=False)
    out.print(f"written to {file}", markup=False, soft_wrap=True)


def _checked(output: Path | None, force: bool) -> Path:
    check_output(output, force, ENDINGS, required="name one with -o, or pass --plan")
    assert output is not None
    if output.suffix == ".zarr":
        from importlib.util import find_spec

        if find_spec("zarr") is None:
            do = "pip install zarr, or write .safetensors"
            raise error(OutputError, "writing .zarr needs the package zarr", do=do)
    return output


def _write(result: Run, output: Path) -> None:
    if output.suffix != ".zarr":
        result.save(output, logits=False)
        return
    with atomic(output.resolve()) as partial:
        result.dataset().to_zarr(partial, mode="w")
