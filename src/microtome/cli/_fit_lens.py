"""`microtome fit-lens`: a lens fitted to a model, to a file that `microtome lens --lens` reads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from microtome.cli._examples import shown
from microtome.cli._model import LOADING, Json, ModelArgument, Opening, opens, out, print_json, progress, working
from microtome.cli._options import Field, Seed, Text
from microtome.cli._results import Force, check_output
from microtome.cli._texts import check_columns, tables_of
from microtome.errors import ArgumentError, error
from microtome.files import text_place

if TYPE_CHECKING:
    from microtome.explain import Lens

STATE = ".state"
"""Ending of the checkpoint beside the file of a lens that is being fitted."""


class Fitted(StrEnum):
    """What can be fitted."""

    tuned = "tuned"
    bias = "bias"
    heads = "heads"


class Moved(StrEnum):
    """How it can be fitted."""

    sgd = "sgd"
    adamw = "adamw"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("fit-lens", epilog=shown("microtome fit-lens --text wiki.txt -o lens.safetensors"))(fit_lens)


@opens(ModelArgument)
def fit_lens(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, ending in .safetensors.")],
    text: Text = None,
    field: Field = "text",
    kind: Annotated[
        Fitted, typer.Option(help="A matrix and a bias for each layer, a bias alone, or a low rank for each head.")
    ] = Fitted.tuned,
    ahead: Annotated[int, typer.Option(min=1, help="Which token it predicts: 1 the next one, 2 the one after.")] = 1,
    layers: Annotated[
        str | None, typer.Option(help='Layers, such as "0-5"; -1 is the embedding. By default all.')
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the matrix of a head.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to fit on.")] = 200_000,
    share: Annotated[
        float, typer.Option(help="Share of the tokens of a batch at which each layer's loss is taken, above 0 to 1.")
    ] = 1.0,
    held_out: Annotated[int, typer.Option(min=1, help="Tokens behind those, on which it is measured.")] = 8_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    optimizer: Annotated[Moved, typer.Option(help="SGD with Nesterov momentum, or AdamW.")] = Moved.sgd,
    scale: Annotated[float, typer.Option(help="Factor of the learning rate.")] = 1.0,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Fit a lens to a model. Stopped and run again, it goes on where its state beside the file stands."""
    check_output(output, force, (".safetensors",), required="name one with -o")
    if not 0 < share <= 1:
        raise error(ArgumentError, "share of a lens", got=share, allowed="above 0 to 1", do="choose another value")
    check_columns(text, field, None)
    if text is not None:
        text_place(text)
    chosen = None if layers is None else _layers(layers)
    opening.check()
    with working(LOADING):
        from microtome.context import settings
        from microtome.explain import fit_lens as fit
    opened, state = opening.open(), output.with_name(output.name + STATE)
    with progress() as report, settings(progress=report, seed=seed):
        lens = fit(
            opened, tables_of(text, field, None), tokens=tokens, kind=kind.value, ahead=ahead, layers=chosen, rank=rank,
            share=share, optimizer=optimizer.value, scale=scale, held_out=held_out, length=length, rows=rows,
            checkpoint=state,
        )  # fmt: skip
    lens.save(output)
    state.unlink(missing_ok=True)
    if as_json:
        print_json({"file": str(output), **_facts(lens)})
        return
    out.print(_table(lens))
    out.print(f"written to {output}; read it with: microtome lens PROMPT --kind {_its(lens)} --lens {output}",
              markup=False, soft_wrap=True)  # fmt: skip


def _layers(text: str) -> list[int]:
    """The layers that an option names, -1 among them."""
    from microtome.anatomy import parse_indices

    return [i for low, high in parse_indices(text, "layers").ranges or () for i in range(low, high + 1)]


def _its(lens: Lens) -> str:
    """The kind by which the lens command calls it."""
    return "heads" if lens.kind == "heads" else "ahead" if lens.ahead > 1 else "tuned"


def _facts(lens: Lens) -> dict[str, object]:
    values = {str(name): x.values.tolist() for name, x in lens.kl.data_vars.items()}
    kept = {name: lens.attrs.get(name) for name in ("model", "text", "tokens", "steps", "share")}
    return {"kind": lens.kind, "ahead": lens.ahead, "layers": list(lens.layers), **kept, "kl": values}


def _table(lens: Lens) -> Table:
    """Divergence in nats by layer on held-out text; of heads, its mean over them."""
    table = Table(title="divergence from the model's output on held-out text, nats")
    for head in ("layer", "logit lens", "this lens", "gain"):
        table.add_column(head, justify="right")
    for layer in lens.layers:
        row = lens.kl.sel(layer=layer).mean()
        name = "embed" if layer == -1 and lens.kind != "heads" else str(layer)
        table.add_row(name, *(f"{float(row[column]):.3f}" for column in ("kl_logit_lens", "kl", "gain")))
    return table
