"""Every node and every edge of the graph, measured exactly.

Formula:  node: effect(u) = m(base, u's output taken from the other run at all positions) - m(base);
          edge: effect(u -> v) = m(base, v alone reading the stream plus what u writes in the other run minus what it
          writes in the base run) - m(base).
          Noising starts at the clean prompt and takes from the corrupt one, denoising the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.edit import Patch
from microtome.errors import EditError, PromptError, error
from microtome.explain._answers import answer_metric
from microtome.explain._graph import Graph, graph
from microtome.explain._pairs import aligned, require_effect_on_metric
from microtome.explain._patching import DIRECTIONS, refuse_unknown
from microtome.metric import Metric
from microtome.model import Model
from microtome.run import Prompt, Run
from microtome.sweep import Edge, SweepPlan, SweepResult

if TYPE_CHECKING:
    import xarray as xr

TOGETHER = 4096
"""Edges of how many are held in one sweep; what a stopped measurement loses at most."""
WRITTEN = ("embed", "*.attn.z", "*.mlp_out")
Progress = Callable[[int, int], None]


def node_effects(
    model: Model,
    clean: Prompt,
    corrupt: Prompt | Run,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    metric: Metric | None = None,
    direction: str = "noise",
    budget: int | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """What every part of the model is worth: the embedding, each head and each MLP taken from the other run.

    Formula:  see the head of this file.
    Source:   interchange of activations, as in Wang et al., "Interpretability in the Wild", 2022 (arXiv 2211.00593).
              Departs: none.
    Cost:     two forwards and one sweep of 1 + L (H + 1) cells.
    Check:    the embedding's effect is the whole gap; tests/laws/test_edges.py.

    Args:
        model: an open model whose stream is a sum over its parts.
        clean: the prompt with the answer.
        corrupt: another of the same number of tokens, or a run that captured ``embed``, ``*.attn.z`` and ``*.mlp_out``.
        answer: the clean prompt's answer, one token.
        foil: the corrupt prompt's answer; without it the answer's log-probability is read.
        metric: what to read instead.
        direction: "noise" starts at the clean prompt, "denoise" at the corrupt one, which must then be a prompt.
        budget: bytes that one walk may hold.
        progress: called with (done, all) cells.
        on_plan: called with the plan of the sweep, before its first cell.

    Returns:
        Dataset: `effect` over (sender), in units of the metric, and `base`, the metric before any change. A negative
        effect under noising means that the part's clean value raises the metric. NaN where it was stopped.

    Raises:
        PromptError: the prompts do not align, the run has several rows, or the answer is not one token.
        SiteError: the stream of the model is not a sum over its parts, or the metric reads only what comes before the
            prompts differ.
        EditError: there is no such direction, or a run is given where "denoise" would start.
        BudgetError: not even one cell fits.
    """
    parts = graph(model)
    metric = answer_metric(model, answer, foil) if metric is None else metric
    start, source = _start_and_source(model, clean, corrupt, direction, metric)
    cells = [Patch(sender, source=source) for sender in parts.senders]
    if on_plan is not None:
        on_plan(model.sweep(start, cells, metric, budget=budget).plan)
    swept = model.sweep(start, cells, metric, budget=budget).run(progress)
    return _labelled(model, swept.effects, {"sender": parts.senders}, swept.base, "node effects", direction)


def edge_effects(
    model: Model,
    clean: Prompt,
    corrupt: Prompt | Run,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    metric: Metric | None = None,
    direction: str = "noise",
    embeddings: Mapping[str, Tensor] | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """What every edge of the model is worth: each of its parts as read by each head's q, k and v, each MLP, the logits.

    Formula:  see the head of this file.
    Source:   Conmy et al., "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2023 (arXiv
              2304.14997). Departs: every edge is measured alone; none is removed for good.
    Cost:     two forwards a layer, its attention three times a sender and its MLP once, and a cell an edge; 123,211
              edges of 30 layers of 9 heads cost as much as some 42,000 forwards.
    Check:    equal to plain hooks on an ungrouped copy of the model; tests/laws/test_edges.py.

    Args:
        model: an open model whose stream is a sum over its parts.
        clean: the prompt with the answer.
        corrupt: as for `node_effects`, and so are `answer`, `foil`, `metric` and `direction`.
        answer: one token.
        foil: one token.
        metric: what to read instead.
        direction: where to start.
        embeddings: senders in place of `embed`: by name, what each part of the embedding changes [pos, d_model], such
            as tokens and positions apart.
        budget: bytes that one walk may hold, with the edges of some layers.
        progress: called with (done, all) edges.
        on_plan: called with the plan of each layer's sweep before it.

    Returns:
        Dataset: `effect` over (sender, receiver), in units of the metric, NaN where there is no edge or where it was
        stopped; and `base`, the metric before any change.

    Raises:
        PromptError: the prompts do not align, the run has several rows, or the answer is not one token.
        SiteError: the stream of the model is not a sum over its parts, or the metric reads only what comes before the
            prompts differ.
        EditError: there is no such direction, or a run is given where "denoise" would start.
        BudgetError: not even one edge fits.
    """
    parts = graph(model)
    metric = answer_metric(model, answer, foil) if metric is None else metric
    start, source = _start_and_source(model, clean, corrupt, direction, metric)
    table = _Table(parts, source, embeddings)
    effects = torch.full((len(table.names), len(parts.receivers)), torch.nan, dtype=torch.float64)
    base = torch.full((1,), torch.nan)
    done, everything = 0, table.n_edges
    for columns in _by_layer(parts):
        places, edges = table.edges(columns)
        if on_plan is not None:
            on_plan(model.sweep(start, edges, metric, budget=budget).plan)
        report = None if progress is None else _from(progress, done, everything)
        swept: SweepResult = model.sweep(start, edges, metric, budget=budget).run(report)
        effects[places[:, 0], places[:, 1]] = swept.effects.double()
        base, done = swept.base, done + swept.done
        if swept.done < len(edges):  # stopped
            break
    axes = {"sender": table.names, "receiver": parts.receivers}
    found = _labelled(model, effects, axes, base, "edge effects", direction)
    return found.assign_attrs(n_edges=everything, measured=done)


def _from(progress: Progress, before: int, everything: int) -> Progress:
    """The progress of one part, told as that of the whole."""
    return lambda done, part: progress(before + done, everything)


class _Table:
    """The edges of a graph with their sources, the embedding apart where it is given apart."""

    def __init__(self, parts: Graph, source: Run, embeddings: Mapping[str, Tensor] | None) -> None:
        self.parts, self.source, self.embeddings = parts, source, dict(embeddings or {})
        first = list(self.embeddings) or ["embed"]
        taken = [name for name in first if name in parts.senders[1:]]
        if taken:
            raise error(
                EditError, "a part of the embedding is called like another sender", got=taken[0], do="rename it"
            )
        self.names = (*first, *parts.senders[1:])
        self.mask = torch.cat([parts.mask[:1].expand(len(first), -1), parts.mask[1:]])

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    def edges(self, columns: Sequence[int]) -> tuple[Tensor, list[Edge]]:
        """Places [edge, 2] in the table, and the edges into some receivers."""
        chosen = torch.zeros_like(self.mask)
        chosen[:, list(columns)] = self.mask[:, list(columns)]
        places = chosen.nonzero()
        return places, [self._edge(self.names[u], self.parts.receivers[v]) for u, v in places.tolist()]

    def _edge(self, sender: str, receiver: str) -> Edge:
        if sender in self.embeddings:
            return Edge("embed", receiver, change=self.embeddings[sender])
        return Edge(sender, receiver, source=self.source)


def _by_layer(parts: Graph) -> list[list[int]]:
    """The columns of the receivers, those of one layer together, and layers together while they have few edges."""
    layers: dict[str, list[int]] = {}
    for column, receiver in enumerate(parts.receivers):
        layers.setdefault(receiver.partition(".")[0], []).append(column)
    groups: list[list[int]] = [[]]
    for columns in layers.values():
        if int(parts.mask[:, groups[-1] + columns].sum()) > TOGETHER and groups[-1]:
            groups.append([])
        groups[-1] += columns
    return groups


def _start_and_source(
    model: Model, clean: Prompt, corrupt: Prompt | Run, direction: str, metric: Metric
) -> tuple[Tensor, Run]:
    """The prompt that cells change, and the run that they take from."""
    refuse_unknown("direction", direction, DIRECTIONS)
    if isinstance(corrupt, Run):
        return _beside(model, clean, corrupt, direction), corrupt
    tokens = aligned(model, clean, corrupt)
    require_effect_on_metric(model, metric, tokens)
    start, other = (tokens[:1], tokens[1:]) if direction == "noise" else (tokens[1:], tokens[:1])
    return start, model.run(other, capture=WRITTEN, logits=False)


def _beside(model: Model, clean: Prompt, source: Run, direction: str) -> Tensor:
    """The clean prompt, where a run is there to take from."""
    if direction != "noise":
        raise error(
            EditError, "a run that values are taken from cannot be where they are put", got=f'direction="{direction}"',
            allowed="noise", do="give the corrupt prompt instead of its run, or exchange prompt and run",
        )  # fmt: skip
    tokens = model.to_tokens(clean)
    if (rows := (len(tokens), len(source.tokens))) != (1, 1):
        raise error(
            PromptError, "one prompt takes from a run of one row", got=f"{rows[0]} prompts and a run of {rows[1]} rows",
            allowed="one each", do="run the corrupt prompt alone",
        )  # fmt: skip
    return tokens


def _labelled(
    model: Model, effects: Tensor, axes: Mapping[str, Sequence[str]], base: Tensor, method: str, direction: str
) -> xr.Dataset:
    import xarray as xr

    data = xr.Dataset(
        {"effect": (tuple(axes), effects.double().numpy(), {"unit": "that of the metric"}), "base": float(base[0])},
        coords={name: list(labels) for name, labels in axes.items()},
    )
    return data.assign_attrs(model.provenance | {"method": method, "direction": direction})
