"""Heat maps: a variable over (layer, pos), (layer, head), (group, group), (node, node), or another two axes.

Layers stand from left to right, whatever else there is from top to bottom; without layers, the first axis is the rows.
Maps of one unit share one scale, symmetric about zero, so that colours can be compared between them. What was not
measured is NaN and stays missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from microtome.shown import shown
from microtome.view import _svg
from microtome.view._dataset import axis_kind, beside, companions, labels, numbers, title, unit
from microtome.view._heat_cells import drawn, joined, strongest_rows
from microtome.view._page_values import rounded, rounded_rows
from microtome.view._text import coloured, interval, printable, shortened, signed, unsigned, visible

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

MOST_CELLS, MOST_TERMINAL_CELLS = 40_000, 4096
"""Cells of a map that a page draws, and a terminal; of a larger one only the strongest are listed."""

LISTED = 100
"""Strongest cells of each map in the table of a page."""


@shown
@dataclass(frozen=True, eq=False)
class HeatMap:
    """One map.

    Attributes:
        name, title: of the variable.
        values: [row, column], float64; NaN where nothing finite was measured.
        low, high: the ends of the 95 % interval, like `values`; none where the variable has no interval.
        beside: what is shown beside each value: exact measurements, the control, p-values.
        across, down: the axes of columns and rows.
        columns, rows: the name of each.
        unit: what a value counts.
        meaning: a sentence.
        listed: whether its strongest cells are listed: not those of a map that sums another up.
    """

    name: str
    title: str
    values: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    beside: Mapping[str, np.ndarray]
    across: str
    down: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    unit: str
    meaning: str = ""
    listed: bool = True
    kind: Literal["map"] = "map"

    @property
    def names(self) -> tuple[str, ...]:
        """The variable."""
        return (self.name,)

    @property
    def scale(self) -> str:
        """The scale that it is drawn on: its unit, which other maps may share; its own where it has none."""
        return self.unit or self.title

    @property
    def best(self) -> np.ndarray:
        """[row, column] What is known best of each cell: its exact value where one was measured, else its own."""
        exact = self.beside.get("exact")
        return self.values if exact is None else np.where(np.isfinite(exact), exact, self.values)

    def strongest(self, most: int) -> list[tuple[int, int]]:
        """(row, column) of the largest values of either sign, largest first; what is missing or zero is left out.

        A cell that was measured exactly counts with that value.
        """
        flat = np.nan_to_num(np.abs(self.best), nan=0.0).reshape(-1)
        order = np.argsort(-flat, kind="stable")[:most]
        width = self.values.shape[1]
        return [(int(i) // width, int(i) % width) for i in order if flat[i] > 0]

    def row_labels(self, canvas: Canvas) -> list[str]:
        """The name of each row: position and token, both tokens where two prompts differ, or the row's own name."""
        if axis_kind(self.down) != "pos" or not canvas.tokens:
            kind = self.down.removeprefix("sender ")
            return [f"{kind} {visible(row)}" if row.isdigit() else visible(row) for row in self.rows]
        widest = len(self.rows[-1]) if self.rows else 0
        return [f"{row:>{widest}} {canvas.token(i)}" for i, row in enumerate(self.rows)]

    def place(self, canvas: Canvas, row: int, column: int) -> str:
        """Where a cell is, in short: "L16 @3 ·France", "L9H4", "a → b" for an edge."""
        down, across = visible(self.rows[row]), visible(self.columns[column])
        if self.across != "layer":
            return f"{down} → {across}" if self.down == "sender" else f"{self.down} {down}, {self.across} {across}"
        if axis_kind(self.down) == "pos":
            token = canvas.token(row)
            return f"L{across} @{down} {shortened(token, 16)}".rstrip()
        kind = "H" if self.down in ("head", "kv_head") else f" {self.down} "
        return f"L{across}{kind}{down}"

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """The map in a terminal, as wide as it is."""
        if self.values.size > MOST_TERMINAL_CELLS:
            size = f"{self.down} {len(self.rows)} x {self.across} {len(self.columns)}"
            return [Text(f"{printable(self.name)} ({size}) is too large to draw here, only listed", "dim"), Text()]
        lines = drawn(self.best, self.row_labels(canvas), self.columns, self.across, self._limit(canvas), canvas)
        name = "" if self.title == self.name else f"  {printable(self.name)}"
        lines[0] = Text.assemble((printable(self.title), "bold"), (name, "dim"), lines[0])
        return [*lines, Text()]

    def listing(self, canvas: Canvas) -> Table:
        """The strongest cells, with interval, exact value and control."""
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=True)
        table.add_column(Text(printable(self.name), "dim"), no_wrap=True)
        head = "estimate" if "exact" in self.beside else "value" if self.beside else ""
        table.add_column(Text(head, "dim"), justify="right", no_wrap=True)
        for name in self.beside:
            table.add_column(Text(name, "dim"), justify="right", no_wrap=True)
        for row, column in self.strongest(canvas.top):
            text = coloured(self.values[row, column]).append(self._interval(row, column), "dim")
            others = [coloured(of[row, column]) for of in self.beside.values()]
            table.add_row(self.place(canvas, row, column), text, *others)
        return table

    def figure(self, canvas: Canvas) -> str:
        """The map as SVG with one tooltip per cell, and its strongest cells below."""
        rows, left_out = strongest_rows(self.best, _svg.MOST_ROWS)
        every = math.ceil(len(self.columns) / _svg.MOST_COLUMNS)
        values = joined(self.best[rows], every)
        names = self.row_labels(canvas)
        picture = _svg.heat(
            values, [names[i] for i in rows], list(self.columns[::every]), self.across, self._limit(canvas),
            [i for i, row in enumerate(rows) if axis_kind(self.down) == "pos" and row in canvas.marked],
            lambda i, j: f"{self.place(canvas, rows[i], j * every)}: {self._caption(rows[i], j * every)}", canvas.label,
        )  # fmt: skip
        notes = [f"each column holds the strongest of {every} {self.across}s"] if every > 1 else []
        notes += [f"{len(left_out)} weaker rows left out"] if left_out else []
        notes += ["cells that were measured exactly have the colour of that value"] if "exact" in self.beside else []
        best = self.strongest(canvas.top) if self.listed else []
        caption = _svg.rows([(self.place(canvas, *cell), self._caption(*cell)) for cell in best])
        return _svg.figure(self.title, self.name, picture, notes, caption, self.meaning)

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """The map as plain values: its cells where they can be drawn, and its strongest ones."""
        there = self.values.size <= MOST_CELLS
        parts = {"values": self.values, "lo": self.low, "hi": self.high}
        known = np.abs(self.best[np.isfinite(self.best)])
        own = float(known.max()) if known.size else 0.0
        order = (self.values, self.low, self.high, *self.beside.values())
        strongest = [
            [row, column, *(None if of is None else rounded(of[row, column]) for of in order)]
            for row, column in self.strongest(LISTED if self.listed else 0)
        ]
        limit = self._limit(canvas)
        return {
            "kind": self.kind, "name": self.name, "title": self.title, "unit": self.unit, "scale": self.scale,
            "site": self._site(), "size": known.size, "listed": self.listed, "meaning": self.meaning,
            "across": self.across, "down": self.down, "columns": self.columns, "rows": self.rows,
            "by_token": axis_kind(self.down) == "pos",
            "limit": rounded(limit), "own": rounded(own if own > 0 else limit), "strongest": strongest,
            "beside": {key: rounded_rows(of) if there else None for key, of in self.beside.items()},
            **{key: rounded_rows(of) if there and of is not None else None for key, of in parts.items()},
        }  # fmt: skip

    def _limit(self, canvas: Canvas) -> float:
        return canvas.limits.get(self.scale) or limits_of([self])[self.scale]

    def _interval(self, row: int, column: int) -> str:
        return "" if self.low is None or self.high is None else interval(self.low[row, column], self.high[row, column])

    def _caption(self, row: int, column: int) -> str:
        """A value in words: with its interval, what was measured exactly, and the control."""
        text = signed(self.values[row, column]) + self._interval(row, column)
        return text + "".join(f", {name} {unsigned(of[row, column])}" for name, of in self.beside.items())

    def _site(self) -> str | None:
        """The address of a cell, with places for its row and column; none where the map is not one of sites."""
        if self.across != "layer":
            return None
        from microtome.anatomy import SITES

        name = self.name.removesuffix("[head]")
        if name not in SITES:
            return None
        if axis_kind(self.down) == "pos":
            return f"{{column}}.{name}@{{row}}"
        return f"{{column}}.{name}[{{row}}]" if self.down == SITES[name].unit else None


