"""A result as files for other programs: its figures as one SVG that stands alone, its numbers as CSV."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from microtome.errors import DataError, error
from microtome.view import _svg
from microtome.view._dataset import is_numeric, title_of, unit, without_batch
from microtome.view._forms import forms
from microtome.view._heat_map import HeatMap
from microtome.view._render import canvas_of

if TYPE_CHECKING:
    import xarray as xr

INK, SANS = "#1b1d21", "Helvetica, Arial, sans-serif"
_PICTURE = re.compile(r'<svg [^>]*?width="(\d+)" height="(\d+)" viewBox="([^"]*)"[^>]*>(.*?)</svg>', re.S)


def svg_text(data: xr.Dataset) -> str:
    """The figures of a result as the text of one SVG, one below the other, on white and with nothing to load.

    Each has its title, the name of its variable and, for maps, the ends of its scale.

    Raises:
        DataError: nothing of it is drawn as a figure.
    """
    data = without_batch(data)
    found = forms(data)
    canvas = canvas_of(data, found, 140, 0)
    title = title_of(data)
    parts, y, width = [_line(0, 16, title, 15, bold=True)], 34.0, max(360.0, 9.2 * len(title))
    for form in found.shown:
        picture = _PICTURE.search(form.figure(canvas))
        if picture is None:
            continue
        w, t, box, inside = int(picture[1]), int(picture[2]), picture[3], picture[4]
        name = getattr(form, "title", "") or ", ".join(form.names)
        told = [getattr(form, "unit", "")]
        if isinstance(form, HeatMap):
            limit = canvas.limits[form.scale]
            told.insert(0, f"{f'-{limit:.3g}' if form.scale in found.signed else '0'} to {limit:.3g}")
        caption = ", ".join(filter(None, (name, " ".join(filter(None, told)))))
        parts.append(_line(0, y + 12, caption, 12, bold=False))
        parts.append(f'<svg x="0" y="{y + 20:.0f}" width="{w}" height="{t}" viewBox="{box}">{inside}</svg>')
        y, width = y + 20 + t + 18, max(width, float(w), 6.8 * len(caption))
    if len(parts) == 1:
        do = "save it as .csv or as .html"
        raise error(DataError, "nothing of this is drawn as a figure", got=", ".join(map(str, data)), do=do)
    w, t = math.ceil(width) + 24, math.ceil(y) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{t}" viewBox="0 0 {w} {t}" color="{INK}"'
        f' font-family="{SANS}"><rect width="{w}" height="{t}" fill="#ffffff"/>'
        f'<g transform="translate(12 8)">{"".join(parts)}</g></svg>\n'
    )


def csv_text(data: xr.Dataset) -> str:
    """The numbers of a result as CSV (RFC 4180): one row a place, one column a variable with its unit in the header.

    Single numbers are left out where there are variables with axes.

    Raises:
        DataError: its variables do not all have the same axes, so that they are not one table.
    """
    data = without_batch(data)
    names = [str(name) for name in data if is_numeric(data, str(name))]
    axes = {name: tuple(map(str, data[name].dims)) for name in names}
    names = [name for name in names if axes[name]] or names
    kinds = dict.fromkeys(tuple(sorted(axes[name])) for name in names)
    if len(kinds) != 1:
        got = "; ".join(
            f"{', '.join(n for n in names if tuple(sorted(axes[n])) == kind)} over {', '.join(kind)}" for kind in kinds
        )
        what = "these variables are not one table" if names else "there are no numbers to save"
        do = "save those with the same axes, such as mt.view(result[[name, ...]])"
        raise error(DataError, what, got=got or "none", allowed="variables with the same axes", do=do)
    table = data[names].to_dataframe().reset_index() if axes[names[0]] else data[names].to_pandas().to_frame().T
    heads = {name: f"{name} ({unit(data, name)})" for name in names if unit(data, name) not in ("", "1")}
    return str(table.rename(columns=heads).to_csv(index=False, lineterminator="\r\n"))


def _line(x: float, y: float, text: str, size: int, *, bold: bool) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}"{weight} fill="{INK}">{_svg.escaped(text)}</text>'
