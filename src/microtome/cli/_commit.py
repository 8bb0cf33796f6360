"""`microtome commit`: the fingerprint of an inference, its verification, and what it tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microtome.cli._examples import shown
from microtome.cli._model import LOADING, Json, Opening, opens, out, print_json, progress, working
from microtome.cli._options import Seed
from microtome.cli._results import Force, check_output, values
from microtome.errors import ArgumentError, ProofError, error
from microtome.files import whole_file

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from microtome.measurements import Commitment
    from microtome.model import Model

ENDING = ".commit"
EVERY, TOP = 32, 128


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("commit", epilog=shown('microtome commit "The capital of France is" -o run.commit'))(commit)


@opens()
def commit(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt, as text or as a JSON list of chat messages.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"File to write: one ending in {ENDING}.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="File of a commitment: run its tokens again and compare; needs no prompt.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another prompt, as long or longer: show what a commitment to the first one tells apart."),
    ] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Tokens of a chunk.", show_default=str(EVERY))] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Largest entries to keep of each chunk.", show_default=str(TOP))
    ] = None,
    without_massive: Annotated[
        bool, typer.Option("--without-massive", help="Leave the massive dimensions out: they are the same in any run.")
    ] = False,
    force: Force = False,
    seed: Seed = 0,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Commit to a run by its largest last hidden states, so that another machine can verify model and prompt.

    Exit code 4 if a commitment does not hold.
    """
    flags = {"--without-massive": without_massive, "--force": force, "--every": every, "--top": top}
    _refuse(prompt, output, verify, against, [name for name, value in flags.items() if value])
    every, top = every or EVERY, top or TOP
    opening.check()
    with working(LOADING):
        from microtome.context import settings
    with settings(seed=seed):
        if verify is not None:
            _verified(verify, prompt, opening, as_json)
        elif against is not None:
            _told_apart(_read(prompt), _read(against), every, top, opening, as_json)
        else:
            _committed(_read(prompt), output, every, top, opening, as_json, without_massive=without_massive)


def _refuse(
    prompt: str | None, output: Path | None, verify: Path | None, against: str | None, others: Sequence[str]
) -> None:
    """Refuse what no model could do.

    Raises:
        ArgumentError: there is nothing to do, two things at once, or an option that does nothing.
    """
    named = {"-o": output, "--verify": verify, "--against": against}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        what = f"{' and '.join(given)} exclude one another"
        raise error(ArgumentError, what, do="write a commitment, verify one, or show what it tells apart")
    if verify is not None:
        if others:
            what = "--verify reads what was committed to, and how, from its file, and writes nothing"
            raise error(ArgumentError, what, got=", ".join(others), do="leave them out")
        whole_file(verify)
        return
    if prompt is None:
        raise error(ArgumentError, "there is no prompt", do="give one, or --verify FILE")
    if against is not None:
        if {"--without-massive", "--force"} & set(others):
            what = "--against shows a table, with and without the massive dimensions, and writes nothing"
            raise error(ArgumentError, what, do="leave --without-massive and --force out")
        return
    check_output(output, "--force" in others, (ENDING,), required="name one with -o, or show a table with --against")


def _read(prompt: str | None) -> Any:
    from microtome.run import prompt_from_text

    return prompt_from_text(prompt or "")


