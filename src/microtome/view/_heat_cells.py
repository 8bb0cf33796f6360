"""The cells of a heat map in a terminal.

A cell says its value by its colour and again in characters, so that nothing is lost where there are no colours: the
value itself where the terminal is wide enough, else the tenth of the scale that it reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.style import Style
from rich.text import Text

from microtome.view._text import fitted, printable, short_number, shortened, visible

if TYPE_CHECKING:
    from microtome.view._canvas import Canvas

NEUTRAL, POSITIVE, NEGATIVE = (40, 44, 52), (30, 104, 196), (186, 64, 34)
"""Backgrounds of zero and of the two ends of the scale; white text is legible on each and on all between them."""

NARROW, NUMBERED = 2, 5
"""Terminal cells of a map's cell: at least, and with its value written out."""

MOST_WIDE, MOST_NAMED, MOST_ROWS = 7, 14, 24
"""Terminal cells of a map's cell at most, also where its columns have names, and rows of a map."""


def drawn(
    values: np.ndarray, names: Sequence[str], columns: Sequence[str], across: str, limit: float, canvas: Canvas
) -> list[Text]:
    """The lines of a map: its notes, the axis, and one line per row.

    Args:
        values: [row, column]; NaN where nothing was measured.
        names: of the rows.
        columns: their names.
        across: the axis of the columns.
        limit: the end of the scale.
        canvas: how wide the terminal is, and how wide the names.
    """
    size = canvas.label
    named = any(len(column) > NARROW * 2 for column in columns)
    every, cells = fit(len(columns), size, canvas.width, MOST_NAMED if named else MOST_WIDE)
    values, columns = joined(values, every), columns[::every]
    shown, left = strongest_rows(values, MOST_ROWS)
    caption = f"  a column holds the strongest of {every} {across}s" if every > 1 else ""
    lines = [Text(caption, "dim"), _axis(across, columns, size, cells, named=named)]
    for row in shown:
        line = Text(fitted(names[row], size) + " ")
        for value in values[row]:
            line.append(_written(float(value), limit, cells), style(float(value), limit))
        lines.append(line)
    if left:
        most = np.nanmax(np.abs(np.nan_to_num(values[left])))
        lines.append(Text(f"{len(left)} rows left out, in which nothing is beyond ±{most:.2g}", "dim"))
    return lines


def fit(columns: int, size: int, width: int, most: int = MOST_WIDE) -> tuple[int, int]:
    """How many columns share one, and the terminal cells of each."""
    room = width - size - 1
    every = math.ceil(columns / max(1, room // NARROW))
    return every, max(NARROW, min(most, room // max(1, math.ceil(columns / every))))


def in_full(limit: float, cells: int) -> bool:
    """Whether values of this size are written out in cells of this width."""
    return cells >= NUMBERED and 0.05 <= limit < 1000


def joined(values: np.ndarray, every: int) -> np.ndarray:
    """Every so many columns as one, which holds the strongest of them; missing where all of them are."""
    if every == 1:
        return values
    parts: list[np.ndarray] = []
    for start in range(0, values.shape[1], every):
        part = values[:, start : start + every]
        best = np.nan_to_num(np.abs(part), nan=-1.0).argmax(1)
        parts.append(part[np.arange(len(part)), best])
    return np.stack(parts, 1)


def strongest_rows(values: np.ndarray, most: int) -> tuple[list[int], list[int]]:
    """The rows to show, and those left out where they are many: the weakest."""
    order = np.argsort(-np.nan_to_num(np.abs(values)).max(1), kind="stable").tolist()
    return sorted(order[:most]), sorted(order[most:])


def _axis(name: str, columns: Sequence[str], size: int, cells: int, *, named: bool) -> Text:
    """The names of the columns, as many as fit, each ending where its column's characters end; words are cut to fit."""
    line, end = fitted(name.replace("_", " "), size) + " ", 0
    if named and cells >= NUMBERED:
        return Text(line + "".join(f"{shortened(visible(c), cells - 1):>{cells - 1}} " for c in columns), "dim")
    for i, column in enumerate(columns):
        stop = (i + 1) * cells - (1 if cells > NARROW else 0)
        start = stop - len(column)
        if (start > end or (i == 0 and start >= 0)) and i % (1 if cells > NARROW else 5) == 0:
            line += " " * (start - end) + column
            end = stop
    return Text(line, "dim")


def _written(value: float, limit: float, cells: int) -> str:
    """A value in the characters of a cell."""
    if math.isnan(value):
        text = "–"
    elif in_full(limit, cells):
        text = short_number(value)
    else:
        tenths = min(9, int(10 * abs(value) / limit + 1e-9))
        text = f"{'-' if value < 0 else ''}{tenths}" if tenths else ""
    return text.rjust(cells - 1) + " " if cells > NARROW else text.rjust(cells)


def style(value: float, limit: float) -> Style:
    """The colours of a value."""
    if math.isnan(value):
        return Style(dim=True)
    share = min(1.0, abs(value) / limit)
    end = POSITIVE if value > 0 else NEGATIVE
    r, g, b = (round(a + (z - a) * share) for a, z in zip(NEUTRAL, end, strict=True))
    return Style(color="white", bgcolor=f"rgb({r},{g},{b})")


def legend(unit: str, limit: float, *, signed: bool) -> Text:
    """The scale of a unit, from zero where nothing is below it."""
    line = Text(f"-{limit:.3g} " if signed else "0 ", "dim")
    for i in range(-12 if signed else 0, 13):
        line.append(" ", style(limit * i / 12, limit))
    return line.append(f" {'+' if signed else ''}{limit:.3g} {printable(unit)}".rstrip(), "dim")
