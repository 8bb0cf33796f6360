"""Exact edge effects find the circuit of every compiled program, and only with both corruptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import microtome as mt
from microtome import planted
from microtome.explain import auc
from microtome.explain._first_order import at_receivers, captures, contract
from microtome.explain._recovery import estimated, outputs_of

NAMES = list(planted.PROGRAMS)


QUICK = ("detect_ab", "previous_token", "first_occurrence", "rank")
"""The others take from five seconds to two minutes."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_exact_effects_tell_the_circuit_from_the_rest(name: str) -> None:
    it = planted.program(name)
    # Some of these answer the same to almost everything: they take more inputs to show all of their edges.
    with mt.settings(seed=3):
        data = mt.explain.circuit_recovery(it, pairs=24 if name in ("detect_ab", "maximum_so_far") else 6)
    assert float(data["auc"]) == 1.0
    assert int(data["true"].sum()) == len(it.truth["edges"])
    assert int((data["score"] == data["score"]).sum()) == len(planted.edges(it.model))


def test_tokens_alone_miss_what_positions_carry() -> None:
    it = planted.program("previous_token")
    with mt.settings(seed=3):
        data = mt.explain.circuit_recovery(it, pairs=6, corrupt=("tokens",))
    carried = data["score"].sel(sender="pos_embed").where(data["true"].sel(sender="pos_embed"), drop=True)
    assert carried.size > 0
    assert float(abs(carried).max()) < 1e-6
    assert float(data["auc"]) < 1.0


def test_the_estimate_is_the_slope_of_exact_effects() -> None:
    """A small part of what a sender writes more, put into one input alone, moves the outputs by as small a part."""
    it, seed = planted.program("previous_token"), 3  # where no neuron stands at its kink, which has two slopes
    c = planted.corruptions(it, 1, seed)
    before, after = planted.writes(it.model, c.clean), planted.writes(it.model, c.corrupt)
    start, goal = it.model.run(c.clean), it.model.run(c.corrupt)
    way = (goal.logits[:, 1:] - start.logits[:, 1:]).double()
    assert float(way.norm()) > 1e-3
    metric = mt.metric.FunctionMetric(
        lambda z, prompts: (z.double() * way).sum((1, 2)) / way.norm(), positions=tuple(range(1, c.clean.shape[1]))
    )
    with mt.settings(seed=seed):
        data = mt.explain.circuit_recovery(it, pairs=1, corrupt=("tokens",))
    eps = 1e-2
    cells, scores = [], []
    for node, x in before.items():
        sender = node if node in ("embed", "pos_embed") else planted.sender_of(node)
        for receiver in data["receiver"].values:
            score = float(data["estimated"].sel(estimate="eap", sender=sender, receiver=receiver))
            if score == score:
                scores.append(score)
                change = (after[node] - x)[0].detach()
                cells += [mt.sweep.Edge("embed", str(receiver), change=sign * eps * change) for sign in (1, -1)]
    up, down = it.model.sweep(c.clean, cells, metric).run().effects.double().reshape(-1, 2).T
    expected = ((up - down) / (2 * eps)).abs()
    assert len(scores) == int((data["score"] == data["score"]).sum())
    assert max(scores) > 1e-2
    assert float((torch.tensor(scores) - expected).abs().max()) < 0.02 * max(scores) + 2e-3