def _committed(
    prompt: Any, output: Path | None, every: int, top: int, opening: Opening, as_json: bool, *, without_massive: bool
) -> None:
    """Write a commitment, and say how large it is."""
    from microtome.measurements import commit as committed
    from microtome.measurements import massive_dimensions

    assert output is not None
    opened = opening.open()
    with working("running the prompt"):
        run = opened.run(prompt, capture="final", logits=False)
        made = committed(run, every=every, top=top, without=massive_dimensions(run) if without_massive else ())
        made.save(output)
    rows, chunks, entries = made.index.shape
    facts = {
        "file": str(output), "tokens": made.tokens.numel(), "chunks": rows * chunks, "entries": entries,
        "bytes": made.bytes, "left_out": list(made.without), "fingerprint": made.fingerprint,
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    size = f"{facts['tokens']:,} tokens in {facts['chunks']:,} chunks of {entries} entries, {made.bytes:,} bytes"
    out.print(f"{size}; model {made.fingerprint}", markup=False, soft_wrap=True)
    if made.without:
        out.print(f"left out: dimensions {', '.join(map(str, made.without))}", markup=False, soft_wrap=True)
    out.print(f"written to {output}: microtome commit --verify {output}", markup=False, soft_wrap=True)


def _verified(file: Path, prompt: str | None, opening: Opening, as_json: bool) -> None:
    """Run the tokens of a commitment and compare; ends with the code of a proof that fails where they differ."""
    from microtome.measurements import Commitment, verify_commit

    held = Commitment.load(file)
    opened = opening.open()
    if prompt is not None:
        _same_tokens(held, opened, opened.to_batch(_read(prompt)).tokens)
    with working("running its tokens"):
        run = opened.run(held.tokens, capture="final", logits=False)
        verdict = verify_commit(held, run)
    same = bool(held.fingerprint) and held.fingerprint == run.provenance.get("fingerprint")
    if as_json:
        told = {name: x["values"] for name, x in values(verdict.chunks)["variables"].items()}
        print_json({"file": str(file), "passes": verdict.passes, "same_weights": same, "chunks": told})
    else:
        _draw(held, verdict.chunks)
        weights = "are those of this model" if same else "are not those of this model, by their fingerprint"
        out.print(f"the weights that were committed to {weights}", markup=False, soft_wrap=True)
        told = "passes: it can be the one" if verdict.passes else "fails: it is not the one"
        out.print(f"the run {told} that was committed to", markup=False)
    if not verdict.passes:
        raise typer.Exit(ProofError.exit_code)


def _same_tokens(held: Commitment, model: Model, tokens: Tensor) -> None:
    """Refuse a prompt that is not the one that was committed to.

    Raises:
        ArgumentError: it has other tokens.
    """
    mine, other = held.tokens.flatten().tolist(), tokens.flatten().tolist()
    if mine != other:
        what = "the prompt is not the one that was committed to"
        got = f"{len(other)} tokens, {len(mine)} committed to"
        if len(mine) == len(other):
            at = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
            told = [
                f"{x} {word!r}"
                for x, word in zip((other[at], mine[at]), model.to_words([other[at], mine[at]]), strict=True)
            ]
            got = f"token {at} is {told[0]}, {told[1]} committed to"
        raise error(ArgumentError, what, got=got, do="leave it out: a commitment holds its tokens")


def _draw(held: Commitment, chunks: xr.Dataset) -> None:
    """How near each chunk came."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("row", "tokens", "overlap", "exponent", "mean error", "median error"):
        table.add_column(name, justify="right")
    table.add_column("chunk")
    length = held.tokens.shape[1]
    for row in range(chunks.sizes["row"]):
        for at in range(chunks.sizes["chunk"]):
            one = chunks.isel(row=row, chunk=at)
            numbers = (f"{float(one[name]):.3f}" for name in ("overlap", "exponent", "mean", "median"))
            place = f"{at * held.every}-{min(length, (at + 1) * held.every) - 1}"
            table.add_row(str(row), place, *numbers, "passes" if bool(one["passes"]) else "fails")
    out.print(table)


def _told_apart(prompt: Any, other: Any, every: int, top: int, opening: Opening, as_json: bool) -> None:
    """The table of what a commitment to a prompt tells apart."""
    from rich.table import Table

    from microtome.context import settings
    from microtome.measurements import commit_separation

    opened = opening.open()
    with progress() as report, settings(progress=report):
        import torch

        data = commit_separation(opened, prompt, other, every=every, top=top, dtype=torch.bfloat16)
    if as_json:
        print_json(values(data))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("changed", "dimensions"):
        table.add_column(name)
    for name in ("overlap", "exponent", "mean error", "median error"):
        table.add_column(name, justify="right")
    table.add_column("run")
    for change in data["change"].values:
        for way in data["dimensions"].values:
            one = data.sel(change=change, dimensions=way)
            numbers = (f"{float(one[name]):.3f}" for name in ("overlap", "exponent", "mean", "median"))
            table.add_row(str(change), str(way), *numbers, "passes" if bool(one["passes"]) else "fails")
    out.print(table)
    left = data["left_out"].values.tolist()[-1]
    said = "same: nothing; batch: beside another prompt; dtype: weights in bfloat16; weight: one matrix by a tenth"
    out.print(f"{said}; prompt: another one. {left} massive dimensions", markup=False, soft_wrap=True)
