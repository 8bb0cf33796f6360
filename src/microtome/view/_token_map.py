"""Text over (layer, pos) or (layer, head), such as the top tokens of a lens: tokens in cells, coloured by `shade`.

Layers stand from the last one down. Where the variable has an axis `rank`, a cell holds one line per rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.cells import cell_len
from rich.style import Style
from rich.table import Table
from rich.text import Text

from microtome.shown import shown
from microtome.view import _svg
from microtome.view._dataset import is_numeric, labels, numbers, title
from microtome.view._page_values import rounded
from microtome.view._text import fitted, printable, shortened, visible

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

WIDEST, NARROWEST, NUMBER = 14, 4, 4  # cells of a token at most and at least, and of " .77"
WEAK, STRONG = (44, 48, 56), (16, 122, 72)  # background of the least and the most
MOST_FIGURE_CELLS, MOST_PAGE_CELLS = 900, 20_000


@shown
@dataclass(frozen=True, eq=False)
class TokenMap:
    """Tokens by layer, and position or head.

    Attributes:
        name, title, meaning: of the variable.
        layers, places: the name of each layer, and of each position or head.
        words: [layer, place, rank].
        shades: like `words`, from 0 to 1; none where no variable colours them.
        values: what the shades stand for, like `words`; none where there are none.
        shade: the heading of the variable that colours them.
        across: "pos" or "head".
    """

    name: str
    title: str
    meaning: str
    layers: tuple[str, ...]
    places: tuple[str, ...]
    words: np.ndarray
    shades: np.ndarray | None
    values: np.ndarray | None
    shade: str
    across: str = "pos"
    kind: Literal["tokens"] = "tokens"

    @property
    def names(self) -> tuple[str, ...]:
        """The variable."""
        return (self.name,)

    def _head(self, canvas: Canvas, place: int) -> str:
        """What stands above a column: the token there, or the head's number."""
        return canvas.token(place) if self.across == "pos" else f"{self.across} {self.places[place]}"

    def _numbered(self) -> int:
        return 0 if self.values is None else NUMBER

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """One row per layer; the last positions that fit are shown, and how many are left out is written below."""
        number = self._numbered()
        heads = [self._head(canvas, i) for i in range(len(self.places))]
        sizes: dict[int, int] = {}
        room = canvas.width - max(len("layer"), *map(len, self.layers))
        for pos in reversed(range(len(self.places))):
            shown = [cell_len(visible(str(w))) for w in self.words[:, pos].reshape(-1)]
            size = min(max(*shown, cell_len(heads[pos]) - number, len(self.places[pos]) - number, NARROWEST), WIDEST)
            if room < size + number + 1 and sizes:
                break
            sizes[pos], room = size, room - size - number - 1
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
        table.add_column("layer", justify="right", no_wrap=True)
        chosen = sorted(sizes)
        for pos in chosen:
            cells = sizes[pos] + number
            at = (f"\n@{self.places[pos]}", "dim") if self.across == "pos" else ""
            head = Text.assemble((fitted(heads[pos], cells), "bold"), at)
            table.add_column(head, no_wrap=True, width=cells)
        for layer in reversed(range(len(self.layers))):
            table.add_row(self.layers[layer], *(self._cell(layer, pos, sizes[pos]) for pos in chosen))
        left = len(self.places) - len(chosen)
        noun = "position" if self.across == "pos" else self.across
        caption = f"{left} earlier {noun if left == 1 else noun + 's'} left out: choose some to see them"
        return [table, *([Text(caption, "dim")] if left else []), Text()]

    def _cell(self, layer: int, pos: int, size: int) -> Text:
        lines: list[Text] = []
        for rank, word in enumerate(self.words[layer, pos]):
            share = 0.0 if self.shades is None else float(self.shades[layer, pos, rank])
            mixed = [round(a + (b - a) * share) for a, b in zip(WEAK, STRONG, strict=True)]
            style = Style(color="white", bgcolor=f"rgb({mixed[0]},{mixed[1]},{mixed[2]})")
            caption = "" if self.values is None else f" {_short(float(self.values[layer, pos, rank]))}"
            lines.append(Text(fitted(visible(str(word)), size) + caption, style=style))
        return Text("\n").join(lines)

    def figure(self, canvas: Canvas) -> str:
        """The first token of each cell, with all of them in its tooltip."""
        every = -(-self.words[..., 0].size // MOST_FIGURE_CELLS)
        shown = list(range(len(self.layers) - 1, -1, -every))
        plain = "border:0;padding:0 5px 0 0;background:none;color:inherit;opacity:0.62;font-weight:400"
        heads = "".join(
            f'<th style="{plain};text-align:left">{_svg.escaped(shortened(self._head(canvas, i), WIDEST))}</th>'
            for i in range(len(self.places))
        )
        rows = "".join(
            f'<tr style="background:none"><th style="{plain};text-align:right">{_svg.escaped(self.layers[layer])}</th>'
            + "".join(self._markup(layer, pos) for pos in range(len(self.places)))
            + "</tr>"
            for layer in shown
        )
        look = f"border-collapse:separate;border-spacing:1px;border:0;font:11px {_svg.MONO};margin:0"
        table = (
            f'<div style="overflow-x:auto"><table style="{look}"><tr style="background:none"><th style="{plain}"></th>'
        )
        notes = [f"every {every}th layer"] if every > 1 else []
        notes += [f"coloured by {self.shade}"] if self.shade else []
        return _svg.figure(self.title, "", f"{table}{heads}</tr>{rows}</table></div>", notes, meaning=self.meaning)

    def _markup(self, layer: int, pos: int) -> str:
        share = 0.0 if self.shades is None else float(self.shades[layer, pos, 0])
        r, g, b = (int(_svg.HOT[i : i + 2], 16) for i in (1, 3, 5))
        cell = f"border:0;padding:0 4px;text-align:left;color:inherit;background:rgba({r},{g},{b},{0.75 * share:.2f})"
        word = shortened(visible(str(self.words[layer, pos, 0])), WIDEST)
        return f'<td title="{_svg.escaped(self._caption(layer, pos))}" style="{cell}">{_svg.escaped(word)}</td>'

    def _caption(self, layer: int, pos: int) -> str:
        """All tokens of a cell in words."""
        cell = [visible(str(word)) for word in self.words[layer, pos]]
        if self.values is None:
            return ", ".join(cell)
        numbers = self.values[layer, pos].tolist()
        return ", ".join(f"{word} {value:.3g}" for word, value in zip(cell, numbers, strict=True))

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """The cells as plain values."""
        every = -(-self.words[..., 0].size // MOST_PAGE_CELLS)
        shown = list(range(len(self.layers) - 1, -1, -every))
        zeros = np.zeros(self.words.shape)
        shades, values = (zeros if of is None else of for of in (self.shades, self.values))

        def cell(layer: int, pos: int) -> list[list[Any]]:
            ranks = range(self.words.shape[2])
            return [
                [
                    str(self.words[layer, pos, r]),
                    rounded(float(values[layer, pos, r])),
                    rounded(float(shades[layer, pos, r])),
                ]
                for r in ranks
            ]

        return {
            "kind": self.kind, "name": self.name, "title": self.title, "meaning": self.meaning, "shade": self.shade,
            "across": self.across, "layers": [self.layers[i] for i in shown], "places": self.places, "every": every,
            "cells": [[cell(layer, pos) for pos in range(len(self.places))] for layer in shown],
        }  # fmt: skip


def _short(value: float) -> str:
    """A share in three characters; ".77"."""
    return "1.0" if value >= 0.995 else f"{value:.2f}"[1:] if value >= 0 else f"{value:.1f}"


def token_map(data: xr.Dataset, name: str) -> TokenMap:
    """The tokens of a text variable over (layer, pos) or (layer, head), with or without rank."""
    ranked = "rank" in data[name].dims
    across = "pos" if "pos" in data[name].dims else "head"
    order = ("layer", across, *(["rank"] if ranked else []))

    def cells(of: np.ndarray) -> np.ndarray:
        return of if ranked else of[..., None]

    words = np.asarray(data[name].transpose(*order).values, dtype=object)
    shade = str(data[name].attrs.get("shade", ""))
    there = shade in data and set(data[shade].dims) == set(order) and is_numeric(data, shade)
    values = cells(numbers(data.transpose(*order, ..., missing_dims="ignore"), shade)) if there else None
    shades = None if values is None else _shares(values, data[shade].attrs.get("range"))
    heading = title(data, shade) if there else ""
    return TokenMap(
        name, printable(title(data, name)), str(data[name].attrs.get("meaning", "")), labels(data, "layer"),
        labels(data, across), cells(words), shades, values, heading, across,
    )  # fmt: skip


def _shares(values: np.ndarray, limits: Any) -> np.ndarray:
    """Values as shares of their range: the one they say, else 0 to the largest; 0 where nothing was measured."""
    low, high = limits if limits is not None else (None, None)
    known = values[np.isfinite(values)]
    low = min(0.0, float(known.min(initial=0.0))) if low is None or np.isinf(low) else low
    high = max(1.0, float(known.max(initial=0.0))) if high is None or np.isinf(high) else high
    return np.clip((np.nan_to_num(values, nan=low) - low) / ((high - low) or 1.0), 0, 1)
