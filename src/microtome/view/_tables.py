"""Variables over names, one row per name and one column per variable; and single numbers as facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from microtome.shown import shown
from microtome.view import _svg
from microtome.view._dataset import beside, control, is_numeric, labels, numbers, title, unit
from microtome.view._page_values import rounded
from microtome.view._text import interval, plain_table, printable, unsigned, visible

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

MOST_ROWS = 60
"""Rows of a table in a terminal or a notebook."""

MOST_COLUMNS = 5
"""Columns of numbers side by side in a terminal; what is beside a variable stays with it."""


@dataclass(frozen=True, eq=False)
class Column:
    """A variable over names, with its interval; `beside` says that it is the control of the one before, or the like."""

    name: str
    title: str
    unit: str
    values: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    whole: bool
    beside: bool = False

    def caption(self, row: int) -> str:
        """A value in words."""
        value = float(self.values[row])
        if math.isnan(value):
            return "–"
        ends = "" if self.low is None or self.high is None else interval(float(self.low[row]), float(self.high[row]))
        return (f"{value:,.0f}" if self.whole else unsigned(value)) + ends


@shown
@dataclass(frozen=True, eq=False)
class LabelTable:
    """All variables over one axis of names, such as the sites that were checked, or the components of a model."""

    axis: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    kind: Literal["table"] = "table"

    @property
    def names(self) -> tuple[str, ...]:
        """The variables."""
        return tuple(column.name for column in self.columns)

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        heads = [self.axis, *(column.title for column in self.columns)]
        return heads, [[visible(row), *(c.caption(i) for c in self.columns)] for i, row in enumerate(self.rows)]

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """One row per name; many columns one block below the other."""
        heads, texts = self._texts()
        found: list[RenderableType] = [Text(printable(self.title), "bold")]
        for block in self._blocks():
            table = plain_table()
            for i in (0, *block):
                table.add_column(Text(printable(heads[i]), "dim"), justify="right" if i else "left")
            for row in texts[:MOST_ROWS]:
                table.add_row(*(Text(row[i]) for i in (0, *block)))
            found += [table, Text()]
        left = len(texts) - MOST_ROWS
        return found + ([Text(f"{left} more rows", "dim"), Text()] if left > 0 else [])

    def _blocks(self) -> list[list[int]]:
        """The numbers of the columns that stand side by side, from 1."""
        variables: list[list[int]] = []
        for i, column in enumerate(self.columns, 1):
            if column.beside and variables:
                variables[-1].append(i)
            else:
                variables.append([i])
        blocks: list[list[int]] = [[]]
        for one in variables:
            if blocks[-1] and len(blocks[-1]) + len(one) > MOST_COLUMNS:
                blocks.append([])
            blocks[-1] += one
        return blocks

    def figure(self, canvas: Canvas) -> str:
        """The same as a table."""
        heads, texts = self._texts()
        more = [f"{len(texts) - MOST_ROWS} more rows"] if len(texts) > MOST_ROWS else []
        return _svg.figure(self.title, "", _svg.rows(texts[:MOST_ROWS], heads), more)

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """The values by row."""
        heads = [self.axis, *(f"{c.title} ({c.unit})" if c.unit else c.title for c in self.columns)]

        def cell(column: Column, row: int) -> list[float | None]:
            ends = [] if column.low is None or column.high is None else [column.low[row], column.high[row]]
            return [rounded(float(x)) for x in (column.values[row], *ends)]

        body = [[row, *(cell(column, i) for column in self.columns)] for i, row in enumerate(self.rows)]
        return {"kind": self.kind, "title": self.title, "heads": heads, "rows": body}


def label_table(data: xr.Dataset, axis: str, names: Sequence[str]) -> LabelTable:
    """The table of the variables over an axis, each followed by its control and the difference of both."""
    columns: list[Column] = []
    for name in names:
        whole = data[name].dtype.kind in "iub"
        low, high = beside(data, name, "_lo"), beside(data, name, "_hi")
        columns.append(Column(name, title(data, name), unit(data, name), numbers(data, name), low, high, whole))
        if (other := control(data, name)) is not None:
            caption = f"{title(data, name)}, control"
            columns.append(Column(f"{name}, control", caption, unit(data, name), other, None, None, whole, True))
        if (less := beside(data, name, "_diff")) is not None:
            low, high = beside(data, name, "_diff_lo"), beside(data, name, "_diff_hi")
            caption = f"{title(data, name)} minus control"
            columns.append(Column(f"{name} minus control", caption, unit(data, name), less, low, high, whole, True))
    heading = data[axis].attrs.get("title") if axis in data.coords else None
    return LabelTable(axis, str(heading or f"by {axis.replace('_', ' ')}"), labels(data, axis), tuple(columns))


@shown
@dataclass(frozen=True)
class FactList:
    """Single values, each with its name and unit."""

    facts: tuple[tuple[str, str, str], ...]
    kind: Literal["facts"] = "facts"

    @property
    def names(self) -> tuple[str, ...]:
        """The variables."""
        return tuple(name for name, _, _ in self.facts)

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """One line per fact."""
        table = Table(box=None, pad_edge=False, show_header=False)
        for _, heading, value in self.facts:
            table.add_row(Text(printable(heading), "dim"), Text(printable(value)))
        return [table, Text()]

    def figure(self, canvas: Canvas) -> str:
        """The same as a table."""
        return _svg.rows([(heading, value) for _, heading, value in self.facts])

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """The same as texts."""
        return {"kind": self.kind, "facts": [[heading, value] for _, heading, value in self.facts]}


def fact_list(data: xr.Dataset, names: Sequence[str]) -> FactList:
    """The single values of a dataset, with interval, control and unit."""
    return FactList(tuple((name, title(data, name), _fact(data, name)) for name in names))


def _fact(data: xr.Dataset, name: str) -> str:
    if not is_numeric(data, name):
        return str(data[name].values.item())
    if data[name].dtype.kind in "iu":
        text = f"{int(data[name]):,}"
    elif data[name].dtype.kind == "b":
        text = "yes" if bool(data[name]) else "no"
    else:
        text = unsigned(float(numbers(data, name)))
    plain = unit(data, name) == "1"
    text += _ends(data, name) + ("" if plain else f" {unit(data, name)}".rstrip())
    other, less = control(data, name), beside(data, name, "_diff")
    more = [] if other is None else [f"control {unsigned(float(other))}"]
    more += [] if less is None else [f"difference {unsigned(float(less))}{_ends(data, f'{name}_diff')}"]
    return f"{text} ({', '.join(more)})" if more else text


def _ends(data: xr.Dataset, name: str) -> str:
    low, high = (beside(data, name, end) for end in ("_lo", "_hi"))
    return "" if low is None or high is None else interval(float(low), float(high))
