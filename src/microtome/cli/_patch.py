"""`microtome patch`: which parts carry what makes two prompts answered differently."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microtome.cli._model import Budget, Json, Opening, notes, opens, out, print_json, progress
from microtome.errors import OutputError, error

if TYPE_CHECKING:
    import xarray as xr

    from microtome.sweep import SweepPlan

Page = Annotated[Path | None, typer.Option("--output", "-o", help="Page to write as well: a file ending in .html.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing page.")]
Top = Annotated[int, typer.Option(min=0, help="How many of the strongest cells of each map to list.")]


class Direction(StrEnum):
    """Which prompt runs, and which one is taken from."""

    denoise = "denoise"
    noise = "noise"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("patch")(patch)


@opens()
def patch(
    clean: Annotated[str, typer.Argument(help="The prompt with the answer.")],
    corrupt: Annotated[str, typer.Argument(help="The same prompt with another answer, token for token.")],
    answer: Annotated[str, typer.Option(help='The clean answer, one token, such as " Paris".')],
    foil: Annotated[
        str | None, typer.Option(help="The corrupt answer; without it the answer's log-probability is read.")
    ] = None,
    direction: Annotated[
        Direction, typer.Option(help="denoise puts clean values into the corrupt run, noise the reverse.")
    ] = Direction.denoise,
    site: Annotated[
        list[str] | None,
        typer.Option(help='Site to patch by layer and position, or by head with "\\[head]" behind; repeatable.'),
    ] = None,
    output: Page = None,
    force: Force = False,
    top: Top = 5,
    budget: Budget = None,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Patch every layer, position and head between two prompts, exactly: heat maps here, and as a page with -o."""
    from microtome.explain import activation_patching

    check_page(output, force)
    opened = opening.open()
    sites: dict[str, Any] = {"sites": tuple(site)} if site else {}
    with swept("patching") as said:
        data = activation_patching(
            opened, clean, corrupt, answer=answer, foil=foil, direction=direction.value,
            budget=budget, progress=said.progress, on_plan=said.on_plan, **sites,
        )  # fmt: skip
    show(data.assign_attrs(said.cost), output, top=top, as_json=as_json)


@dataclass
class Said:
    """What a sweep says while it runs: its plan first, then how far it is."""

    on_plan: Callable[[SweepPlan], None]
    progress: Callable[[int, int], None]
    cost: dict[str, Any]


@contextmanager
def swept(what: str) -> Iterator[Said]:
    """Say the plan of a sweep on stderr and draw its progress.

    Raises:
        KeyboardInterrupt: it was stopped before its last cell. A sweep then keeps what it has, but half a map is none.
    """
    started, reached = time.perf_counter(), [0, 0]
    cost: dict[str, Any] = {}
    with progress() as report:

        def on_plan(plan: SweepPlan) -> None:
            cost["plan"] = str(plan)
            reached[1] = plan.cells
            notes.print(f"plan: {plan}", markup=False, soft_wrap=True)

        def told(done: int, everything: int) -> None:
            reached[:] = [done, everything]
            report(what, done, everything)

        yield Said(on_plan, told, cost)
    if reached[0] < reached[1]:
        raise KeyboardInterrupt
    cost["seconds"] = round(time.perf_counter() - started, 2)


def check_page(output: Path | None, force: bool) -> None:
    """Refuse a page that could not be written, before anything is measured."""
    if output is None:
        return
    if output.suffix != ".html":
        got = output.suffix or "no ending"
        raise error(OutputError, f"cannot write {output.name}", got=got, allowed=".html", do="choose this ending")
    if output.is_dir() or (output.exists() and not force):
        raise error(OutputError, f"{output} exists", do="name another file, or pass --force to replace a file")
    if not output.parent.is_dir():
        raise error(OutputError, f"no folder {output.parent}", do="make it first")


def show(data: xr.Dataset, output: Path | None, *, top: int, as_json: bool) -> None:
    """Write the page if one was asked for, then say the maps to a person, or all values to a script."""
    from microtome.view import terminal, write_page

    if output is not None:
        write_page(output, data)
    if as_json:
        print_json(_values(data) | ({} if output is None else {"page": str(output)}))
        return
    out.print(terminal(data, out.width, top=top))
    if output is not None:
        out.print(f"page written to {output}", markup=False, soft_wrap=True)


def _values(data: xr.Dataset) -> dict[str, Any]:
    from microtome.view import HeatMap, LabelTable, forms, tokens_of

    found = forms(data)
    maps = [one.name for one in found.of(HeatMap) if one.listed]
    scalars = {str(n): v.item() for n, v in data.data_vars.items() if v.ndim == 0}
    held = {
        name: {
            "dims": list(data[name].dims),
            "unit": data[name].attrs.get("unit"),
            "values": data[name].values.tolist(),
            **{end: data[f"{name}_{end}"].values.tolist() for end in ("lo", "hi", "exact") if f"{name}_{end}" in data},
        }
        for name in maps
    }
    checks = {
        row: {column.name: float(column.values[i]) for column in table.columns}
        for table in found.of(LabelTable)
        if table.axis == "site"
        for i, row in enumerate(table.rows)
    }
    told = scalars | {"tokens": tokens_of(data), "maps": held} | ({"checks": checks} if checks else {})
    return told | {"provenance": data.attrs}
