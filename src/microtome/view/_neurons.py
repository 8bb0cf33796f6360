"""A variable over (layer, neuron): its strongest neurons, and how its values are distributed in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from microtome.shown import shown
from microtome.view import _svg
from microtome.view._dataset import beside, companions, labels, numbers, title, unit
from microtome.view._page_values import rounded, rounded_row
from microtome.view._text import coloured, histogram, interval, plain_table, printable, signed, unsigned

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

BINS, LISTED, LEAST, FIGURE = 24, 100, 10, 10
"""Bins of a distribution, neurons in the table of a page, and the least that a terminal and a notebook list."""


@shown
@dataclass(frozen=True, eq=False)
class NeuronMap:
    """The values of all neurons.

    Attributes:
        name, title, unit, meaning: of the variable.
        layers, neurons: their names.
        values: [layer, neuron], float64; NaN where nothing was measured.
        low, high: the ends of the 95 % interval, like `values`; none where there is none.
        beside: what is shown beside each value: exact measurements, the control, p-values.
    """

    name: str
    title: str
    unit: str
    meaning: str
    layers: tuple[str, ...]
    neurons: tuple[str, ...]
    values: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    beside: Mapping[str, np.ndarray]
    kind: Literal["neurons"] = "neurons"

    @property
    def names(self) -> tuple[str, ...]:
        """The variable."""
        return (self.name,)

    def strongest(self, most: int) -> list[tuple[int, int]]:
        """(layer, neuron) by place, of the largest values of either sign; what is missing or zero is left out."""
        flat = np.nan_to_num(np.abs(self.values)).reshape(-1)
        order = np.argsort(-flat, kind="stable")[:most]
        return [(int(i) // len(self.neurons), int(i) % len(self.neurons)) for i in order if flat[i] > 0]

    def distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """The edges of bins over all values, and [layer, bin] how many neurons lie in each."""
        known = self.values[np.isfinite(self.values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
        counts = [np.histogram(row[np.isfinite(row)], bins=edges)[0] for row in self.values]
        return edges, np.stack(counts)

    def quantiles(self) -> np.ndarray:
        """[layer, 3] Smallest, median and largest of each layer; NaN where nothing was measured."""
        found = [
            np.quantile(x, (0, 0.5, 1)) if (x := row[np.isfinite(row)]).size else [np.nan] * 3 for row in self.values
        ]
        return np.asarray(found)

    def _place(self, layer: int, neuron: int) -> str:
        return f"L{self.layers[layer]}N{self.neurons[neuron]}"

    def _interval(self, layer: int, neuron: int) -> str:
        if self.low is None or self.high is None:
            return ""
        return interval(float(self.low[layer, neuron]), float(self.high[layer, neuron]))

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """The strongest neurons beside one line per layer with its distribution."""
        name = "" if self.title == self.name else f"  {printable(self.name)}"
        head = Text.assemble((printable(self.title), "bold"), (f"{name}  {printable(self.unit)}".rstrip(), "dim"))
        more = self.beside
        listed = plain_table("neuron", "", *more)
        for column in listed.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for place in self.strongest(max(canvas.top, LEAST)):
            caption = coloured(float(self.values[place])).append(self._interval(*place), "dim")
            listed.add_row(self._place(*place), caption, *(coloured(float(of[place])) for of in more.values()))
        edges, counts = self.distribution()
        caption = f"{unsigned(float(edges[0]))} to {unsigned(float(edges[-1]))}"
        spread = plain_table("layer", "least", "median", "most", caption)
        for column in spread.columns[:4]:
            column.justify, column.no_wrap = "right", True
        for layer, (row, ends) in enumerate(zip(counts.tolist(), self.quantiles().tolist(), strict=True)):
            spread.add_row(self.layers[layer], *(unsigned(x) for x in ends), Text(histogram(row), "blue"))
        return [head, Columns([listed, Group(spread)], padding=(0, 4)), Text()]

    def figure(self, canvas: Canvas) -> str:
        """How many neurons of each layer lie where, and the strongest of them."""
        edges, counts = self.distribution()
        share = np.sqrt(counts / max(1, int(counts.max()))).T[::-1]
        names = [f"{unsigned(float(a))}" for a in edges[:-1]][::-1]
        picture = _svg.heat(
            share, [name if i % 3 == 2 else "" for i, name in enumerate(names)], list(self.layers), "layer", 1.0, [],
            lambda i, j: f"layer {self.layers[j]}: {counts[j, BINS - 1 - i]:,} neurons from {names[i]}",
        )  # fmt: skip
        heads = ["neuron", self.unit or "value", *self.beside]
        best = [
            [self._place(*p), signed(float(self.values[p])) + self._interval(*p)]
            + [signed(float(of[p])) for of in self.beside.values()]
            for p in self.strongest(max(canvas.top, FIGURE))
        ]
        notes = ["how many neurons have which value, by layer"]
        return _svg.figure(self.title, self.name, picture, notes, _svg.rows(best, heads), self.meaning)

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """Distribution and strongest neurons as plain values."""
        edges, counts = self.distribution()
        order = (self.values, self.low, self.high, *self.beside.values())
        best = [
            [self.layers[p[0]], self.neurons[p[1]], *(None if of is None else rounded(float(of[p])) for of in order)]
            for p in self.strongest(LISTED)
        ]
        return {
            "kind": self.kind, "name": self.name, "title": self.title, "unit": self.unit, "meaning": self.meaning,
            "layers": self.layers, "size": self.values.size, "edges": rounded_row(edges), "counts": counts.tolist(),
            "strongest": best, "beside": list(self.beside),
        }  # fmt: skip


def neuron_map(data: xr.Dataset, name: str) -> NeuronMap:
    """The values of a variable over layers and neurons, whichever comes first."""
    turned = str(data[name].dims[0]) != "layer"
    layer, neuron = (str(d) for d in (reversed(data[name].dims) if turned else data[name].dims))

    def turn(found: np.ndarray | None) -> np.ndarray | None:
        return found.T if turned and found is not None else found

    held = numbers(data, name)
    low, high = turn(beside(data, name, "_lo")), turn(beside(data, name, "_hi"))
    more = {key: x.T if turned else x for key, x in companions(data, name).items()}
    return NeuronMap(
        name, title(data, name), unit(data, name), str(data[name].attrs.get("meaning", "")), labels(data, layer),
        labels(data, neuron), held.T if turned else held, low, high, more,
    )  # fmt: skip
