"""Networks that are trained to have a program's circuit: what they are taught, what they become, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import microtome as mt
from microtome import planted
from microtome.planted._algorithm import taught
from microtome.planted._exchange import Exchange
from microtome.planted._train import _losses, _Plan, _truth

TINY: dict[str, Any] = {"steps": 4, "batch": 8, "heads": 2, "d_head": 4, "d_mlp": 8, "idle": 2, "seed": 3}


def before(x: Any, let: Any) -> list[Any]:
    held = let("before", [None, *x[:-1]])
    return [None, *(a == b for a, b in zip(held[1:], x[1:], strict=True))]


ALGORITHM = planted.Algorithm("same as before", tuple("abc"), 5, (False, True), ("before",), before)


def test_an_exchanged_edge_is_the_edge_of_a_sweep() -> None:
    """Each edge of a network with norms, exchanged by an edit, and by the engine's own edges."""
    it = planted.trained("repeats")
    inputs = planted.corruptions(it, 2, seed=5)
    made = Exchange.of(it.model, inputs)
    source, n = it.model.run(inputs.corrupt, capture=["embed", "*.attn.z", "*.mlp_out"]), inputs.clean.shape[1]
    before, after = (planted.writes(it.model, x) for x in (inputs.clean, inputs.corrupt))
    shuffled = planted.writes(it.model, inputs.clean, inputs.positions)["pos_embed"]
    every = planted.edges(it.model)
    assert len(every) > 100
    edits = [made.edge(edge, i, len(every)) for i, edge in enumerate(every)]
    got = it.model.run(inputs.clean.repeat(len(every), 1), edits=edits).logits.unflatten(0, (len(every), -1))
    cells: list[mt.sweep.Edge] = []
    for row in range(len(inputs.clean)):
        for sender, receiver, slot in every:
            given: dict[str, Any] = {"source": source}
            if sender in ("embed", "pos_embed"):
                change = after["embed"] - before["embed"] if sender == "embed" else shuffled - before["pos_embed"]
                given = {"change": change[row]}
            name = "embed" if sender == "pos_embed" else planted.sender_of(sender)
            cells.append(mt.sweep.Edge(name, planted.receiver_of(receiver, slot), **given))
    metric = mt.metric.FunctionMetric(lambda z, _: z.flatten(1), positions=tuple(range(n)))
    prompts = [row for row in range(len(inputs.clean)) for _ in every]
    swept = it.model.sweep(inputs.clean, cells, metric, prompts=prompts).run().values
    swept = swept.reshape(len(inputs.clean), len(every), n, -1).transpose(0, 1)
    assert torch.allclose(swept, got, atol=1e-4)
    moved = (got - made.base.logits).abs().flatten(1).amax(1)
    assert float(moved.max()) > 1
    assert int((moved > 1e-3).sum()) > len(every) / 2


def test_a_step_teaches_what_the_program_says_to_each_exchange() -> None:
    """The compiled program in the place of the network has no loss to learn from at labels that it is sure of."""
    it = planted.program("detect_ab")
    high = taught(it)
    own = {name: name for name in high.variables}
    outside = tuple(e for e in planted.edges(it.model) if e not in high.edges)
    for number in range(6):
        given = _Plan(high, own, (), outside, 16, 3, 0).step(number)
        assert len(given.outside) == 3
        sharp = planted.Planted(it.model, it.truth).model
        with torch.no_grad():
            weight = sharp.hf.lm_head.weight.clone()
            sharp.hf.lm_head.weight.mul_(50)  # labels are 0 and 1: as logits they are not sure of anything
        found = _losses(sharp, given)
        with torch.no_grad():
            sharp.hf.lm_head.weight.copy_(weight)
        assert max(float(x.detach()) for x in found.values()) < 1e-3, found


