"""A causal result as one page: a single HTML file with its script, style and values inside.

It opens from disk, asks no network for anything, and its own content policy forbids it to: only the one script and the
one style whose hashes stand in its head may run. The values are JSON without `<`, so no prompt can become markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from microtome.files import atomic
from microtome.view._maps import (
    HeatMap,
    checks_of,
    limits_of,
    maps_of,
    metric_of,
    places_marked,
    prompts_of,
    reading_of,
)
from microtome.view._page_data import literal

if TYPE_CHECKING:
    import xarray as xr

SCRIPTS, STYLES = ("dom.js", "patch.js"), ("atlas.css", "patch.css")

DIGITS = 5
"""Significant digits of a value."""

MOST_CELLS = 40_000
"""Cells of a map that is drawn; of a larger one only the strongest are listed, so that the page stays small."""

LISTED = 100
"""Strongest cells of each map in the table."""

SHOWN = ("method", "clean_ids", "corrupt_ids", "sites")
"""Attributes that the page says elsewhere."""


def write_patch_page(path: Path, data: xr.Dataset, *, title: str | None = None) -> Path:
    """Write the heat maps of a causal result as one HTML page that opens from disk.

    The page has a map a variable with a tooltip a cell, a legend of the symmetric scale, a table of the strongest
    cells, and what was run. It is written beside its place and renamed, so that it is there whole or not at all.

    Args:
        path: the file to write; what stands there is replaced.
        data: what `activation_patching`, or another method with a variable a site over (layer, pos), returned.
        title: of the page; made of the method and the answer without it.

    Returns:
        The path.

    Raises:
        DataError: the dataset holds nothing with two axes.
        OutputError: the file cannot be written.
    """
    page = patch_page(data, title=title)
    with atomic(Path(path).resolve()) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def patch_page(data: xr.Dataset, *, title: str | None = None) -> str:
    """The text of that page."""
    static = files("microtome.view") / "static"
    script, style = ("".join((static / n).read_text(encoding="utf-8") for n in names) for names in (SCRIPTS, STYLES))
    values = page_values(data)
    values["title"] = title or values["title"]
    return Template((static / "patch.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(_one_line(values["title"])),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=literal(values),
    )


def page_values(data: xr.Dataset) -> dict[str, Any]:
    """What the page is told, as plain values: all that it shows."""
    maps, attrs = maps_of(data), data.attrs
    limits = limits_of(maps)
    method = str(attrs.get("method", "effects"))
    of = f": {str(attrs['answer']).strip()}" if "answer" in attrs else ""
    of += f" rather than {str(attrs['foil']).strip()}" if "foil" in attrs else ""
    return {
        "title": method[:1].upper() + method[1:] + of,
        "lede": reading_of(data),
        "metric": metric_of(data),
        "prompts": [{"role": role, "tokens": t, "value": _maybe(value)} for role, t, value in prompts_of(data)],
        "marked": places_marked(data),
        "limits": {unit: _rounded(limit) for unit, limit in limits.items()},
        "maps": [_map(one, limits[one.unit]) for one in maps],
        "checks": _checks(checks_of(data)),
        "facts": [(str(k).replace("_", " "), _fact(v)) for k, v in attrs.items() if k not in SHOWN],
    }


def _checks(checks: dict[str, dict[str, float]]) -> list[list[str | float | None]]:
    """The checks as rows, their names first; none where nothing was checked."""
    names = [name.replace("_", " ") for name in next(iter(checks.values()), {})]
    rows = [[site, *(_rounded(value) for value in values.values())] for site, values in checks.items()]
    return [["map", *names], *rows] if rows else []


def _map(one: HeatMap, limit: float) -> dict[str, Any]:
    drawn = one.values.size <= MOST_CELLS
    low, high = one.bounds or (None, None)
    parts = {"values": one.values, "lo": low, "hi": high, "exact": one.exact}
    known = np.abs(one.values[np.isfinite(one.values)])
    own = float(known.max()) if known.size else 0.0
    strongest = [
        [row, column, *(None if of is None else _rounded(of[row, column]) for of in (one.values, low, high, one.exact))]
        for row, column in one.strongest(LISTED if one.listed else 0)
    ]
    return {
        "name": one.name, "title": one.title, "unit": one.unit, "site": _site(one), "size": one.values.size,
        "listed": one.listed,
        "across": one.across, "down": one.down, "columns": one.columns, "rows": one.rows,
        "limit": _rounded(limit), "own": _rounded(own if own > 0 else limit), "strongest": strongest,
        **{key: _values(of) if drawn else None for key, of in parts.items()},
    }  # fmt: skip


def _site(one: HeatMap) -> str | None:
    """The address of a cell, with places for its row and column; none where the map is not one of sites."""
    from microtome.anatomy import SITES

    name = one.name.removesuffix("[head]")
    if one.across != "layer" or name not in SITES:
        return None
    if one.down == "pos":
        return f"{{column}}.{name}@{{row}}"
    return f"{{column}}.{name}[{{row}}]" if one.down == SITES[name].unit else None


def _values(of: np.ndarray | None) -> list[list[float | None]] | None:
    return None if of is None else [[_rounded(value) for value in row] for row in of]


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _maybe(value: float | None) -> float | None:
    return None if value is None else _rounded(value)


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    return f'"{value}"' if isinstance(value, str) and value != value.strip() else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