def test_first_order_misses_what_exact_effects_find() -> None:
    """Where attention is saturated or a neuron stands at its kink, the gradient does not tell it from the rest."""
    with mt.settings(seed=3):
        data = mt.explain.circuit_recovery(planted.program("successors"), pairs=6)
    assert float(data["auc"]) == 1.0
    assert float(data["auc_estimated"][0]) < 0.9


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (
            lambda: planted.Planted(planted.trained("repeats").model, {"nodes": ["embed"]}),
            {},
            "the truth of repeats names no edges to recover; got it names nodes",
        ),
        (lambda: planted.induction(), {}, "names no edges to recover"),
        (lambda: planted.Planted(planted.program("reverse").model, {}), {}, "the truth of reverse names no edges"),
        (lambda: planted.Planted(planted.program("reverse").model, {"edges": []}), {}, "names no edges to recover"),
        (
            lambda: planted.Planted(planted.induction().model, planted.program("reverse").truth),
            {},
            "positions can be shuffled only in planted networks; got LlamaForCausalLM",
        ),
        (lambda: planted.program("reverse"), {"corrupt": ()}, "corrupt names nothing; allowed: tokens, positions"),
        (lambda: planted.program("reverse"), {"pairs": 0}, r"pairs must be an integer of 1 or more \(inputs\); got 0"),
    ],
)
def test_what_has_no_circuit_to_recover_is_refused(
    make: Callable[[], planted.Planted], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.circuit_recovery(make(), **options)


def test_auc_counts_pairs() -> None:
    high, low = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
    assert auc(high, low) == (1 + 1 + 1 + 0.5) / 4
    assert auc(low, high) == 1 - auc(high, low)


@pytest.mark.parametrize("name", ["sort", "balanced"])
def test_the_way_of_an_estimate_ends_at_the_corrupt_run(name: str) -> None:
    """The gradient at the corrupt embedding is that of the corrupt prompt: the mean of both is `clean-corrupted`."""
    it = planted.program(name)
    c = planted.corruptions(it, 1, 1)
    before, after = planted.writes(it.model, c.clean), planted.writes(it.model, c.corrupt)
    change = torch.stack([after[node] - x for node, x in before.items()], dim=1).detach()
    goal = it.model.run(c.corrupt).logits[:, 1:]
    way = (goal - it.model.run(c.clean).logits[:, 1:])[0].double()
    slopes = []
    for tokens in (c.clean, c.corrupt):
        start = it.model.run(tokens, capture=captures(it.model), grad=True)
        metric = (start.logits[0, 1:].double() * way.detach()).sum() / way.norm().clamp(min=1e-6)
        slopes.append(contract(change[0].unsqueeze(1), at_receivers(it.model, start, start.grad(metric)))[0].detach())
    there = torch.cat([mt.explain.graph(it.model).mask[:1], mt.explain.graph(it.model).mask])
    asked = outputs_of(it, c, "tokens")
    found = {method: estimated(asked, "tokens", method)[there] for method in ("eap", "clean-corrupted")}
    wanted = ((slopes[0] + slopes[1]).abs() / 2)[there]
    scale = float(wanted.abs().max())
    assert scale > 1e-2
    assert float((found["clean-corrupted"] - wanted).abs().max()) < 1e-4 * scale
    assert float((found["eap"] - slopes[0].abs()[there]).abs().max()) < 1e-4 * scale
    assert float((found["clean-corrupted"] - found["eap"]).abs().max()) > 1e-2 * scale


def test_edges_of_shuffled_positions_come_from_the_positional_embedding() -> None:
    it = planted.trained("repeats")
    c = planted.corruptions(it, 4, 1)
    for kind, moved, still in (("positions", 1, 0), ("tokens", 0, 1)):
        for method in ("eap", "eap-ig", "eap-ig-activations"):
            found = estimated(outputs_of(it, c, kind), kind, method).nan_to_num()
            assert float(found[moved].max()) > 1e-3
            assert float(found[still].max()) == 0


def test_the_way_of_a_sender_s_own_activations() -> None:
    """Into the outputs of a network without a final norm every edge is linear, so that any way gives the same."""
    it = planted.program("sort")
    asked = outputs_of(it, planted.corruptions(it, 2, 1), "tokens")
    found = {method: estimated(asked, "tokens", method) for method in ("eap", "eap-ig-activations")}
    assert torch.allclose(found["eap"][:, -1], found["eap-ig-activations"][:, -1], rtol=1e-3, atol=1e-6)
    assert float((found["eap"] - found["eap-ig-activations"]).nan_to_num().abs().max()) > 1e-2