def test_a_training_is_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a stopped one goes on to the same weights."""
    whole = planted.train("repeats", **TINY)
    again = planted.train("repeats", **TINY)
    other = planted.train("repeats", **(TINY | {"seed": 4}))
    mine = planted.arrays_of(whole.model)
    assert all(torch.equal(x, planted.arrays_of(again.model)[k]) for k, x in mine.items())
    assert not all(torch.equal(x, planted.arrays_of(other.model)[k]) for k, x in mine.items())
    file = tmp_path / "state.safetensors"
    step, calls = _Plan.step, 0

    def stopped(self: _Plan, number: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(_Plan, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        planted.train("repeats", **TINY, checkpoint=file, every=1)
    monkeypatch.undo()
    resumed = planted.train("repeats", **TINY, checkpoint=file, every=1)
    assert all(torch.equal(x, planted.arrays_of(resumed.model)[k]) for k, x in mine.items())


def test_its_truth_is_the_program_s_at_its_places() -> None:
    places = {"L0.head.0": "L1.head.1", "L0.mlp": "L2.mlp"}
    it = planted.train("repeats", places, layers=3, **(TINY | {"steps": 0}))
    program = planted.program("repeats").truth
    assert it.truth["nodes"] == ["embed", "pos_embed", "L1.head.1", "L2.mlp", "output"]
    assert it.truth["edges"] == [[places.get(u, u), places.get(v, v), x] for u, v, x in program["edges"]]
    assert it.truth["places"] == places
    assert it.truth["training"] == {"batch": 8, "lr": 4e-3, "strict": 1.0, "passed": 1.0, "idle": 2}
    assert it.model.anatomy.n_layers == 3
    assert not any(check.status == "fails" for check in it.model.proof)
    nodes = planted.interchange_accuracy(it, 4, seed=0)
    assert list(nodes) == ["behaviour", *planted.nodes(it.model)[2:-1]]
    assert set(planted.edge_accuracy(it, 4, seed=0)) == set(planted.edges(it.model))
    with mt.settings(seed=3):
        assert planted.train("repeats", **(TINY | {"seed": None})).truth["seed"] == 3


def test_the_program_in_its_own_place_has_its_own_edges() -> None:
    it = planted.program("double_histogram")
    own = {node: node for node in it.truth["nodes"] if planted.head_of(node) or planted.mlp_of(node) is not None}
    same = planted.Planted(it.model, {**it.truth, "places": own})
    assert set(planted.edge_accuracy(same, 24, seed=1).values()) == {1.0}


def test_an_algorithm_is_taught_by_its_variables() -> None:
    high = taught(ALGORITHM)
    inputs = high.draw(6, 1, 6)
    assert inputs.clean.shape == (6, 6)
    assert (inputs.clean[:, 0] == 3).all()
    plain, changed = high.answers(inputs), high.with_variable(inputs, "before")
    assert not plain.there[:, 0].any()
    assert plain.there[:, 1:].all()
    for row, other, said, then in zip(inputs.clean, inputs.corrupt, plain.labels, changed.labels, strict=True):
        assert said[1:].tolist() == [int(a == b) for a, b in pairwise(row[1:].tolist())]
        assert then[1:].tolist() == [int(a == b) for a, b in zip(other[1:-1], row[2:], strict=True)]
    it = planted.train(ALGORITHM, {"before": "L0.mlp"}, **TINY)
    assert it.truth["nodes"] == ["embed", "L0.mlp", "output"]
    assert it.truth["edges"] == []
    assert planted.interchange_accuracy(it, 8, seed=2, program=ALGORITHM)["L0.mlp"] < 1
    known = planted.Algorithm(**{**vars(ALGORITHM), "edges": (("embed", "before", "v"), ("before", "output", "in"))})
    it = planted.train(known, {"before": "L0.head.1"}, **TINY)
    assert it.truth["edges"] == [["embed", "L0.head.1", "v"], ["L0.head.1", "output", "in"]]
    judged = planted.edge_accuracy(it, 4, 0, known)
    assert set(planted.edges(it.model)) - set(judged) == {tuple(edge) for edge in it.truth["edges"]}


def test_a_sample_that_draws_another_token_later_is_refused() -> None:
    late = made(sample=lambda v, rng, n: rng.choices(v, k=n) if n == 5 else ["z"] * n)
    with pytest.raises(mt.errors.DataError, match="draws what is no input; got 'z'"):
        planted.train(late, **TINY)


def test_costs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of the program, and blocks of inputs of the network, in a step; forwards of a judged node."""
    it = planted.train("repeats", **(TINY | {"steps": 0}))
    high, rows = taught("repeats"), list[tuple[str, int]]()
    run = mt.Model.run

    def counted(self: mt.Model, tokens: Any, **given: Any) -> Any:
        rows.append((self.anatomy.name, len(tokens)))
        return run(self, tokens, **given)

    monkeypatch.setattr(mt.Model, "run", counted)
    inside = set(it.truth["places"].values())
    idle = tuple(n for n in planted.nodes(it.model)[2:-1] if n not in inside)
    own = {tuple(edge) for edge in it.truth["edges"]}
    outside = tuple(e for e in planted.edges(it.model) if e not in own)
    given = _Plan(high, it.truth["places"], idle, outside, 8, 2, 0).step(0)
    program, rows[:] = [n for _, n in rows], []
    assert program == [8] * 7
    _losses(it.model, given)
    assert [n for _, n in rows] == [8, 8, 8 * (2 + 2 * 2)]
    rows.clear()
    planted.interchange_accuracy(it, 6, seed=0)
    judged = [n for _, n in rows if n == 6]
    assert len(judged) == 3 + 4 * len(inside) + len(idle)


