"""Trained networks keep the circuit that they were trained to have."""

from __future__ import annotations

import pytest

import microtome as mt
from microtome import planted
from microtome.planted._exchange import Exchange


@pytest.mark.parametrize("name", planted.TRAINED)
def test_exchanging_a_node_does_what_it_does_in_the_program(name: str) -> None:
    it = planted.trained(name)
    accuracy = planted.interchange_accuracy(it, 128, seed=77)
    assert accuracy["behaviour"] > 0.99
    assert set(accuracy) == {"behaviour", *planted.nodes(it.model)[2:-1]}
    assert min(accuracy.values()) > 0.97, accuracy


@pytest.mark.parametrize("name", ["previous_token", "repeats"])
def test_edges_carry_what_they_carry_in_the_program(name: str) -> None:
    it = planted.trained(name)
    accuracy = planted.edge_accuracy(it, 64, seed=77)
    inside = {tuple(edge) for edge in it.truth["edges"]}
    places = it.truth["places"]
    assert inside == {(places.get(u, u), places.get(v, v), x) for u, v, x in planted.program(name).truth["edges"]}
    assert set(accuracy) == set(planted.edges(it.model))
    assert min(accuracy.values()) > 0.97, accuracy
    c = planted.corruptions(it, 64, seed=78)
    made = Exchange.of(it.model, c)
    base = made.base.logits[:, 1:].argmax(-1)
    kept: dict[tuple[str, str, str], float] = {}
    for edge in inside:
        said = it.model.run(c.clean, edits=[made.edge(edge)]).logits[:, 1:].argmax(-1)
        kept[edge] = float((said == base).double().mean())
    assert max(kept.values()) < 0.95, kept


@pytest.mark.parametrize("name", planted.TRAINED)
def test_what_is_inside_matters_and_what_is_outside_does_not(name: str) -> None:
    """The other side of it: the base's own answer survives an exchange outside, and not one inside."""
    it = planted.trained(name)
    model, inside = it.model, set(it.truth["places"].values())
    c = planted.corruptions(it, 128, seed=78)
    source = model.run(c.corrupt, capture=["*.attn.z", "*.mlp_out"])
    base = model.run(c.clean).logits[:, 1:].argmax(-1)
    kept: dict[str, float] = {}
    for node in planted.nodes(model)[2:-1]:
        said = model.run(c.clean, edits=[mt.edit.Patch(planted.sender_of(node), source)]).logits[:, 1:].argmax(-1)
        kept[node] = float((said == base).double().mean())
    assert min(v for n, v in kept.items() if n not in inside) > 0.97
    assert max(v for n, v in kept.items() if n in inside) < 0.9


@pytest.mark.parametrize("name", planted.TRAINED)
def test_the_weights_are_ordinary(name: str) -> None:
    model = planted.trained(name).model
    assert "fails" not in {check.status for check in model.proof}
    assert model.final_norm is not None
    assert model.final_norm.norm.centred
    for weights in model.layers:
        for matrix in (weights.W_Q, weights.W_K, weights.W_V, weights.W_O, weights.W_in, weights.W_out):
            assert float((matrix == 0).double().mean()) < 0.01
    compiled = planted.program(name).model.layers[0].W_in
    assert float((compiled == 0).double().mean()) > 0.5


def test_the_program_in_its_own_place_scores_one() -> None:
    it = planted.program("double_histogram")
    own = {node: node for node in it.truth["nodes"] if planted.head_of(node) or planted.mlp_of(node) is not None}
    same = planted.Planted(it.model, {**it.truth, "places": own})
    assert set(planted.interchange_accuracy(same, 32, seed=1).values()) == {1.0}


@pytest.mark.parametrize("name", planted.TRAINED)
def test_a_wrong_place_is_seen(name: str) -> None:
    """The same network, said to hold the program's head in another of its heads."""
    it = planted.trained(name)
    places = it.truth["places"]
    node = next(node for node in places if planted.head_of(node))
    other = next(f"L0.head.{h}" for h in range(4) if f"L0.head.{h}" not in places.values())
    wrong = planted.Planted(it.model, {**it.truth, "places": places | {node: other}})
    accuracy = planted.interchange_accuracy(wrong, 64, seed=1)
    assert max(accuracy[other], accuracy[places[node]]) < 0.9


def test_edges_that_are_not_known_are_not_judged() -> None:
    with pytest.raises(mt.errors.DataError, match="the truth of .* names no edges to judge"):
        planted.edge_accuracy(planted.trained("histogram"), 4, seed=0)


def test_an_untrained_program_is_named() -> None:
    with pytest.raises(mt.errors.DataError, match='no trained program is called "histgram". Did you mean "histogram"'):
        planted.trained("histgram")


def test_a_network_without_places_is_refused() -> None:
    with pytest.raises(mt.errors.DataError, match="reverse does not say where .* got no places"):
        planted.interchange_accuracy(planted.program("reverse"), 4, seed=0)
    with pytest.raises(mt.errors.DataError, match="got no program and no places"):
        planted.interchange_accuracy(planted.induction(), 4, seed=0)
