"""The laws of the referee: what is exact is perfect, what is random is chance, and each pair counts once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.linear import linear

import microtome as mt
from microtome.claims import referee
from microtome.claims._contest import Outcome, contest, operations, top
from microtome.claims._referee import _Board
from microtome.errors import ArgumentError

RANDOM = np.random.default_rng(0)


def test_a_contest_is_won_by_the_effects_themselves() -> None:
    effects = RANDOM.standard_normal(500)
    won = contest(-3 * effects, effects, 50)
    assert (won.rank_correlation, won.recall, won.random) == (pytest.approx(1.0), 1.0, 0.1)
    lost = contest(1 / effects, effects, 50)
    assert lost.rank_correlation == pytest.approx(-1.0)
    assert lost.recall == 0.0
    chance = [contest(RANDOM.standard_normal(500), effects, 50) for _ in range(200)]
    assert np.mean([one.recall for one in chance]) == pytest.approx(0.1, abs=0.01)
    assert np.mean([one.rank_correlation for one in chance]) == pytest.approx(0.0, abs=0.01)


def test_what_was_not_measured_is_no_cell() -> None:
    effects = np.array([9.0, np.nan, 1.0, 5.0, np.nan])
    found = contest(np.array([8.0, 100.0, 2.0, np.nan, np.nan]), effects, 1)
    assert (found.recall, found.random) == (1.0, 0.5)
    nothing = contest(np.full(3, np.nan), np.ones(3), 2)
    assert np.isnan([nothing.rank_correlation, nothing.recall, nothing.random]).all()
    assert top(np.array([1.0, 3.0, 3.0]), 2).tolist() == [1, 2]


def test_operations_are_counted_forward_and_backward() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert operations(lambda: a @ b)[1] == 2 * 3 * 5 * 7
    assert operations(lambda: (a @ b).sum().backward())[1] == 2 * 2 * 3 * 5 * 7


def test_in_a_linear_network_every_estimate_is_exact() -> None:
    """But AtP*, whose dropped gradients are no first-order estimate of the whole."""
    exact = ("atp", "ig", "eap", "eap-ig", "eap-ig-activations")
    asked: dict[str, Any] = {"of": ("induction",), "pairs": 2, "top": 10, "programs": 0, "trained": 0}
    found = referee(linear(), **asked, estimates=exact)
    assert found["estimate"].values.tolist() == [*exact, "random", "random-edges"]
    mine = found.sel(estimate=list(exact))
    assert np.allclose(mine["rank_correlation_each"], 1, atol=1e-3)
    assert np.allclose(mine["recall"], 1)
    assert (found["recall_random"] < 0.6).all()
    for name, like in (("random", "atp"), ("random-edges", "eap")):  # of nodes, and of edges
        chance = found.sel(estimate=name)
        assert abs(float(chance["rank_correlation"])) < 0.4, name
        assert float(chance["recall"]) < 0.6, name
        assert float(chance["cost"]) == 0, name
        assert float(chance["recall_random"]) == float(found["recall_random"].sel(estimate=like)), name
    assert np.allclose(found["by_task"].sel(task="induction"), found["rank_correlation"])
    cost = dict(zip(found["estimate"].values, found["cost"].values, strict=True))
    assert 2 < cost["atp"] < cost["eap"] < cost["eap-ig"] < cost["eap-ig-activations"]
    assert found.attrs["seconds_eap-ig"] > 0
    assert "auc" not in found


def test_edges_alone_have_their_own_chance() -> None:
    asked: dict[str, Any] = {"of": ("induction",), "pairs": 2, "top": 10, "programs": 0, "trained": 0}
    found = referee(linear(), **asked, estimates=("eap",))
    assert found["estimate"].values.tolist() == ["eap", "random"]
    assert float(found["cost"].sel(estimate="random")) == 0
    assert abs(float(found["rank_correlation"].sel(estimate="random"))) < 0.6


def test_programs_are_scored_and_ties_are_seen() -> None:
    model = mt.open(families.build("llama-gqa"))
    estimates = ("relp", "eap", "eap-ig")
    asked: dict[str, Any] = {"of": ("induction",), "pairs": 1, "top": 5, "programs": 2, "trained": 2, "inputs": 6}
    found = referee(model, **asked, estimates=estimates)
    names = found["program"].values.tolist()
    assert names == [*list(mt.planted.PROGRAMS)[:2], *(f"{name} (trained)" for name in mt.planted.TRAINED[:2])]
    histogram = found["by_program"].sel(program=names[2])
    assert bool(histogram.isnull().all())
    found = found.sel(program=[*names[:2], names[3]])
    names = found["program"].values.tolist()
    compiled = found.sel(program=names[:2])
    assert np.allclose(compiled["by_program"].sel(estimate="exact"), 1)
    assert np.allclose(compiled["by_program_nodes"].sel(estimate="exact"), 1)
    assert float(found["perfect"].sel(estimate="exact")) == 1
    assert bool(found["by_program"].sel(estimate="relp").isnull().all())
    assert bool(found["by_program_nodes"].sel(estimate="eap").isnull().all())
    assert not found["by_program"].sel(estimate="random").isnull().any()
    assert not found["by_program_nodes"].sel(estimate="random").isnull().any()
    drawn = found["by_program"].sel(estimate=["random", "random-edges"]).values
    assert (drawn[0] == drawn[1]).all()
    assert bool(found["by_program_nodes"].sel(estimate="random-edges").isnull().all())
    its = (mt.planted.program(names[0]), mt.planted.program(names[1]), mt.planted.trained(mt.planted.TRAINED[1]))
    for name, it in zip(names, its, strict=True):
        alone = mt.explain.circuit_recovery(it, pairs=6, estimates=("eap-ig",))
        assert float(found["by_program"].sel(estimate="eap-ig", program=name)) == float(alone["auc_estimated"][0])
        alone = mt.explain.node_recovery(it, pairs=6, estimates=("relp",))
        assert float(found["by_program_nodes"].sel(estimate="relp", program=name)) == float(alone["auc_estimated"][0])
    for kind, one in (("", "eap"), ("_nodes", "relp")):
        every = found[f"by_program{kind}"].sel(estimate=one)
        assert float(found[f"auc{kind}"].sel(estimate=one)) == pytest.approx(float(every[:2].mean()))
        if not kind:  # the other trained one has no edges to be judged
            assert float(found["auc_trained"].sel(estimate=one)) == pytest.approx(float(every[2]))


def test_more_programs_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained networks are never counted as compiled ones."""
    monkeypatch.setattr(mt.planted, "PROGRAMS", {name: mt.planted.PROGRAMS[name] for name in ("detect_ab",)})
    asked: dict[str, Any] = {"of": (), "programs": 5, "trained": 2, "inputs": 4, "estimates": ("eap",)}
    found = referee(linear(), **asked)
    assert found["program"].values.tolist() == ["detect_ab", "histogram (trained)", "previous_token (trained)"]
    by_program = found["by_program"].sel(estimate="eap").values
    assert float(found["auc"].sel(estimate="eap")) == by_program[0]
    assert float(found["auc_trained"].sel(estimate="eap")) == by_program[2]
    assert bool(found["auc_trained_lo"].isnull().all())  # of so few networks there is no interval


def test_an_estimate_that_does_not_exist() -> None:
    with pytest.raises(
        ArgumentError, match=r'there is no estimate "eap-gi"; allowed: atp, relp.*Did you mean "eap-ig"'
    ):
        referee(linear(), estimates=("eap-gi",))
    with pytest.raises(ArgumentError, match="there is nothing to judge; got no task; allowed: indirect_object"):
        referee(linear(), of=(), programs=0, trained=0)
    with pytest.raises(ArgumentError, match="there is nothing to judge; got no estimate; allowed: atp, relp"):
        referee(linear(), estimates=())


def test_a_task_is_judged_by_its_own_pairs() -> None:
    board = _Board(("atp",), 3)
    for pair, value in enumerate((0.1, 0.3, 0.9)):
        board.put_outcome(pair, "atp", Outcome(value, 0.5, 0.1))
        board.put("cost", pair, "atp", 3.0)
        board.put("seconds", pair, "atp", 1.0)
    found = board.found(["a", "a", "b"], ["a", "b"])
    assert found.values["by_task"].tolist() == [[pytest.approx(0.2), pytest.approx(0.9)]]
