"""How many different things a neuron fires at: clusters of the contexts in which it peaks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.method import Batches, Text
from microtome.model import Model
from microtome.stream import TopExamples

APART = 0.25
"""The silhouette from which on clusters count as facets."""

TENTH = 0.1
"""The share of the contexts that the smallest cluster has at least."""

LEAST = 8
"""Contexts below which nothing is clustered."""


def neuron_facets(
    model: Model,
    neurons: Sequence[tuple[int, int]],
    text: Any = None,
    *,
    tokens: int = 20_000,
    length: int = 64,
    rows: int = 16,
    top: int = 48,
    most: int = 4,
) -> xr.Dataset:
    """How many kinds of contexts each neuron peaks in.

    Formula:  of the rows whose largest activation is above half of the largest of all, `top` that are drawn: the input
              of the neuron's MLP at the peak; k-means with 2 .. `most` clusters, `facets` = the number with the largest
              mean silhouette, of those whose clusters all have a tenth of the contexts, if it is 0.25 or more, else 1;
              `silhouette_random` is the largest silhouette of as many tokens drawn from the text.
    Source:   Nguyen, Yosinski and Clune, "Multifaceted Feature Visualization", 2016 (arXiv 1602.03616); Rousseeuw,
              "Silhouettes", 1987. Departs: contexts of a text instead of images that are made; 0.25 is a constant of
              ours, as are the half and the tenth.
    Cost:     two passes over the text; `most` k-means of `top` points per neuron.
    Check:    a planted neuron of either of two tokens has two facets, and a neuron of one token one;
              tests/planted/test_neurons.py.

    Args:
        model: an open model.
        neurons: (layer, neuron) of each.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        tokens: of the text to read.
        length: tokens of a row.
        rows: rows of a batch.
        top: contexts of each neuron.
        most: facets that are tried at most.

    Returns:
        A dataset with axes `unit` (with the coordinates `layer` and `neuron`) and `rank`: `facets`, `silhouette`,
        `silhouette_random` [unit]; `contexts` [unit], how many; `facet` [unit, rank], the cluster of each context
        from 0 on, -1 where there is none; `example_index` and `token` [unit, rank] of its peak, and `context` [unit,
        rank, pos], the tokens of its row up to the peak, at the end of the axis; -1 likewise. With
        fewer than 8 contexts a neuron has NaN facets; a silhouette is NaN where no clusters are large enough.

    Raises:
        ArgumentError: a neuron does not exist.
        DataError: there is too little text.
    """
    by_layer = _by_layer(model, neurons)
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model)
    peaks = _peaks(model, read, neurons, by_layer, top)
    drawn = _drawn(read, top)
    states, words, before = _states(model, read, by_layer, peaks, drawn)
    random = {layer: _clusters(states[layer, None], most)[1] for layer in by_layer}
    made = [_clusters(states[layer, number], most) for number, (layer, _) in enumerate(neurons)]

    def filled(some: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
        return np.array([[*one, *[-1] * (top - len(one))] for one in some])

    every = range(len(neurons))
    values: dict[str, Any] = {
        "facets": [one[0] for one in made], "silhouette": [one[1] for one in made],
        "silhouette_random": [random[layer] for layer, _ in neurons], "contexts": [len(one[2]) for one in made],
        "facet": filled([one[2] for one in made]), "token": filled([words[n] for n in every]),
        "example_index": filled([peaks[n] for n in every]), "context": _padded([before[n] for n in every], top),
    }  # fmt: skip
    variables = {n: (("unit", "rank", "pos")[: np.ndim(x)], np.asarray(x), MEANT[n]) for n, x in values.items()}
    places = {"layer": ("unit", [i for i, _ in neurons]), "neuron": ("unit", [n for _, n in neurons])}
    told = {"method": "neuron_facets", "text": read.source, "seed": current().seed}
    return xr.Dataset(variables, coords=places).assign_attrs(dict(model.provenance) | told)


MEANT: Mapping[str, Mapping[str, str]] = {
    "facets": {"unit": "clusters", "meaning": "clusters of the contexts in which the neuron peaks"},
    "silhouette": {"unit": "1", "meaning": "largest mean silhouette of 2 clusters or more"},
    "silhouette_random": {"unit": "1", "meaning": "the same of tokens drawn from the text"},
    "contexts": {"unit": "rows", "meaning": "rows in which it peaks above 0"},
    "facet": {"unit": "1", "meaning": "cluster of each context"},
    "token": {"unit": "token", "meaning": "token at the peak"},
    "example_index": {"unit": "index", "meaning": "index in the text of the token at the peak"},
    "context": {"unit": "token", "meaning": "tokens up to the peak"},
}


def _by_layer(model: Model, neurons: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """By layer, which of the neurons are in it.

    Raises:
        ArgumentError: one does not exist, or none is named.
    """
    by_layer: dict[int, list[int]] = {}
    for number, (layer, neuron) in enumerate(neurons):
        site = Site("mlp.post", layer)
        if site not in model.anatomy.hook_points or not 0 <= neuron < model.anatomy.size(site, "neuron"):
            raise error(ArgumentError, "no such neuron", got=f"({layer}, {neuron})", do="give (layer, neuron)")
        by_layer.setdefault(layer, []).append(number)
    if not by_layer:
        raise error(ArgumentError, "no neuron is named", do="give neurons=[(layer, neuron), ...]")
    return by_layer


def _peaks(
    model: Model, read: Batches, neurons: Sequence[tuple[int, int]], by_layer: Mapping[int, list[int]], top: int
) -> dict[int, list[int]]:
    """By neuron, the index in the text of peaks above half of the largest, one a row: as many as are wanted, drawn."""
    count = sum(len(batch.tokens) for batch in read.parts)
    held = {layer: TopExamples(len(some), count) for layer, some in by_layer.items()}
    rng = torch.Generator().manual_seed(current().seed)
    for batch in read.parts:

        def see(site: Site, x: Tensor, batch: Any = batch) -> None:
            assert site.layer is not None
            units = [neurons[number][1] for number in by_layer[site.layer]]
            held[site.layer].update(x[..., units], batch.start, batch.text)

        model.run(batch.tokens, observe={f"{','.join(map(str, by_layer))}.mlp.post": see}, logits=False)
    found: dict[int, list[int]] = {}
    for layer, some in by_layer.items():
        best = held[layer].result()
        for row, number in enumerate(some):
            high = best.index[row][(best.values[row] > 0) & (best.values[row] > best.values[row, 0] / 2)]
            found[number] = high[torch.randperm(len(high), generator=rng)[:top]].tolist()
    return found


def _drawn(read: Batches, count: int) -> list[int]:
    """The indices of tokens drawn from the text."""
    every = torch.cat([
        (batch.start[:, None] + torch.arange(batch.tokens.shape[1]))[batch.text if batch.text is not None else ...]
        .flatten() for batch in read.parts
    ])  # fmt: skip
    rng = torch.Generator().manual_seed(current().seed)
    return sorted(every[torch.randperm(len(every), generator=rng)[:count]].tolist())


def _states(
    model: Model, read: Batches, by_layer: Mapping[int, list[int]], peaks: Mapping[int, list[int]], drawn: list[int]
) -> tuple[dict[tuple[int, int | None], npt.NDArray[np.float64]], dict[int, list[int]], dict[int, list[list[int]]]]:
    """By layer and neuron (None: what was drawn), the inputs of its MLP where it peaks; by neuron, the tokens there.

    And those up to there, of the same row.
    """
    wanted: dict[tuple[int, int | None], list[int]] = {(layer, None): drawn for layer in by_layer}
    wanted |= {(layer, number): peaks[number] for layer, some in by_layer.items() for number in some}
    states: dict[tuple[int, int | None], dict[int, Tensor]] = {key: {} for key in wanted}
    words: dict[int, list[int]] = {}
    for batch in read.parts:
        index = batch.start[:, None] + torch.arange(batch.tokens.shape[1])
        inside = {int(i): (row, pos) for row, line in enumerate(index.tolist()) for pos, i in enumerate(line)}
        peaked = {i for places in peaks.values() for i in places} & inside.keys()
        words |= {i: batch.tokens[inside[i][0], : inside[i][1] + 1].tolist() for i in peaked}

        def see(site: Site, x: Tensor, inside: Any = inside) -> None:
            for (layer, number), places in wanted.items():
                if layer == site.layer:
                    states[layer, number] |= {i: x[inside[i]].double().cpu() for i in places if i in inside}

        model.run(batch.tokens, observe={f"{','.join(map(str, by_layer))}.mlp.in": see}, logits=False)
    stacked = {
        key: torch.stack([states[key][i] for i in places]).numpy() if places else np.zeros((0, 1))
        for key, places in wanted.items()
    }
    before = {number: [words[i] for i in places] for number, places in peaks.items()}
    return stacked, {number: [row[-1] for row in rows] for number, rows in before.items()}, before


def _padded(some: Sequence[Sequence[Sequence[int]]], top: int) -> npt.NDArray[np.int64]:
    """[neuron, rank, pos] the tokens of contexts, at the end of the axis; -1 where there are none."""
    longest = max((len(row) for rows in some for row in rows), default=1)
    found = np.full((len(some), top, longest), -1, dtype=np.int64)
    for n, rows in enumerate(some):
        for rank, row in enumerate(rows):
            found[n, rank, longest - len(row) :] = row
    return found


def _clusters(x: npt.NDArray[np.float64], most: int) -> tuple[float, float, list[int]]:
    """How many clusters points [point, d_model] make, their mean silhouette, and the cluster of each point."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_score

    if len(x) < LEAST:
        return np.nan, np.nan, [0] * len(x)
    means: Any = KMeans
    best: tuple[float, float, list[int]] = (1.0, -1.0, [0] * len(x))
    for k in range(2, min(most, len(x) - 1) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of points that are equal
            labels = means(k, n_init=4, random_state=current().seed).fit_predict(x)
        if np.bincount(labels, minlength=k).min() < TENTH * len(x):
            continue
        score = float(silhouette_score(x, labels))
        if score > best[1]:
            best = (float(k), score, [int(n) for n in labels])
    if best[1] >= APART:
        return best
    return 1.0, best[1] if best[1] > -1.0 else np.nan, [0] * len(x)  # NaN: no clusters of a tenth each
