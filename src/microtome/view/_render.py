"""A whole result in a terminal, and as a fragment of HTML for a notebook."""

from __future__ import annotations

import html as markup
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from microtome.view import _svg
from microtome.view._canvas import Canvas
from microtome.view._dataset import (
    metric_of,
    places_marked,
    prompts_of,
    reading_of,
    sought,
    title_of,
    tokens_of,
    without_interval,
)
from microtome.view._dataset import without_batch as one_example
from microtome.view._forms import Form, Forms, forms
from microtome.view._heat_cells import fit, in_full, legend
from microtome.view._heat_map import MOST_TERMINAL_CELLS, HeatMap
from microtome.view._parts import PartsList
from microtome.view._series import Series
from microtome.view._tables import FactList
from microtome.view._text import printable, unsigned, visible

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

MOST_LETTERS = 28
"""Letters of the row names of a figure."""

MOST_BYTES = 190_000
"""Characters of a fragment; forms that would make it larger are named instead."""


def terminal(data: xr.Dataset, width: int, *, top: int = 5) -> Group:
    """A result in a terminal: its prompts, metric and reading, then each variable by its axes.

    Args:
        data: any result; a batch of one is dropped. Of one that lists its parts, only these are shown.
        width: of the terminal, in cells. Where columns do not fit, neighbours share one, and a note says so.
        top: how many of the strongest cells, neurons or parts to list.
    """
    data = one_example(data)
    found = forms(data)
    canvas = canvas_of(data, found, width, top)
    shown = [form for form in found.shown if form.kind in ("parts", "facts")] if found.of(PartsList) else found.shown
    lines: list[RenderableType] = [*_header(data), Text()]
    waiting: list[Series] = []
    for form in shown:
        if isinstance(form, Series):
            waiting.append(form)
            continue
        lines += _side_by_side(waiting, canvas)
        lines += form.terminal(canvas)
        waiting = []
    lines += _side_by_side(waiting, canvas)
    lines += _scales(shown, canvas, found.signed)
    listed = [form.listing(canvas) for form in shown if isinstance(form, HeatMap) and form.listed and top]
    lines += [Text("\nstrongest", "bold"), Columns(listed, padding=(0, 3))] if listed else []
    if why := without_interval(data):
        lines.append(Text(printable(why), "dim"))
    if found.not_drawn:
        lines.append(Text(f"not drawn: {printable('; '.join(found.not_drawn))}", "dim"))
    return Group(*lines)


