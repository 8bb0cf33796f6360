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
    for name in ("layers", "heads", "d_head", "d_mlp", "batch"):
        with pytest.raises(mt.errors.ArgumentError, match=f"{name} of a trained network; got 0; allowed: 1 or more"):
            planted.train_paths(steps=0, **{name: 0})
    with pytest.raises(mt.errors.ArgumentError, match="steps of a trained network; got -1; allowed: 0 or more"):
        planted.train_paths(steps=-1)


def cuts(it: planted.Planted, p: planted.Paths) -> torch.Tensor:
    """[layer, edge] what the answer's probability loses where one layer cannot read an edge from the last position.

    Edges: those of the way, from the goal's on, and one that is not on it.
    """
    layers, last = it.model.anatomy.n_layers, p.tokens.shape[1] - 1
    cells: list[mt.edit.KnockOut] = []
    for own in p.read.tolist():
        beside = next(k for k in range(last - 1) if k not in own)
        cells += [
            mt.edit.KnockOut(f"{i}.attn.scores@{last}", keys=str(k)) for i in range(layers) for k in (*own, beside)
        ]
    prompts = [number for number in range(len(p.tokens)) for _ in range(layers * (p.read.shape[1] + 1))]
    swept = it.model.sweep(p.tokens, cells, mt.metric.Probability(p.answers.tolist()), prompts=prompts).run()
    return (swept.values.double().reshape(len(p.tokens), layers, -1) - swept.base.double().reshape(-1, 1, 1)).mean(0)


def read_off(it: planted.Planted, p: planted.Paths, step: int) -> list[float]:
    """How well the node so many steps above the goal is decoded at the last position, by layer, on held-out trees."""
    rows = [
        {"text": row, "label": str(node)}
        for row, node in zip(p.tokens.tolist(), p.chain[:, step].tolist(), strict=True)
    ]
    probe = mt.probes.fit(it.model, rows, site="*.resid_post@-1", folds=3, untrained=False)
    return probe.scores["accuracy"].values.tolist()


def four_apart(n: int, seed: int, it: planted.Planted) -> planted.Paths:
    """Trees whose goal is four edges away, and which the network answers."""
    p = planted.paths(n, seed)
    right = it.model.run(p.tokens).logits[:, -1].argmax(-1) == p.answers
    some = (p.distance == 4) & right
    return planted.Paths(*(x[some] for x in vars(p).values()))


def back_and_forth(it: planted.Planted) -> None:
    """The way is found, but not by one step back a layer: from the goal back, and from the node on, until they meet."""
    p = four_apart(3000, 77, it)
    assert len(p.tokens) > 100
    lost = cuts(it, planted.Paths(*(x[:40] for x in vars(p).values())))
    assert float(lost[:, 3].min()) < -0.3  # the edge from the node to the answer
    assert float(lost[:, 4].abs().max()) < 0.05  # an edge beside the way
    decoded = [read_off(it, p, step) for step in (1, 2, 3)]
    assert decoded[0][0] > 0.95  # one step back after the first layer
    assert decoded[1][0] < 0.5  # and not two: no layer makes more than one
    assert decoded[2][1] > decoded[1][1] + 0.2  # but in the second it is the node's end of the way that is read
    assert int(lost[1].argmin()) == 3


@pytest.mark.slow
def test_a_network_that_finds_paths_goes_from_both_ends() -> None:
    it = planted.train_paths(steps=2000, seed=0)
    assert min(it.truth["accuracy"]) > 0.9
    back_and_forth(it)
    blank = planted.train_paths(steps=0, seed=0)
    assert max(blank.truth["accuracy"]) < 0.3
