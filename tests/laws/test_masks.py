"""A learned mask keeps what is worth more than it costs, and says so where it does not decide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import families
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits import Sparsification
from microtome.circuits._bench import Bench, divergence
from microtome.circuits._sparsify import learn

MODEL = mt.open(families.build("llama-gqa"), prove=False)
CLEAN, CORRUPT = [ids(s)[0].tolist() for s in (0, 2)], [ids(s)[0].tolist() for s in (1, 3)]
GIVEN: dict[str, Any] = {"answer": [11, 12], "foil": [13, 14]}


def quadratic(worth: torch.Tensor) -> Any:
    """An objective in which opening gate i is worth worth_i, whatever the others do."""
    return lambda gates, step: (worth * (1 - gates["all"])).sum()


def test_a_gate_stays_where_it_is_worth_more_than_it_costs() -> None:
    worth = torch.tensor([0.0, 0.02, 0.09, 0.11, 0.3, 2.0, -1.0, 0.099])
    for sparsity, kept in ((0.8, worth > 0.1), (8.0, worth > 1.0), (0.0, worth > 0)):
        plan = Sparsification(sparsity, steps=100)
        priced = torch.ones_like(kept) if sparsity else worth != 0  # nothing decides what is worth and costs nothing
        like = {"all": torch.zeros(int(priced.sum()))}
        found = learn(plan, like, quadratic(worth[priced]), "gates", model=MODEL)
        assert torch.equal(found.kept["all"], kept[priced]), sparsity
        assert found.attrs["undecided"] <= 0.01
        assert found.attrs["steps"] < 100  # it ends when it has decided


def test_gates_start_at_a_half_and_tau_grows_by_a_factor() -> None:
    plan, seen = Sparsification(1.0, steps=4, lr=1e-3, growth=2.0), list[float]()

    def objective(gates: Any, step: int) -> torch.Tensor:
        seen.append(float(gates["all"][0].detach()))
        return (torch.tensor([1.0, 0.0]) * (1 - gates["all"])).sum()

    with pytest.raises(mt.errors.FitError):
        learn(plan, {"all": torch.zeros(2)}, objective, "gates", model=MODEL)
    # AdamW moves s by the learning rate as long as its gradient keeps its sign and size.
    expected = [1 / (1 + math.exp(-(2.0**k) * k * 1e-3)) for k in range(4)]
    assert seen == pytest.approx(expected, rel=1e-3)


def test_a_shorter_run_has_the_published_constants_in_shares_of_it() -> None:
    whole, short = Sparsification(1.0, steps=15_000), Sparsification(1.0, steps=150)
    assert (whole.rate, whole.tau(1)) == (pytest.approx(5e-5), pytest.approx(1.001))
    assert short.rate * 150 == pytest.approx(whole.rate * 15_000)
    assert short.tau(75) == pytest.approx(whole.tau(7_500))
    assert (Sparsification(1.0, lr=0.1).rate, Sparsification(1.0, growth=1.5).tau(3)) == (0.1, 1.5**3)


def test_a_mask_that_does_not_decide_is_an_error() -> None:
    plan = Sparsification(1.0, steps=3, lr=5e-5, growth=1.001)  # what is published for 15,000 steps
    text = r"the mask did not decide which edges it keeps in 3 steps; got 100\.0% of its gates between 0\.1 and 0\.9"
    before = [p.detach().clone() for p in MODEL.hf.parameters()]
    with pytest.raises(mt.errors.FitError, match=text) as raised:
        circuits.find(MODEL, CLEAN, CORRUPT, method="mask", mask=plan, **GIVEN)
    assert (raised.value.exit_code, str(raised.value).count("\n")) == (11, 0)
    assert "To do: take more steps, a larger lr or growth, or another sparsity." in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(before, MODEL.hf.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"sparsity": -1.0}, "sparsity of a mask; got -1.0; allowed: 0 or more"),
        ({"mask": {"steps": 0}}, "steps of a mask; got 0; allowed: 1 or more"),
        ({"mask": {"growth": 1.0}}, "growth of a mask; got 1.0; allowed: above 1"),
        ({"mask": {"lr": 0.0}}, "lr of a mask; got 0.0; allowed: above 0"),
        ({"mask": {"steps": 40, "sparsity": 1e9}}, "no edge is left in the circuit"),
    ],
)
def test_what_is_no_mask_is_refused(given: dict[str, Any], text: str) -> None:
    def ask() -> None:
        plan = {"mask": Sparsification(**{"sparsity": 1.0} | given["mask"])} if "mask" in given else given
        circuits.find(MODEL, CLEAN, CORRUPT, method="mask", **plan, **GIVEN)

    with pytest.raises(mt.errors.ArgumentError, match=text):
        ask()


SHORT: dict[str, Any] = {"method": "mask", **GIVEN}


def short(sparsity: float) -> dict[str, Any]:
    return SHORT | {"mask": Sparsification(sparsity, 80)}


def cost_of(circuit: circuits.Circuit) -> float:
    """KL of a circuit, hard."""
    pairs = mt.explain.pairs_of(MODEL, CLEAN, CORRUPT, **GIVEN)
    return float(Bench(MODEL, pairs, divergence(MODEL, pairs)).measure(circuit.kept[None]).mean())


def test_a_mask_of_edges_is_a_circuit() -> None:
    small = circuits.find(MODEL, CLEAN, CORRUPT, **short(4.0))
    large = circuits.find(MODEL, CLEAN, CORRUPT, **short(0.2))
    assert 0 < small.n_edges < large.n_edges < int(small.edges.sum())
    assert cost_of(large) < cost_of(small)
    assert bool((small.scores[small.kept] > 0.5).all())
    assert small.attrs["undecided"] <= 0.01
    assert small.attrs["method"] == "mask, sparsity 4, kl"
    # It carries more than as many edges of the largest estimates, and than edges drawn at random.
    other = circuits.from_scores(
        MODEL, circuits.mean_scores(MODEL, mt.explain.pairs_of(MODEL, CLEAN, CORRUPT, **GIVEN), "eap-ig"),
        small.n_edges, prune=False,
    )  # fmt: skip
    drawn = circuits.from_scores(
        MODEL, torch.rand(small.kept.shape, generator=torch.Generator().manual_seed(0)), small.n_edges, prune=False
    )
    assert cost_of(small) < cost_of(other)
    assert cost_of(small) < cost_of(drawn)


def test_a_price_above_all_worth_leaves_nothing_and_no_price_nearly_the_model() -> None:
    free = circuits.find(MODEL, CLEAN, CORRUPT, **short(1e-4))
    none = circuits.of_mask(MODEL, torch.zeros_like(free.kept))
    assert cost_of(free) < 0.15 * cost_of(none)


def test_a_circuit_by_mask_stands_beside_random_ones_and_eap_ig() -> None:
    found = circuits.circuit(MODEL, CLEAN, CORRUPT, method="mask", sparsity=2.0, steps=60, verify=3, draws=1, **GIVEN)
    assert {"kept", "kept_control", "kept_eap_ig", "kept_diff", "score_exact"} <= set(found)
    assert found["score"].attrs["unit"] == "1"
    assert "its gate was open" in found.attrs["reading"]
    kept = circuits.find(MODEL, CLEAN, CORRUPT, method="mask", mask=Sparsification(2.0, 60), **GIVEN)
    assert found.attrs["circuit_edges"] == kept.n_edges
    judged = circuits.faithfulness(MODEL, kept, CLEAN, CORRUPT, shares=(100 * kept.share,), draws=2, **GIVEN)
    assert float(found["kept"]) == pytest.approx(float(judged["faithfulness"][0]), abs=1e-4)
    assert found.attrs["undecided"] <= 0.01
