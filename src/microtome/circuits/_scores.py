"""Circuits from scores of edges: the largest ones, or the largest that lead on to the logits.

Formula:  top     the n edges of the largest |score|;
          greedy  from the logits back: of all edges into nodes that are in, the one of the largest |score| comes in,
                  and its sender with it, n times;
          then edges that lead nowhere go, and, where edges are resampled, those that no way leads to from the
          embedding.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.circuits._circuit import Circuit, node_of, of_mask, required
from microtome.errors import ArgumentError, DataError, error
from microtome.explain import graph
from microtome.model import Model

RULES = ("top", "greedy")
NAMES = ("score", "effect", "mean", "eap", "eap_ig")
"""Variables over (sender, receiver) that a dataset of scores may have."""


def from_scores(
    model: Model,
    scores: xr.Dataset | xr.DataArray | Float[Tensor, "sender receiver"],
    edges: int | float,
    *,
    rule: str = "top",
    prune: bool = True,
    **attrs: Any,
) -> Circuit:
    """The circuit of the edges with the largest scores, whatever gave them.

    Source:   Hanna, Pezzelle, Belinkov, "Have Faith in Faithfulness", 2024 (arXiv 2403.17806).
    Check:    of random scores by brute force; tests/laws/test_circuits.py.

    Args:
        model: whose edges they are.
        scores: [sender, receiver] in the order of `mt.explain.graph`; or a dataset or array with these axes, such as
            `mt.explain.edge_effects` gives, whose labels may be in any order. Only their size counts. NaN is no edge.
        edges: how many; a share of all where it is below 1.
        rule: "top" or "greedy", see the head of this file.
        prune: leave out what changes nothing, see `Circuit.pruned`; fewer edges may be left then.
        attrs: what the circuit records; of `ablation` what "mean" and "zero" leave in.

    Returns:
        A `Circuit`.

    Raises:
        DataError: the scores are not of this graph.
        ArgumentError: the rule is unknown, there are not as many edges, or none of them leads to the logits.
    """
    if rule not in RULES:
        raise error(ArgumentError, "rule must be top or greedy", got=repr(rule), do="choose one")
    values, parts = _values(model, scores)
    empty = of_mask(model, torch.zeros(values.shape, dtype=torch.bool), values, parts, **attrs)
    number = number_of(edges, int(empty.edges.sum()))
    size = values.abs().masked_fill(~empty.edges, -1.0).nan_to_num(-1.0)
    chosen = _top(size, number) if rule == "top" else _greedy(size, number, empty.senders, empty.receivers)
    kept = chosen & empty.edges & (size >= 0)
    about = {"method": f"{rule} {number}", **({} if prune else {"pruned": False}), **attrs}
    found = of_mask(model, kept, values, parts, **about)
    return required(found.pruned(), f"the {number:,} of the largest scores lead nowhere") if prune else found


def number_of(edges: Any, of: int) -> int:
    """How many edges are meant: a number, or a share below 1; at least one.

    Raises:
        ArgumentError: it is no such number.
    """
    number = isinstance(edges, int | float) and not isinstance(edges, bool) and 0 < edges <= of
    either = isinstance(edges, float) and float(edges) == 1.0  # all of them, or one
    if not number or either or (edges > 1 and edges != int(edges)):
        raise error(
            ArgumentError, "edges must be a number of edges, or a share of them",
            got="1.0, which may be one or all" if either else repr(edges), allowed=f"1 to {of:,}, or a share below 1",
            do=f"give {of} for all, or the integer 1 for one" if either else "choose another number",
        )  # fmt: skip
    return max(1, round(edges * of)) if edges < 1 else int(edges)


def _values(model: Model, scores: Any) -> tuple[Tensor, Sequence[str]]:
    if isinstance(scores, xr.Dataset):
        name = next((n for n in NAMES if n in scores and {"sender", "receiver"} <= set(scores[n].dims)), None)
        if name is None:
            raise error(DataError, "these are no scores of edges", got=", ".join(map(str, scores.data_vars)),
                        allowed="a variable over (sender, receiver)", do="give what edge_effects gives")  # fmt: skip
        own = scores.attrs.get("fingerprint")
        if own is not None and own != model.fingerprint:
            raise error(DataError, "these scores come from another model", got=f"{scores.attrs.get('model')} ({own})",
                        allowed=f"{model.anatomy.name} ({model.fingerprint})", do="score this model")  # fmt: skip
        scores = scores[name]
    parts: Sequence[str] = ("embed",)
    if isinstance(scores, xr.DataArray):
        if set(scores.dims) != {"sender", "receiver"}:
            raise error(DataError, "these are no scores of edges", got=str(list(scores.dims)),
                        allowed="an array over (sender, receiver)", do="give what edge_effects gives")  # fmt: skip
        scores, parts = _in_order(model, scores.transpose("sender", "receiver"))
    return torch.as_tensor(scores).double().cpu(), parts


def _in_order(model: Model, scores: xr.DataArray) -> tuple[Tensor, Sequence[str]]:
    """Scores in the order of the graph, by their labels where they have some, and the parts of the embedding.

    Raises:
        DataError: the labels are not the names of the graph.
    """
    listed, parts = graph(model), ["embed"]
    for axis in ("sender", "receiver"):
        if axis not in scores.coords:
            continue
        named = [str(x) for x in scores[axis].values]
        if axis == "sender":
            parts = [name for name in named if "." not in name] or parts
        wanted = [*parts, *listed.senders[1:]] if axis == "sender" else list(listed.receivers)
        if sorted(named) != sorted(wanted):
            odd = [*sorted(set(named) - set(wanted)), *sorted(set(wanted) - set(named)), "a name twice"][0]
            raise error(DataError, f"the {axis}s of these scores are not those of the model", got=odd,
                        allowed=f"the {len(wanted)} names of mt.explain.graph", do="score this model")  # fmt: skip
        scores = scores.isel({axis: [named.index(name) for name in wanted]})
    return torch.from_numpy(scores.values.copy()), parts


def _top(size: Float[Tensor, "sender receiver"], n: int) -> Bool[Tensor, "sender receiver"]:
    chosen = torch.zeros(size.numel(), dtype=torch.bool)
    chosen[size.flatten().topk(min(n, size.numel())).indices] = True
    return chosen.view_as(size)


def _greedy(
    size: Float[Tensor, "sender receiver"], n: int, senders: Sequence[str], receivers: Sequence[str]
) -> Bool[Tensor, "sender receiver"]:
    chosen = torch.zeros_like(size, dtype=torch.bool)
    inputs: dict[str, list[int]] = {}
    for v, name in enumerate(receivers):
        inputs.setdefault(node_of(name), []).append(v)
    waiting: list[tuple[float, int, int]] = []
    inside: set[str] = set()

    def enter(node: str) -> None:
        if node in inside:
            return
        inside.add(node)
        for v in inputs.get(node, ()):
            for u in (size[:, v] >= 0).nonzero().flatten().tolist():
                heapq.heappush(waiting, (-float(size[u, v]), u, v))

    enter("final")
    while waiting and n:
        _, u, v = heapq.heappop(waiting)
        chosen[u, v] = True
        enter(senders[u])
        n -= 1
    return chosen
