"""A line over the layers, or over another axis with an order: one bar per place, its interval, and its control."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Group
from rich.text import Text

from microtome.shown import shown
from microtome.view import _svg
from microtome.view._dataset import axis_kind, beside, companions, labels, numbers, title, unit
from microtome.view._page_values import rounded_row
from microtome.view._text import bar, coloured, interval, plain_table, printable, signed, unsigned, visible

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

MOST_ROWS, BAR = 48, 16
"""Places that are listed in a terminal, and cells of a bar; of more the strongest are shown."""


@shown
@dataclass(frozen=True, eq=False)
class Series:
    """One line.

    Attributes:
        name, title, unit, meaning: of the variable.
        axis: what it runs over.
        places: the name of each place.
        values: by place, float64; NaN where nothing was measured.
        low, high: the ends of the 95 % interval; none where there is none.
        beside: what is shown beside each value: exact measurements, the control, p-values.
    """

    name: str
    title: str
    unit: str
    meaning: str
    axis: str
    places: tuple[str, ...]
    values: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    beside: Mapping[str, np.ndarray]
    kind: Literal["series"] = "series"

    @property
    def names(self) -> tuple[str, ...]:
        """The variable."""
        return (self.name,)

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """One row per place, with a bar."""
        order = np.argsort(-np.nan_to_num(np.abs(self.values)), kind="stable").tolist()
        shown, left = sorted(order[:MOST_ROWS]), len(order) - MOST_ROWS
        table = plain_table(printable(self.axis), "")
        table.columns[1].justify = "right"
        table.columns[1].no_wrap = True
        table.add_column("")
        for more in self.beside:
            table.add_column(Text(more, "dim"), justify="right")
        most = float(np.nanmax(np.abs(self.values))) if np.isfinite(self.values).any() else 1.0
        for i in shown:
            value = float(self.values[i])
            drawn = Text(bar(0.0 if math.isnan(value) else value / (most or 1.0), BAR), "blue" if value > 0 else "red")
            caption = coloured(value).append(self._interval(i), "dim")
            more = [Text(signed(float(of[i])), "dim") for of in self.beside.values()]
            table.add_row(Text(self._place(canvas, i)), caption, drawn, *more)
        name = "" if self.title == self.name else f"  {printable(self.name)}"
        head = Text.assemble((printable(self.title), "bold"), (f"{name}  {printable(self.unit)}".rstrip(), "dim"))
        rest = [Text(f"{left} weaker places left out", "dim")] if left > 0 else []
        return [Group(head, table, *rest, Text())]

    def figure(self, canvas: Canvas) -> str:
        """The line with its interval as a band and its control dashed."""
        control = self.beside.get("control")
        caption = [f"{self._place(canvas, i)}: {self._caption(i)}" for i in range(len(self.places))]
        parts = _svg.line(self.values, self.low, self.high, control, self.places, self.axis, caption)
        picture = _svg.picture(*_svg.LINE, parts, f"{self.title} by {self.axis}")
        notes = [text for text in (self.unit, "dashed: control" if control is not None else "") if text]
        return _svg.figure(self.title, self.name, picture, notes, meaning=self.meaning)

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """The line as plain values."""
        ends = {"lo": self.low, "hi": self.high}
        return {
            "kind": self.kind, "name": self.name, "title": self.title, "unit": self.unit, "meaning": self.meaning,
            "axis": self.axis, "places": [self._place(canvas, i) for i in range(len(self.places))],
            "values": rounded_row(self.values), "beside": {k: rounded_row(of) for k, of in self.beside.items()},
            **{key: None if of is None else rounded_row(of) for key, of in ends.items()},
        }  # fmt: skip

    def _place(self, canvas: Canvas, i: int) -> str:
        token = canvas.token(i) if axis_kind(self.axis) == "pos" and canvas.tokens else ""
        return f"{visible(self.places[i])} {token}".rstrip()

    def _interval(self, i: int) -> str:
        return "" if self.low is None or self.high is None else interval(float(self.low[i]), float(self.high[i]))

    def _caption(self, i: int) -> str:
        more = "".join(f", {name} {unsigned(float(of[i]))}" for name, of in self.beside.items())
        return signed(float(self.values[i])) + self._interval(i) + more


def series(data: xr.Dataset, name: str) -> Series:
    """The line of a variable with one axis."""
    axis = str(data[name].dims[0])
    return Series(
        name, title(data, name), unit(data, name), str(data[name].attrs.get("meaning", "")), axis, labels(data, axis),
        numbers(data, name), beside(data, name, "_lo"), beside(data, name, "_hi"), companions(data, name),
    )  # fmt: skip