def canvas_of(data: xr.Dataset, found: Forms, width: int, top: int) -> Canvas:
    """What the forms of a result are drawn on."""
    canvas = Canvas(tokens_of(data), found.limits, tuple(places_marked(data)), width, top)
    maps = [one for one in found.of(HeatMap) if one.values.size <= MOST_TERMINAL_CELLS]
    size = max((cell_len(label) for one in maps for label in one.row_labels(canvas)), default=0)
    return Canvas(canvas.tokens, canvas.limits, canvas.marked, width, top, min(size, max(8, width // 5)))


def _side_by_side(waiting: list[Series], canvas: Canvas) -> list[RenderableType]:
    drawn = [part for one in waiting for part in one.terminal(canvas)]
    return [Columns(drawn, padding=(0, 4))] if drawn else []


def _header(data: xr.Dataset) -> list[Text]:
    lines: list[Text] = []
    metric = printable(metric_of(data))
    for role, words, value in prompts_of(data):
        line = Text.assemble((f"{role:8}", "dim"), "".join(visible(word) for word in words))
        if value is not None:
            line.append(f"{'   ' if words else ''}{metric} ".lstrip("\n"), "dim").append(f"{value:.3f}", "bold")
        lines.append(line)
    asked = [visible(word) for word in sought(data)]
    lines += [Text.assemble(("answer  ", "dim"), (" rather than ".join(asked), "bold"))] if asked else []
    reading = printable(reading_of(data))
    return [*lines, *([Text(reading, "dim")] if reading else [])]


def _scales(shown: Sequence[Form], canvas: Canvas, below: set[str]) -> list[RenderableType]:
    """The scale of each unit, and what marks in cells mean."""
    maps = [one for one in shown if isinstance(one, HeatMap) and one.values.size <= MOST_TERMINAL_CELLS]
    scales = dict.fromkeys(m.scale for m in maps)
    lines: list[RenderableType] = [legend(s, canvas.limits[s], signed=s in below) for s in scales]
    tenths = [
        m for m in maps if not in_full(canvas.limits[m.scale], fit(len(m.columns), canvas.label, canvas.width)[1])
    ]
    marks = ["a digit alone counts tenths of the scale"] if tenths else []
    marks += ["– is no edge, or was not measured"] if any(np.isnan(m.values).any() for m in maps) else []
    return lines + ([Text("; ".join(marks), "dim")] if marks else [])


# ------------------------------------------------------------------------------------------------------------ notebook


def html(data: xr.Dataset, *, top: int = 3) -> str:
    """A result as a fragment of HTML for a notebook: static, with no script and nothing to load, of bounded size.

    Args:
        data: any result; a batch of one is dropped.
        top: how many of the strongest cells of each map to list.

    Returns:
        The figures of its variables, by their axes; where nothing can be drawn, what xarray itself shows.
    """
    import xarray as xr

    whole, data = data, one_example(data)
    found = forms(data)
    if all(isinstance(form, FactList) for form in found.shown):
        return xr.Dataset._repr_html_(whole)  # pyright: ignore[reportPrivateUsage]
    canvas = canvas_of(data, found, MOST_LETTERS * 5, top)
    parts, left = [_title(data)], list(found.not_drawn)
    scales = dict.fromkeys(one.scale for one in found.of(HeatMap))
    ramps = "".join(_svg.ramp(scale, canvas.limits[scale], signed=scale in found.signed) for scale in scales)
    parts.append(f'<div style="margin:6px 0;display:flex;flex-wrap:wrap">{ramps}</div>')
    figures: list[str] = []
    size = sum(map(len, parts))
    for form in found.shown:
        figure = form.figure(canvas)
        if size + len(figure) > MOST_BYTES:
            left += form.names
            continue
        size += len(figure)
        figures.append(figure)
    parts.append(f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{"".join(figures)}</div>')
    if why := without_interval(data):
        parts.append(f'<div style="opacity:0.62">{_svg.escaped(why)}</div>')
    if left:
        parts.append(f'<div style="opacity:0.62">not drawn: {_svg.escaped("; ".join(left))}</div>')
    look = "font:13px/1.4 system-ui,-apple-system,'Segoe UI',sans-serif;font-variant-numeric:tabular-nums"
    return f'<div style="{look}">{"".join(parts)}</div>'


def _title(data: xr.Dataset) -> str:
    """The title, the prompts with the metric of each, and how a value is to be read."""
    marked = set(places_marked(data))
    lines = [f'<div style="font-size:15px;font-weight:600">{_svg.escaped(title_of(data))}</div>']
    for role, words, value in prompts_of(data):
        chips = "".join(_chip(word, i in marked) for i, word in enumerate(words))
        caption = (
            ""
            if value is None
            else f'<span style="opacity:0.62">{_svg.escaped(metric_of(data))}</span> <b>{unsigned(value)}</b>'
        )
        lines.append(f'<div><span style="opacity:0.62">{role}</span> {chips} {caption}</div>')
    if reading := reading_of(data):
        lines.append(f'<div style="opacity:0.62;max-width:900px">{_prose(reading)}</div>')
    return "".join(lines)


def _prose(text: str) -> str:
    """A sentence in which what stands between backticks is code."""
    parts = _svg.escaped(text).split("`")
    closed = len(parts) % 2
    return (
        "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
        if closed
        else "`".join(parts)
    )


def _chip(word: str, marked: bool) -> str:
    ground = "rgba(230,170,20,0.38)" if marked else "rgba(128,128,128,0.16)"
    look = f"background:{ground};border-radius:3px;padding:0 3px;margin-right:2px;color:inherit"
    return f'<code style="{look}">{markup.escape(visible(word))}</code>'
