"""`microtome compare`: what differs between two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from microtome.cli._examples import shown
from microtome.cli._model import LOADING, Json, out, print_json, progress, working
from microtome.cli._options import Budget, Seed, Text
from microtome.cli._results import Force, Page, check_output
from microtome.errors import ArgumentError, error
from microtome.files import text_file


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("compare", epilog=shown("microtome compare path/to/base path/to/tuned -o compared.html"))(compare)


def compare(
    context: typer.Context,
    a: Annotated[str, typer.Argument(help="A model: a folder, a GGUF file, or an id of the hub; or an atlas.")],
    b: Annotated[str, typer.Argument(help="Another one of the same shape.")],
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of it to read.")] = 5_000,
    measures: Annotated[
        str | None,
        typer.Option(help="Measures with commas between them; by default those of the stream, heads and neurons."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the units that moved most to name.")] = 5,
    output: Page = None,
    force: Force = False,
    seed: Seed = 0,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Compare two models of one shape: what moved, by layer, head and neuron, with intervals.

    Two folders of atlases are compared by what stands in their tables.
    """
    from microtome.context import settings
    from microtome.method import sketch

    names = [name.strip() for name in (measures or "").split(",") if name.strip()]
    for name in names:
        if (found := sketch(name).method).kind != "measure":
            what = f'"{found.name}" is a {found.kind}, not a measure'
            raise error(ArgumentError, what, do="name those that `microtome measure` lists")
    check_output(output, force, (".html",))
    if all((Path(one) / "manifest.json").is_file() for one in (a, b)):
        _atlases(a, b, top, given=_given(context), as_json=as_json)
        return
    if text is not None:
        text_file(text)
    with working(LOADING):
        from microtome.method import compare as compared
        from microtome.method import moved_most
        from microtome.model import open as open_model
        from microtome.view import write_page
    with settings(seed=seed, budget=budget):
        first, second = open_model(a), open_model(b)
    with progress() as report, settings(seed=seed, budget=budget, progress=report):
        data = compared(first, second, *names, text=text, tokens=tokens)
    rows = list(moved_most(data, top))
    if output is not None:
        write_page(output, data)
    if as_json:
        print_json({"a": a, "b": b, "fingerprints": [first.fingerprint, second.fingerprint], "columns": rows})
        return
    _tell(rows, data)


OF_MODELS = {
    "text": "--text", "tokens": "--tokens", "measures": "--measures", "output": "-o", "force": "--force",
    "seed": "--seed", "budget": "--budget",
}  # fmt: skip
"""Options of what is measured on two models."""


def _given(context: typer.Context) -> list[str]:
    """The options of two models that the command line names, whatever their values."""
    sources = {option: context.get_parameter_source(name) for name, option in OF_MODELS.items()}
    return [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _atlases(a: str, b: str, top: int, *, given: list[str], as_json: bool) -> None:
    """Compare two atlases, and say what differs."""
    if given:
        named, verb = " and ".join(given), "is" if len(given) == 1 else "are"
        what = f"{named} {verb} for two models, and these are two atlases, whose tables are compared as they are"
        raise error(ArgumentError, what, do=f"leave {named} out")
    with working("reading the atlases"):
        from microtome.atlas import compare as compared
        from microtome.view import frame_table

        found = compared(a, b, top=top)
    if as_json:
        rows: list[dict[str, Any]] = json.loads(str(found.to_json(orient="records")))
        print_json({"a": a, "b": b, "columns": rows})
        return
    moved: Any = found[found["largest"] != 0]
    out.print(frame_table(moved.assign(where=moved["where"].map(" ".join)), len(found)))
    if still := found[found["largest"] == 0]["column"].tolist():
        out.print(f"no change: {', '.join(still)}", soft_wrap=True)
    out.print("apart: the 95 % intervals of both do not overlap")


def _tell(rows: list[dict[str, Any]], data: Any) -> None:
    """The columns that moved, most first in the order of the measures, and how many did not."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, right in (("column", False), ("unit", False), ("moved for certain", True), ("largest change", True)):
        table.add_column(name, justify="right" if right else "left")
    table.add_column("where")
    moved = [row for row in rows if row["largest"]]
    for row in moved:
        certain = "" if row["certain"] is None else f"{row['certain']:,} of {row['units']:,}"
        table.add_row(row["column"], row["unit"], certain, f"{row['largest']:+.4g}", " ".join(row["where"]))
    if moved:
        out.print(table)
    if still := [row["column"] for row in rows if not row["largest"]]:
        out.print(f"no change: {', '.join(still)}", soft_wrap=True)
    if any(row["certain"] is not None for row in rows):
        out.print("for certain: the 95 % interval of the change leaves out 0; by chance one unit in twenty does so")
    elif "interval" in data.attrs:
        out.print("no intervals: the text has too few rows, read more of it with --tokens")
