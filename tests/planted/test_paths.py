"""Trees in which a path is to be found, and what a network that learned to find it does: one step back a layer."""

from __future__ import annotations

import pytest
import torch

import microtome as mt
from microtome import planted


def test_trees_are_what_is_asked_of_them() -> None:
    """Read back from the tokens alone: the goal, its parents up to the node, the edges, the answer."""
    n, nodes = 200, 8
    p = planted.paths(n, seed=3, nodes=nodes)
    assert p.tokens.shape == (n, nodes + 1)
    for i in range(n):
        row = p.tokens[i].tolist()
        edges = [divmod(t - nodes, nodes) for t in row[: nodes - 1]]
        above = {b: a for a, b in edges}
        assert len(above) == nodes - 1
        assert max(list(above.values()).count(a) for a in above.values()) <= 2
        start, at, chain = row[-2], row[-1], [row[-1]]
        for _ in range(int(p.distance[i])):
            at = above[at]
            chain.append(at)
        assert at == start
        assert int(p.answers[i]) == chain[-2]
        assert p.chain[i, : len(chain)].tolist() == chain
        assert int(p.branches[i]) == list(above.values()).count(start)
        for step in range(int(p.distance[i])):
            assert edges[int(p.read[i, step])] == (chain[step + 1], chain[step])
    assert set(p.distance.tolist()) == {1, 2, 3, 4}
    again, other = planted.paths(n, seed=3, nodes=nodes), planted.paths(n, seed=4, nodes=nodes)
    assert torch.equal(again.tokens, p.tokens)
    assert not torch.equal(other.tokens, p.tokens)


def test_a_training_is_its_seed() -> None:
    given = {"steps": 2, "batch": 4, "layers": 1, "heads": 1, "d_head": 4, "d_mlp": 4}
    one, same, other = (planted.train_paths(**given, seed=seed) for seed in (0, 0, 1))
    mine = planted.arrays_of(one.model)
    assert all(torch.equal(x, planted.arrays_of(same.model)[k]) for k, x in mine.items())
    assert not all(torch.equal(x, planted.arrays_of(other.model)[k]) for k, x in mine.items())
    assert len(one.truth["accuracy"]) == 4
    assert one.model.anatomy.causal


def test_what_trees_cannot_be() -> None:
    with pytest.raises(mt.errors.ArgumentError, match="nodes of the trees; got 4; allowed: 5 or more"):
        planted.paths(3, 0, nodes=4)
    with pytest.raises(mt.errors.ArgumentError, match="n of the trees; got 0; allowed: 1 or more"):
        planted.paths(0, 0)