def wrong_model() -> planted.Planted:
    return planted.Planted(planted.program("increment").model, {**planted.program("alternate").truth})


def restless(x: Any, let: Any) -> list[Any]:
    restless.calls = getattr(restless, "calls", 0) + 1  # pyright: ignore[reportFunctionMemberAccess]
    return [let("before", 0) == restless.calls % 2 for _ in x]  # pyright: ignore[reportFunctionMemberAccess]


def made(**changed: Any) -> planted.Algorithm:
    return planted.Algorithm(**{**vars(ALGORITHM), **changed})


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (lambda: planted.train("histgram"), 'no program is called "histgram". Did you mean "histogram"'),
        (lambda: planted.train(planted.induction()), "this is no compiled program; got LlamaForCausalLM"),
        (lambda: planted.train("fraction_of_x"), 'the program "fraction_of_x" has one number as its output; allowed'),
        (lambda: planted.train(wrong_model()), 'the program "alternate" disagrees with its own model; got .* answers'),
        (
            lambda: planted.train("repeats", {"L0.head.0": "L0.head.9", "L0.mlp": "L0.mlp"}),
            '"L0.head.0" is aligned to a node that is not there; got L0.head.9; allowed: heads and MLPs of 2 layers',
        ),
        (lambda: planted.train("repeats", {"L0.head.1": "L0.mlp"}), 'repeats has no "L0.head.1" to be aligned'),
        (lambda: planted.train("repeats", {"L0.mlp": "L0.mlp"}), '"L0.head.0" of repeats has no place'),
        (
            lambda: planted.train("repeats", {"L0.mlp": "L0.mlp", "L0.head.0": "L0.mlp"}),
            "L0.mlp stands for two parts of repeats",
        ),
        (lambda: planted.train("more_a_than_b", heads=1), "there is no place for L0.head.1 of more_a_than_b"),
        (lambda: planted.train("repeats", heads=0), "heads of a trained network; got 0; allowed: 1 or more"),
        (lambda: planted.train(made(evaluate=restless)), 'the algorithm "same as before" disagrees with itself'),
        (lambda: planted.train(made(variables=("after",))), "names other variables; got before; allowed: after"),
        (lambda: planted.train(made(outputs=(0, 5))), "gives what is no output"),
        (lambda: planted.train(made(evaluate=lambda x, let: x[99])), "fails on .*; got IndexError"),
        (lambda: planted.train(made(variables=())), "needs more variables; got 0; allowed: 1 or more"),
        (lambda: planted.train(made(vocabulary=("a",))), "needs more vocabulary; got 1; allowed: 2 or more"),
        (lambda: planted.train(made(outputs=())), "needs more outputs; got 0; allowed: 1 or more"),
        (lambda: planted.train(made(vocabulary=("a", "b", "a"))), "name one twice; got 'a'"),
        (lambda: planted.train(made(max_length=0)), "takes no token; got max_length=0; allowed: 1 or more"),
        (lambda: planted.train(made(sample=lambda *_: ["a", "z"])), "draws what is no input; got 'z'; allowed: tokens"),
        (
            lambda: planted.train(made(sample=lambda *_: ["a"])),
            "draws what is no input; got 1 tokens for a length of 5",
        ),
        (lambda: planted.train(made(sample=lambda v, r, n: [v[99]] * n)), "draws no input of .* 5; got IndexError"),
        (
            lambda: planted.edge_accuracy(planted.train(ALGORITHM, **(TINY | {"steps": 0})), 4, 0, ALGORITHM),
            "the truth of same as before names no edges to judge",
        ),
    ],
)
def test_what_cannot_be_taught(train: Callable[[], Any], text: str) -> None:
    with pytest.raises(mt.errors.MicrotomeError, match=text) as raised:
        train()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_small_program_is_where_it_was_put() -> None:
    """Gupta et al.'s test, on inputs that were not trained on, beside the same network before training."""
    it = planted.train("previous_token", steps=1000, seed=5)
    nodes = planted.interchange_accuracy(it, 256, seed=10**6)
    inside = set(it.truth["places"].values())
    assert min(nodes[n] for n in ("behaviour", *inside)) >= 0.95, nodes
    assert min(share for n, share in nodes.items() if n not in inside) > 0.95, nodes
    edges = planted.edge_accuracy(it, 256, seed=10**6)
    own = {tuple(edge) for edge in it.truth["edges"]}
    assert min(edges[e] for e in own) >= 0.95, edges
    assert min(share for e, share in edges.items() if e not in own) > 0.95, edges
    untaught = planted.interchange_accuracy(planted.train("previous_token", steps=0, seed=5), 256, seed=10**6)
    assert max(untaught.values()) < 0.5
    assert {*_truth(taught("previous_token"), it.model, it.truth["places"])["nodes"]} == {*it.truth["nodes"]}