def heat_map(data: xr.Dataset, name: str) -> HeatMap:
    """The map of a variable with two axes."""
    down, across = (str(d) for d in data[name].dims)
    turned = down == "layer"

    def turn(found: np.ndarray | None) -> np.ndarray | None:
        return found.T if turned and found is not None else found

    down, across = (across, down) if turned else (down, across)
    held = numbers(data, name)
    low, high = turn(beside(data, name, "_lo")), turn(beside(data, name, "_hi"))
    more = {key: x.T if turned else x for key, x in companions(data, name).items()}
    return HeatMap(
        name, title(data, name), held.T if turned else held, low, high, more, across, down,
        labels(data, across), labels(data, down), unit(data, name), str(data[name].attrs.get("meaning", "")),
    )  # fmt: skip


def by_layer(edges: HeatMap) -> HeatMap:
    """The strongest edge between every two layers: edges themselves are too many to be seen."""
    names = [tuple(name.partition(".")[0] for name in axis) for axis in (edges.rows, edges.columns)]
    rows, columns = (tuple(dict.fromkeys(axis)) for axis in names)
    across = np.array([columns.index(n) for n in names[1]])
    place = (np.array([rows.index(n) for n in names[0]])[:, None] * len(columns) + across).reshape(-1)
    flat = edges.values.reshape(-1)
    known = np.flatnonzero(np.isfinite(flat))
    found = np.full(len(rows) * len(columns), np.nan)
    for i in known[np.argsort(np.abs(flat[known]), kind="stable")]:
        found[place[i]] = flat[i]  # the strongest comes last, and stays
    values = found.reshape(len(rows), len(columns))
    caption = f"strongest {edges.name} between two layers"
    return HeatMap(
        caption, caption, values, None, None, {}, "receiver layer", "sender layer", columns, rows, edges.unit,
        listed=False,
    )  # fmt: skip


def limits_of(maps: Sequence[HeatMap]) -> dict[str, float]:
    """The end of each scale: the largest value of either sign that any of its maps holds."""
    found: dict[str, float] = {}
    for one in maps:
        known = np.abs(one.best[np.isfinite(one.best)])
        found[one.scale] = max(found.get(one.scale, 0.0), float(known.max()) if known.size else 0.0)
    return {scale: limit if limit > 0 else 1.0 for scale, limit in found.items()}
