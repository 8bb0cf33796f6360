"""Heat maps in a terminal: layers from left to right, tokens or heads from top to bottom, all maps on one layer axis.

A cell says its value by its colour and again in characters, so that nothing is lost where there are no colours: the
value itself where the terminal is wide enough, else the tenth of the scale that it reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.columns import Columns
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from microtome.view._maps import HeatMap, checks_of, limits_of, maps_of, metric_of, prompts_of, reading_of, tokens_of
from microtome.view._terminal import visible

if TYPE_CHECKING:
    import xarray as xr

NEUTRAL, POSITIVE, NEGATIVE = (40, 44, 52), (30, 104, 196), (186, 64, 34)
"""Backgrounds of zero and of the two ends of the scale; white text is legible on each and on all between them."""

NARROW, NUMBERED = 2, 5
"""Terminal cells of a map's cell: at least, and with its value written out."""

MOST_CELLS, MOST_ROWS, MOST_DRAWN = 7, 24, 4096
"""Terminal cells of a map's cell at most, rows of a map, and cells of a variable that is drawn and not only listed."""


def heat_maps(data: xr.Dataset, width: int, *, top: int = 5) -> Group:
    """The maps of a causal result with their scale, and the strongest cells of each.

    Args:
        data: what `activation_patching`, or another method with a variable a site over (layer, pos), returned.
        width: of the terminal, in cells. Where the layers do not fit, neighbours share a column, and that is said.
        top: how many of the strongest cells of each map to list.

    Raises:
        DataError: the dataset holds nothing with two axes.
    """
    maps = maps_of(data)
    limits, tokens = limits_of(maps), tokens_of(data)
    drawn = [m for m in maps if m.values.size <= MOST_DRAWN]
    size = min(max((_label_size(m, tokens) for m in drawn), default=0), max(8, width // 5))
    parts: list[Text | Columns | Table] = [*_header(data), Text()]
    for one in drawn:
        parts += [*_drawn(one, tokens, limits[one.unit], size, width), Text()]
    parts += [_legend(unit, limit) for unit, limit in limits.items()]
    marks = ["a digit alone counts tenths of the scale"] if any(_tenths(m, limits, size, width) for m in drawn) else []
    marks += ["– is no edge, or was not measured"] if any(np.isnan(m.values).any() for m in drawn) else []
    parts += [Text("; ".join(marks), "dim")] if marks else []
    if left := [m for m in maps if m.values.size > MOST_DRAWN]:
        sizes = ", ".join(f"{_plain(m.name)} ({m.down} {len(m.rows)} x {m.across} {len(m.columns)})" for m in left)
        parts.append(Text(f"too large to draw here, only listed: {sizes}", "dim"))
    if top:
        listed = [_listed(one, tokens, top) for one in maps if one.listed]
        parts += [Text("\nstrongest", "bold"), Columns(listed, padding=(0, 3))]
    if checks := checks_of(data):
        parts += [Text("\nhow far the estimates hold", "bold"), _checked(checks)]
    return Group(*parts)


def _header(data: xr.Dataset) -> list[Text]:
    lines: list[Text] = []
    metric = metric_of(data)
    for role, words, value in prompts_of(data):
        line = Text.assemble((f"{role:8}", "dim"), "".join(visible(word) for word in words))
        if value is not None:
            line.append(f"{'   ' if words else ''}{metric} ", "dim").append(f"{value:.3f}", "bold")
        lines.append(line)
    sought = [visible(str(data.attrs[name])) for name in ("answer", "foil") if name in data.attrs]
    lines += [Text.assemble(("answer  ", "dim"), (" rather than ".join(sought), "bold"))] if sought else []
    return [*lines, Text(_plain(reading_of(data)), "dim")]


def row_labels(one: HeatMap, tokens: dict[str, tuple[str, ...]]) -> list[str]:
    """The name of each row: the place and token, both tokens where two prompts differ, or the row's own name."""
    if one.down != "pos" or not tokens:
        kind = one.down.removeprefix("sender ")
        return [f"{kind} {visible(row)}" if row.isdigit() else visible(row) for row in one.rows]
    widest = len(one.rows[-1]) if one.rows else 0
    return [f"{row:>{widest}} {token_label(tokens, i)}" for i, row in enumerate(one.rows)]


def token_label(tokens: dict[str, tuple[str, ...]], pos: int) -> str:
    """The token at a place; both, clean first, where two prompts differ there."""
    words = [visible(words[pos]) for words in tokens.values() if pos < len(words)]
    return "/".join(dict.fromkeys(words))


def _label_size(one: HeatMap, tokens: dict[str, tuple[str, ...]]) -> int:
    return max((cell_len(label) for label in row_labels(one, tokens)), default=0)


# ------------------------------------------------------------------------------------------------------------- one map


def _drawn(one: HeatMap, tokens: dict[str, tuple[str, ...]], limit: float, size: int, width: int) -> list[Text]:
    every, cells = _fit(one, size, width)
    values, columns = _joined(one.values, every), one.columns[::every]
    shown, left = _rows(values)
    labels = row_labels(one, tokens)
    name = "" if one.title == one.name else f"  {_plain(one.name)}"
    told = f"  a column holds the strongest of {every} {one.across}s" if every > 1 else ""
    lines = [Text.assemble((_plain(one.title), "bold"), (name + told, "dim")), _axis(one.across, columns, size, cells)]
    for row in shown:
        line = Text(_fitted(labels[row], size) + " ")
        for value in values[row]:
            line.append(_written(float(value), limit, cells), _style(float(value), limit))
        lines.append(line)
    if left:
        most = np.nanmax(np.abs(np.nan_to_num(values[left])))
        lines.append(Text(f"{len(left)} rows left out, in which nothing is beyond ±{most:.2g}", "dim"))
    return lines


def _fit(one: HeatMap, size: int, width: int) -> tuple[int, int]:
    """How many columns share one, and the terminal cells of each."""
    room = width - size - 1
    every = math.ceil(len(one.columns) / max(1, room // NARROW))
    return every, max(NARROW, min(MOST_CELLS, room // max(1, math.ceil(len(one.columns) / every))))


def _tenths(one: HeatMap, limits: dict[str, float], size: int, width: int) -> bool:
    return not _in_full(limits[one.unit], _fit(one, size, width)[1])


def _in_full(limit: float, cells: int) -> bool:
    return cells >= NUMBERED and 0.05 <= limit < 1000


def _joined(values: np.ndarray, every: int) -> np.ndarray:
    """Every so many columns as one, which holds the strongest of them; missing where all of them are."""
    if every == 1:
        return values
    parts: list[np.ndarray] = []
    for start in range(0, values.shape[1], every):
        part = values[:, start : start + every]
        best = np.nan_to_num(np.abs(part), nan=-1.0).argmax(1)
        parts.append(part[np.arange(len(part)), best])
    return np.stack(parts, 1)


def _rows(values: np.ndarray) -> tuple[list[int], list[int]]:
    """The rows to show, and those left out where they are many: the weakest."""
    order = np.argsort(-np.nan_to_num(np.abs(values)).max(1), kind="stable").tolist()
    return sorted(order[:MOST_ROWS]), sorted(order[MOST_ROWS:])


def _axis(name: str, columns: Sequence[str], size: int, cells: int) -> Text:
    """The numbers of the columns, as many as fit, each ending where its column's characters end."""
    line, end = _fitted(name, size) + " ", 0
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
    elif _in_full(limit, cells):
        text = short_number(value)
    else:
        tenths = min(9, int(10 * abs(value) / limit + 1e-9))
        text = f"{'-' if value < 0 else ''}{tenths}" if tenths else ""
    return text.rjust(cells - 1) + " " if cells > NARROW else text.rjust(cells)


def short_number(value: float) -> str:
    """A value below a thousand in four characters, or nothing where it rounds to zero: ".93", "-.28", "12.3"."""
    size = abs(value)
    text = f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 or value <= -0.995 else f"{value:.2f}"
    if float(text) == 0:
        return ""
    return text.replace("0.", ".", 1) if size < 0.995 else text


def _style(value: float, limit: float) -> Style:
    if math.isnan(value):
        return Style(dim=True)
    share = min(1.0, abs(value) / limit)
    end = POSITIVE if value > 0 else NEGATIVE
    r, g, b = (round(a + (z - a) * share) for a, z in zip(NEUTRAL, end, strict=True))
    return Style(color="white", bgcolor=f"rgb({r},{g},{b})")


def _legend(unit: str, limit: float) -> Text:
    line = Text(f"-{limit:.3g} ", "dim")
    for i in range(-12, 13):
        line.append(" ", _style(limit * i / 12, limit))
    return line.append(f" +{limit:.3g} {_plain(unit)}".rstrip(), "dim")


def _plain(text: str) -> str:
    """Words as they are, with nothing in them that would move the cursor."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _fitted(text: str, cells: int) -> str:
    return set_cell_size(text, cells) if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


# ------------------------------------------------------------------------------------------------------ strongest cells


def _listed(one: HeatMap, tokens: dict[str, tuple[str, ...]], top: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=True)
    table.add_column(Text(_plain(one.name), "dim"), no_wrap=True)
    table.add_column("" if one.exact is None else Text("estimate", "dim"), justify="right", no_wrap=True)
    if one.exact is not None:
        table.add_column(Text("exact", "dim"), justify="right", no_wrap=True)
    for row, column in one.strongest(top):
        text = _number(one.values[row, column])
        if one.bounds is not None:
            low, high = (bound[row, column] for bound in one.bounds)
            text.append(f" [{low:+.2f}, {high:+.2f}]", "dim")
        exact = [] if one.exact is None else [_number(one.exact[row, column])]
        table.add_row(place_of(one, tokens, row, column), text, *exact)
    return table


def _number(value: float) -> Text:
    if math.isnan(value):
        return Text("–", "dim")
    return Text(f"{value:+.3f}" if abs(value) >= 0.0005 else f"{value:+.1e}", "blue" if value > 0 else "red")


def _checked(checks: dict[str, dict[str, float]]) -> Table:
    """What exact measurement said of the estimates of each map."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    names = list(next(iter(checks.values())))
    for name in names:
        table.add_column(_plain(name.replace("_", " ")), justify="right")
    for site, values in checks.items():
        told = ["–" if math.isnan(v) else f"{v:,.0f}" if n == "measured" else f"{v:.3f}" for n, v in values.items()]
        table.add_row(Text(_plain(site)), *told)
    return table


def place_of(one: HeatMap, tokens: dict[str, tuple[str, ...]], row: int, column: int) -> str:
    """Where a cell is, in short: "L16 @3 ·France", "L9H4", "a → b" for an edge."""
    if one.across != "layer":
        return f"{visible(one.rows[row])} → {visible(one.columns[column])}"
    if one.down == "pos":
        return f"L{one.columns[column]} @{one.rows[row]} {_cut(token_label(tokens, row), 16)}".rstrip()
    kind = "H" if one.down in ("head", "kv_head") else f" {one.down} "
    return f"L{one.columns[column]}{kind}{visible(one.rows[row])}"


def _cut(text: str, cells: int) -> str:
    return text if cell_len(text) <= cells else _fitted(text, cells).rstrip()
