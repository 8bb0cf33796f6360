"""A result as one page: a single HTML file with its script, style and values inside.

It opens from disk, asks no network for anything, and its own content policy forbids it to: only the one script and the
one style whose hashes stand in its head may run. The values are JSON without `<`, so no prompt can become markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from microtome.errors import DataError, error
from microtome.files import atomic
from microtome.view._canvas import Canvas
from microtome.view._dataset import (
    metric_of,
    places_marked,
    prompts_of,
    reading_of,
    title_of,
    tokens_of,
    without_batch,
)
from microtome.view._facts import fact
from microtome.view._forms import forms
from microtome.view._page_data import literal
from microtome.view._page_values import rounded

if TYPE_CHECKING:
    import xarray as xr

SCRIPTS, STYLES = (
    ("dom.js", "save.js", "chart.js", "graph.js", "sections.js", "page.js"),
    ("atlas.css", "page.css", "graph.css"),
)

SHOWN = ("method", "reading", "metric", "clean_ids", "corrupt_ids", "sites", "parts", "sum_of", "graph")
"""Attributes that the page says elsewhere."""


def write_page(path: Path, data: xr.Dataset, *, title: str | None = None) -> Path:
    """Write a result as one HTML page that opens from disk.

    Every variable has the section that its axes call for: a map with one tooltip per cell and a table of the strongest
    cells, a line over layers, the strongest neurons with their distribution, tokens in cells, parts with their sum. It
    is written beside its place and renamed, so that it is there whole or not at all.

    Args:
        path: the file to write; what stands there is replaced.
        data: any result; a batch of one is dropped.
        title: the heading; the method and its answer by default.

    Returns:
        The path.

    Raises:
        DataError: no variable of the dataset can be drawn.
        OutputError: the file cannot be written.
    """
    page = page_text(data, title=title)
    with atomic(Path(path).resolve()) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def page_text(data: xr.Dataset, *, title: str | None = None) -> str:
    """The text of that page."""
    static = files("microtome.view") / "static"
    script, style = ("".join((static / n).read_text(encoding="utf-8") for n in names) for names in (SCRIPTS, STYLES))
    values = page_values(data)
    values["title"] = title or values["title"]
    return Template((static / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(_one_line(values["title"])),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=literal(values),
    )


def page_values(data: xr.Dataset) -> dict[str, Any]:
    """What the page shows, as plain values.

    Raises:
        DataError: no variable of the dataset can be drawn.
    """
    data = without_batch(data)
    found = forms(data)
    if not found.shown:
        got = "; ".join(found.not_drawn) or "no variable"
        raise error(
            DataError, "there is nothing to draw on a page", got=got, allowed="numbers over layers, positions or heads"
        )
    canvas = Canvas(tokens_of(data), found.limits, tuple(places_marked(data)))
    sections = [form.section(canvas) for form in found.shown]
    return {
        "title": title_of(data),
        "lede": reading_of(data),
        "metric": metric_of(data),
        "prompts": [
            {"role": role, "tokens": t, "value": None if value is None else rounded(value)}
            for role, t, value in prompts_of(data)
        ],
        "marked": places_marked(data),
        "limits": {
            scale: {"most": rounded(limit), "signed": scale in found.signed} for scale, limit in found.limits.items()
        },
        "maps": [section for section in sections if section["kind"] == "map"],
        "sections": [section for section in sections if section["kind"] != "map"],
        "not_drawn": found.not_drawn,
        "facts": [fact(str(k), v) for k, v in data.attrs.items() if k not in SHOWN],
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
