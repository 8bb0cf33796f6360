"""Scores of nodes separate a known circuit from the rest; a corruption is a prompt of the model by places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import microtome as mt
from microtome import planted
from microtome.explain._node_recovery import estimated_nodes
from microtome.explain._recovery import outputs_of


@pytest.mark.parametrize("it", [planted.program("maximum_so_far"), planted.trained("repeats")], ids=["compiled", "own"])
def test_a_model_by_places_is_the_model(it: planted.Planted) -> None:
    c = planted.corruptions(it, 4, seed=2)
    model = planted.by_place(it.model)
    for where in (None, c.positions):
        edits = [] if where is None else [planted.placed(it.model, c.clean, where)]
        plain = it.model.run(c.clean, edits=edits).logits
        again = model.run(planted.place_ids(it.model, c.clean, where)).logits
        assert torch.allclose(plain, again, atol=1e-5)
    assert float((it.model.run(c.clean).logits - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["ascending", "rank", "first_occurrence"])
def test_exact_effects_of_nodes_find_the_circuit(name: str) -> None:
    it = planted.program(name)
    with mt.settings(seed=3):
        data = mt.explain.node_recovery(it, pairs=8, estimates=("atp", "random"))
    assert float(data["auc"]) == 1.0
    outgoing = {planted.sender_of(edge[0]) for edge in it.truth["edges"]} & set(data["component"].values.tolist())
    assert set(data["component"].values[data["true"].values].tolist()) == outgoing
    assert data["estimated"].shape == (2, it.model.anatomy.n_layers * (it.model.anatomy.n_heads + 1))


def test_tokens_alone_miss_nodes_that_read_positions() -> None:
    it = planted.program("reverse")
    with mt.settings(seed=3):
        data = mt.explain.node_recovery(it, pairs=8, corrupt=("tokens",))
        both = mt.explain.node_recovery(it, pairs=8)
    still = data["score"].values < 1e-6
    assert (still & data["true"].values).any()
    assert (both["score"].values[data["true"].values] > 1e-2).all()


@pytest.mark.parametrize("method", ["atp", "ig", "atp*"])
def test_an_estimate_of_one_step_is_exact(method: str) -> None:
    """In the last layer of a network without a final norm the outputs are linear in every node."""
    it = planted.program("sort")
    c = planted.corruptions(it, 2, seed=1)
    model, pairs = outputs_of(it, c, "tokens")
    found = estimated_nodes(model, pairs, "tokens", method)
    clean, other = (torch.stack(list(rows)) for rows in (pairs.start("noise"), pairs.goal("noise")))
    base = pairs.read(model.run(clean))
    last = model.anatomy.n_layers - 1
    edit = mt.edit.Patch(f"{last}.mlp_out", model.run(other, capture="*.mlp_out"))
    exact = (pairs.read(model.run(clean, edits=[edit])) - base).abs().max()
    assert float(found[-1]) == pytest.approx(float(exact), rel=1e-3, abs=1e-6)
    whole = (pairs.read(model.run(other)) - base).abs().max()
    assert float(found.max()) > 0.05 * float(whole)


def test_drawn_scores_are_chance_and_the_same_again() -> None:
    it = planted.trained("histogram")
    aucs: list[float] = []
    model, pairs = outputs_of(it, planted.corruptions(it, 2, seed=1), "tokens")
    for seed in range(200):
        with mt.settings(seed=seed):
            found, again = (estimated_nodes(model, pairs, "tokens", "random").numpy() for _ in range(2))
        assert (found == again).all()
        true = np.array([node in it.truth["places"].values() for node in planted.nodes(it.model)[2:-1]])
        aucs.append(mt.explain.auc(torch.from_numpy(found[true]), torch.from_numpy(found[~true])))
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.06)
    assert np.std(aucs) > 0.1


def test_where_all_nodes_are_inside_nothing_is_separated() -> None:
    data = mt.explain.node_recovery(planted.program("singletons"), pairs=4)
    assert bool(data["true"].all())
    assert math.isnan(float(data["auc"]))


def test_what_has_no_nodes_to_recover_is_refused() -> None:
    with pytest.raises(mt.errors.DataError, match="the truth of reverse names no nodes to recover"):
        mt.explain.node_recovery(planted.Planted(planted.program("reverse").model, {}))
    with pytest.raises(mt.errors.ModelUnsupported, match="only in planted networks; got LlamaForCausalLM"):
        mt.explain.node_recovery(planted.induction())
