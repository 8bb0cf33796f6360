"""Parts that sum to a whole: the largest with bars, what the others add together, and the sum.

`attrs["parts"]` names the variables whose values sum to `attrs["sum_of"]`. A variable over (layer, head) is a part per
head, one over (layer) a part per layer, and one without axes a part. `X_source` says what each part of X reads from, by
position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.text import Text

from microtome.shown import shown
from microtome.view import _svg
from microtome.view._dataset import numbers, title, unit
from microtome.view._page_values import rounded
from microtome.view._text import bar, plain_table, printable, visible

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

BAR, READS, LISTED, FIGURE = 24, 3, 100, 15
"""Cells of a bar, tokens that a part reads most from, parts in a page, and the most in a notebook."""

MARKS = {"head": "H", "kv_head": "H", "neuron": "N"}


@shown
@dataclass(frozen=True)
class Part:
    """A part, what it adds, and the tokens that it reads most from."""

    name: str
    value: float
    reads: tuple[tuple[str, float], ...] = ()

    @property
    def read_from(self) -> str:
        """The tokens that it reads most from, in words."""
        return ", ".join(f"{visible(word)} {value:+.2f}" for word, value in self.reads)


@shown
@dataclass(frozen=True)
class PartsList:
    """All parts of a whole.

    Attributes:
        names: the variables.
        parts: largest first; those that add nothing are left out.
        unit: of every value.
        sum_of: the variable that they sum to, with its heading and value; none where it was not measured.
    """

    names: tuple[str, ...]
    parts: tuple[Part, ...]
    unit: str
    sum_of: str
    heading: str
    whole: float | None
    kind: Literal["parts"] = "parts"

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """The largest parts with bars, and the sum beside the whole."""
        sources = any(part.reads for part in self.parts)
        table = plain_table("part", printable(self.unit) or "value", "", *(["reads from"] if sources else []))
        table.columns[1].justify = "right"
        most = max((abs(part.value) for part in self.parts), default=1.0)
        for part in self.parts[: canvas.top]:
            drawn = Text(bar(part.value / most, BAR), "blue" if part.value > 0 else "red")
            table.add_row(part.name, f"{part.value:+.3f}", drawn, *([Text(part.read_from)] if sources else []))
        if rest := self.parts[canvas.top :]:
            table.add_row(f"{len(rest):,} more", f"{sum(part.value for part in rest):+.3f}")
        table.add_row("sum", f"{self.total:+.3f}", style="bold")
        caption = [] if self.whole is None else [Text(f"{printable(self.heading)} as measured {self.whole:+.3f}")]
        return [table, *caption, Text()]

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(part.value for part in self.parts)

    def figure(self, canvas: Canvas) -> str:
        """The largest parts as bars."""
        shown = self.parts[: max(canvas.top, FIGURE)]
        rest = self.parts[len(shown) :]
        caption = [f"{p.value:+.3f}" + (f"  from {p.read_from}" if p.reads else "") for p in shown]
        drawn = _svg.bars([p.name for p in shown], [p.value for p in shown], None, caption, "largest parts")
        notes = [f"{len(rest):,} more add {sum(p.value for p in rest):+.3f}"] if rest else []
        notes.append(f"sum {self.total:+.3f} {self.unit}")
        notes += [] if self.whole is None else [f"{self.heading} as measured {self.whole:+.3f}"]
        return _svg.figure("largest parts", "", drawn, notes)

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """The largest parts as plain values."""
        rest = self.parts[LISTED:]
        return {
            "kind": self.kind, "unit": self.unit,
            "parts": [[p.name, rounded(p.value), p.read_from] for p in self.parts[:LISTED]],
            "more": [len(rest), rounded(sum(p.value for p in rest))], "sum": rounded(self.total),
            "heading": self.heading, "whole": None if self.whole is None else rounded(self.whole),
        }  # fmt: skip


def parts_list(data: xr.Dataset) -> PartsList | None:
    """The parts that a dataset names; none where it names none that it holds."""
    names = tuple(str(name) for name in data.attrs["parts"] if str(name) in data)
    if not names:
        return None
    found = [part for name in names for part in _parts(data, name)]
    largest = sorted((part for part in found if part.value), key=lambda part: -abs(part.value))
    sum_of = str(data.attrs.get("sum_of", ""))
    whole = float(data[sum_of]) if sum_of in data and data[sum_of].ndim == 0 else None
    return PartsList(
        names, tuple(largest), unit(data, names[0]), sum_of, title(data, sum_of) if sum_of in data else "", whole
    )


def _parts(data: xr.Dataset, name: str) -> list[Part]:
    """The parts of one variable, in order."""
    dims = [str(dim) for dim in data[name].dims]
    values = np.nan_to_num(numbers(data, name))
    reads = _reads(data, name)
    coordinates = [data[d].values.tolist() if d in data.coords else list(range(data.sizes[d])) for d in dims]
    return [
        Part(_name(title(data, name), dims, [c[i] for c, i in zip(coordinates, place, strict=True)]), float(value),
             () if reads is None else _most(reads[0], reads[1][place]))
        for place, value in np.ndenumerate(values)
    ]  # fmt: skip


def _name(heading: str, dims: Sequence[str], labels: Sequence[object]) -> str:
    """The name of a part by its place: "L3H2", "L3 MLP", "embedding"."""
    named = dict(zip(dims, labels, strict=True))
    layer = f"L{named.pop('layer')}" if "layer" in named else ""
    if not named:
        return f"{layer} {heading}".strip()
    if len(named) == 1 and (mark := MARKS.get(next(iter(named)))):
        return f"{layer}{mark}{next(iter(named.values()))}"
    return f"{layer} {heading} " + " ".join(f"{dim} {label}" for dim, label in named.items())


def _reads(data: xr.Dataset, name: str) -> tuple[list[str], np.ndarray] | None:
    """The tokens that the parts of a variable read from, and how much of each part comes from each."""
    other = f"{name}_source"
    if other not in data or data[other].dims[:-1] != data[name].dims or "source" not in data.coords:
        return None
    return [str(word) for word in data["source"].values], numbers(data, other)


def _most(words: list[str], values: np.ndarray) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-np.abs(values), kind="stable")[:READS]
    return tuple((words[i], float(values[i])) for i in order.tolist())
