"""Static pictures for a notebook: SVG and tables without scripts, in colours that read on light and dark.

Text takes the colour of the page around it. Strength is opacity, blue above zero and red below, so that zero is the
page's own ground. Everything that comes from a model or a user is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

import numpy as np

from microtome.view._text import printable, shortened

HOT, COLD = "#2f74c0", "#cf4f2e"
MOST_COLUMNS, MOST_ROWS = 100, 40
"""Columns and rows of a map; beyond, neighbouring columns share one, and the weakest rows are left out."""

MOST_TOOLTIPS = 900
"""Cells of a map up to which each has a tooltip with its value; of a larger map only the listed ones have."""

SHADES = 40
LINE = (420.0, 150.0)
LETTER = 6.7
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def escaped(text: str) -> str:
    """Text that cannot become markup, or move what is around it."""
    return html.escape(printable(text))


def label(x: float, y: float, text: str, anchor: str = "start", *, soft: bool = False, mono: bool = False) -> str:
    """A text in a picture."""
    look = (' opacity="0.62"' if soft else "") + (f' font-family="{MONO}"' if mono else "")
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="currentColor"'
    return f"<text {place}{look}>{escaped(text)}</text>"


def box(x: float, y: float, width: float, height: float, value: float, share: float, caption: str = "") -> str:
    """A rectangle as strong as its share of the scale, in the colour of its sign."""
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    shape += f' fill="{HOT if value >= 0 else COLD}" fill-opacity="{min(1.0, share):.2f}"'
    return f"{shape}><title>{escaped(caption)}</title></rect>" if caption else f"{shape}/>"


def picture(width: float, height: float, parts: Sequence[str], name: str) -> str:
    """The parts as one SVG, never wider than what is around it."""
    size = (
        f'width="{math.ceil(width)}" height="{math.ceil(height)}" viewBox="0 0 {math.ceil(width)} {math.ceil(height)}"'
    )
    look = 'style="max-width:100%;height:auto;display:block"'
    about = f'xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escaped(name)}"'
    return f"<svg {about} {size} {look}>{''.join(parts)}</svg>"


def heat(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    across: str,
    limit: float,
    marked: Sequence[int],
    caption: Callable[[int, int], str],
    letters: int = 0,
) -> str:
    """A heat map of [row, column].

    `caption` says a cell in words, `marked` rows are those that matter, and `letters` is how many the row names have in
    all maps, so that the cells of all begin at one place.
    """
    letters = min(28, max(letters, max((len(row) for row in rows), default=0)))
    left = max(letters, len(across)) * LETTER + 8
    wide = max(5.0, min(17.0, 620 / max(1, len(columns))))
    tall = 15.0
    upright = len(columns) <= 60 and any(len(column) > 4 for column in columns)
    under = 10 + LETTER * min(24, max(map(len, columns))) if upright else 18
    width, height = left + wide * len(columns) + 1, tall * len(rows) + under
    bottom = tall * len(rows) + 13
    parts = [f'<rect x="{left:.1f}" y="0.5" width="{wide * len(columns):.1f}" height="{tall * len(rows):.1f}"'
             ' fill="none" stroke="currentColor" stroke-opacity="0.25"/>']  # fmt: skip
    for i, row in enumerate(rows):
        soft = bool(marked) and i not in marked
        parts.append(label(left - 5, tall * i + 11.5, shortened(row, 28), "end", soft=soft, mono=True))
    needed = 12 if upright else max(map(len, columns), default=1) * LETTER + 7
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * wide >= needed or n == 100)
    for j in range(0, len(columns), step):
        x = left + (j + 0.5) * wide
        if upright:
            name = label(0, 0, shortened(columns[j], 24), "end", soft=True)
            parts.append(f'<g transform="translate({x + 4:.1f} {bottom - 7:.1f}) rotate(-90)">{name}</g>')
        else:
            parts.append(label(x, bottom, columns[j], "middle", soft=True))
    parts.append(label(left - 5, bottom, across.replace("_", " "), "end", soft=True))
    parts += _cells(values, left, wide, tall, limit, caption)
    return picture(width, height, parts, f"heat map, {across} from left to right")


def _cells(
    values: np.ndarray, left: float, wide: float, tall: float, limit: float, caption: Callable[[int, int], str]
) -> list[str]:
    """One rectangle per cell where each has a tooltip; else one shape per shade, so that the size stays bounded."""
    if values.size <= MOST_TOOLTIPS:
        return [
            f'<rect x="{left + j * wide:.1f}" y="{tall * i + 0.5:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}"'
            f"{_shade(float(values[i, j]), limit)}><title>{escaped(caption(i, j))}</title></rect>"
            for i, j in np.ndindex(*values.shape)
        ]
    shapes: dict[str, list[str]] = {}
    for i, j in np.ndindex(*values.shape):
        shape = f"M{left + j * wide:.1f} {tall * i:.0f}h{wide:.1f}v{tall:.0f}h-{wide:.1f}z"
        shapes.setdefault(_shade(float(values[i, j]), limit), []).append(shape)
    return [f'<path d="{"".join(shape)}"{shade}/>' for shade, shape in shapes.items() if 'opacity="0"' not in shade]


def _shade(value: float, limit: float) -> str:
    """The colours of a cell as attributes; what is missing is an empty outline."""
    if math.isnan(value):
        return ' fill="none" stroke="currentColor" stroke-opacity="0.28" stroke-dasharray="1 2"'
    share = round(SHADES * min(1.0, abs(value) / limit)) / SHADES
    return f' fill="{HOT if value >= 0 else COLD}" fill-opacity="{share:g}"'


def ramp(unit: str, limit: float, *, signed: bool) -> str:
    """The scale of a unit, from zero where nothing is below it."""
    steps = range(-20 if signed else 0, 21)
    parts = [box((i - steps[0]) * 5, 0, 5, 11, i, abs(i) / 20) for i in steps]
    width = 5 * len(steps)
    frame = f'<rect x="0" y="0" width="{width}" height="11" fill="none" stroke="currentColor" stroke-opacity="0.3"/>'
    low, high = (f"−{limit:.3g}", f"+{limit:.3g}") if signed else ("0", f"{limit:.3g}")
    scale = picture(width + 1, 11, [*parts, frame], f"from {low} to {high}")
    scale = scale.replace("display:block", "display:inline-block;vertical-align:-1px;margin:0 6px")
    return f'<span style="white-space:nowrap;margin-right:26px">{low}{scale}{high} {escaped(unit)}</span>'


def figure(heading: str, name: str, picture: str, notes: Sequence[str] = (), table: str = "", meaning: str = "") -> str:
    """A picture with its heading, its notes, and a table beside it."""
    beside = f' <code style="opacity:0.62;background:none">{escaped(name)}</code>' if name and name != heading else ""
    about = f' title="{escaped(meaning)}"' if meaning else ""
    footer = f'<div style="opacity:0.62">{escaped("; ".join(notes))}</div>' if notes else ""
    return (
        f'<div style="margin:0 28px 12px 0;max-width:100%"><div{about} style="margin-bottom:3px">'
        f'<b>{escaped(heading)}</b>{beside}</div><div style="display:flex;flex-wrap:wrap;gap:0 18px">'
        f'<div style="max-width:100%">{picture}{footer}</div><div>{table}</div></div></div>'
    )


def rows(pairs: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """A table of texts, the first column left and the others right; nothing where there is no row."""
    if not pairs:
        return ""
    cell = "padding:0 10px 0 0;border:0;background:none;line-height:1.45;color:inherit"
    line = '<tr style="background:none;border:0">'

    def cells(texts: Sequence[str], kind: str) -> str:
        sides = ["left", *["right"] * (len(texts) - 1)]
        look = "opacity:0.62;font-weight:400;" if kind == "th" else ""
        return "".join(
            f'<{kind} style="{look}{cell};text-align:{side}">{escaped(text)}</{kind}>'
            for text, side in zip(texts, sides, strict=True)
        )

    head = f"{line}{cells(heads, 'th')}</tr>" if heads else ""
    body = "".join(f"{line}{cells(pair, 'td')}</tr>" for pair in pairs)
    return f'<table style="border-collapse:collapse;border:0;margin:2px 0;font-size:12px">{head}{body}</table>'


def bars(
    names: Sequence[str], values: Sequence[float], controls: Sequence[float] | None, caption: Sequence[str], name: str
) -> str:
    """One bar per name, from a common zero; a tick where its control stands."""
    known = [v for v in (*values, *(controls or ())) if not math.isnan(v)]
    low, high = min([0.0, *known]), max([0.0, *known])
    span = (high - low) or 1.0
    letters = min(30, max((len(n) for n in names), default=0))
    left, room, tall = letters * LETTER + 8, 260.0, 15.0
    x = lambda value: left + (value - low) / span * room  # noqa: E731
    parts: list[str] = []
    for i, (each, value) in enumerate(zip(names, values, strict=True)):
        parts.append(label(left - 5, tall * i + 11.5, shortened(each, 30), "end", mono=True))
        if not math.isnan(value):
            parts.append(
                box(min(x(0), x(value)), tall * i + 2, abs(x(value) - x(0)), tall - 4, value, 0.85, caption[i])
            )
        if controls is not None and not math.isnan(controls[i]):
            parts.append(
                f'<path d="M{x(controls[i]):.1f} {tall * i + 1:.0f}v{tall - 2:.0f}" stroke="currentColor"'
                ' stroke-width="1.5" stroke-dasharray="2 1.5"/>'
            )
        parts.append(label(left + room + 8, tall * i + 11.5, caption[i]))
    parts.append(f'<path d="M{x(0):.1f} 0V{tall * len(names):.0f}" stroke="currentColor" stroke-opacity="0.4"/>')
    width = left + room + 8 + max((len(t) for t in caption), default=0) * LETTER
    return picture(width, tall * len(names) + 1, parts, name)


def line(
    values: np.ndarray,
    low: np.ndarray | None,
    high: np.ndarray | None,
    control: np.ndarray | None,
    places: Sequence[str],
    axis: str,
    caption: Sequence[str],
) -> list[str]:
    """A line over places with its interval as a band and its control dashed, `LINE` wide and high."""
    width, height = LINE
    left, top, bottom, n = 50.0, 8.0, height - 24, len(places)
    held = [x for x in (values, low, high, control) if x is not None]
    known = np.concatenate([*(x[np.isfinite(x)] for x in held), np.zeros(1)])
    least, most = float(known.min()), float(known.max())
    xs = [left + (i / (n - 1) if n > 1 else 0.5) * (width - left - 10) for i in range(n)]
    y = lambda value: bottom - (value - least) / ((most - least) or 1.0) * (bottom - top)  # noqa: E731
    parts = [
        f'<path d="M{left:.0f} {y(at):.1f}H{width - 8:.0f}" stroke="currentColor" stroke-opacity="0.2"/>'
        + label(left - 6, y(at) + 4, f"{at:.3g}", "end", soft=True)
        for at in dict.fromkeys((least, 0.0, most))
        if at in (least, most) or min(at - least, most - at) > 0.1 * (most - least)
    ]
    step = max(1, math.ceil(n / 12))
    parts += [label(xs[i], height - 6, places[i], "middle", soft=True) for i in range(0, n, step)]
    parts.append(label(left - 12, height - 6, axis, "end", soft=True))
    if low is not None and high is not None:
        ends = [i for i in range(n) if np.isfinite(low[i]) and np.isfinite(high[i])]
        there = [f"{xs[i]:.1f} {y(high[i]):.1f}" for i in ends] + [f"{xs[i]:.1f} {y(low[i]):.1f}" for i in ends[::-1]]
        parts += [f'<path d="M{"L".join(there)}Z" fill="{HOT}" fill-opacity="0.2"/>'] if ends else []
    if control is not None:
        dashed = 'stroke="currentColor" stroke-opacity="0.6" stroke-dasharray="4 3"'
        parts.append(_through(xs, control, y, dashed))
    parts.append(_through(xs, values, y, f'stroke="{HOT}" stroke-width="1.8"'))
    return parts + [
        f'<circle cx="{xs[i]:.1f}" cy="{y(values[i]):.1f}" r="2.6" fill="{HOT}">'
        f"<title>{escaped(caption[i])}</title></circle>"
        for i in range(min(n, MOST_TOOLTIPS))
        if np.isfinite(values[i])
    ]


def _through(xs: Sequence[float], values: np.ndarray, y: Callable[[float], float], look: str) -> str:
    """A line through the places that were measured, broken where one was not."""
    pen, path = "M", ""
    for x, value in zip(xs, values.tolist(), strict=True):
        path += "" if math.isnan(value) else f"{pen}{x:.1f} {y(value):.1f}"
        pen = "M" if math.isnan(value) else "L"
    return f'<path d="{path}" fill="none" {look}/>'
