"""Optimal constants: never worse than the mean on what they are fitted on, and the optimum where it is known."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests import families
from tests.laws.test_circuit_rows import some
from tests.laws.test_edges import ids
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt
from microtome import circuits
from microtome.circuits._bench import Bench, divergence
from microtome.circuits._optimal import Constants, optimal
from microtome.circuits._soft import soft_mean

MODEL = mt.open(families.build("llama-gqa"), prove=False)
CLEAN, CORRUPT = [ids(s)[0].tolist() for s in (0, 2, 4, 6)], [ids(s)[0].tolist() for s in (1, 3, 5, 7)]
GIVEN: dict[str, Any] = {"answer": [11, 12, 13, 14], "foil": [15, 16, 17, 18]}


def pairs_of(model: mt.Model = MODEL) -> mt.explain.Pairs:
    return mt.explain.pairs_of(model, CLEAN, CORRUPT, **GIVEN)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants that are fitted in few steps: many circuits are judged."""
    monkeypatch.setattr("microtome.circuits._bench.optimal", partial(optimal, steps=2))


def of_mean(model: mt.Model) -> Bench:
    return Bench(model, pairs_of(model), divergence(model, pairs_of(model)), "mean")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox-parallel", "gemma2", "phi3"])
def test_they_are_no_worse_than_the_mean(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    bench = of_mean(model)
    engine = bench.groups[0][1]
    for share in (0.2, 0.8):
        kept = some(engine, share)
        mean = float(bench.measure(kept[None]).mean())
        found = optimal(model, bench.groups, kept, steps=12)
        assert found.start == pytest.approx(mean, rel=1e-3)
        given = bench.given(kept, found.values, range(4))
        assert float(given.mean()) == pytest.approx(found.loss, rel=1e-3)
        assert found.loss < 0.9 * mean
        assert optimal(model, bench.groups, kept, steps=1).loss == pytest.approx(mean, rel=1e-3)
        assert optimal(model, bench.groups, kept, steps=3, lr=1e3).loss <= 1.001 * mean  # of steps that go astray, none


def small_vocabulary() -> mt.Model:
    """A model that can say every distribution: fewer tokens than dimensions."""
    config = LlamaConfig(
        vocab_size=12, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(std=0.4 if p.dim() > 1 else 0.1).add_(0.0 if p.dim() > 1 else 1.0)
    return mt.open(hf, prove=False)


def test_where_no_edge_is_kept_they_say_the_mean_distribution() -> None:
    """No constant can say more than one distribution, and the best one is the mean of those of all prompts."""
    model = small_vocabulary()
    clean = [[int(t) % 12 for t in row] for row in CLEAN]
    corrupt = [[int(t) % 12 for t in row] for row in CORRUPT]
    pairs = mt.explain.pairs_of(model, clean, corrupt, metric=mt.metric.LogitDifference(3, foil=4))
    bench = Bench(model, pairs, divergence(model, pairs), "mean")
    none = torch.zeros_like(bench.edges)
    p = torch.stack([model.run(row).logits[0, -1].double().softmax(-1) for row in clean])
    mean = p.mean(0)
    best = float((p * (p.log() - mean.log())).sum(-1).mean())
    found = optimal(model, bench.groups, none, steps=150, lr=0.05)
    assert best < 0.7 * found.start  # the mean of what is written says something else
    assert found.loss == pytest.approx(best, rel=0.01)


def test_constants_are_those_of_senders_whose_edges_are_out() -> None:
    bench = of_mean(MODEL)
    kept = bench.edges.clone()
    kept[5] = False  # one head is out
    found = optimal(MODEL, bench.groups, kept, steps=10)
    moved = (found.values - Constants.of(bench.groups).values()).norm(dim=1)
    assert (moved > 0).nonzero().flatten().tolist() == [5]


def test_constants_begin_at_the_mean_of_what_is_written() -> None:
    bench = of_mean(MODEL)
    own = bench.groups[0][1].own
    constants = Constants.of(bench.groups, [0, 3])
    assert torch.allclose(constants.values(), own[[0, 3]].mean((0, 2)), atol=1e-5)
    spread = (own[[0, 3]] - own[[0, 3]].mean((0, 2))[None, :, None]).pow(2).mean((0, 2, 3)).sqrt()
    assert torch.allclose(constants.size[:, 0], spread, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_pairs_are_judged_by_constants_that_were_fitted_on_others() -> None:
    kept = some(of_mean(MODEL).groups[0][1], 0.5)
    values = Bench(MODEL, pairs_of(), None, "optimal").measure(kept[None])[0]
    fitted = of_mean(MODEL)
    plain = Bench(MODEL, pairs_of(), None, "mean")
    for own, rest in (([0, 2], [1, 3]), ([1, 3], [0, 2])):
        constants = optimal(MODEL, fitted.groups, kept, rest, steps=2).values
        assert torch.allclose(values[own], plain.given(kept, constants, own), atol=1e-4)
    with pytest.raises(mt.errors.ArgumentError, match="fitted on one half of the pairs and measured on the other"):
        circuits.faithfulness(MODEL, scores(), CLEAN[:1], CORRUPT[:1], answer=11, foil=13, ablation="optimal")


def scores() -> torch.Tensor:
    return torch.rand(of_mean(MODEL).edges.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.usefixtures("quick")
def test_faithfulness_with_optimal_constants() -> None:
    found = circuits.faithfulness(
        MODEL, scores(), CLEAN, CORRUPT, shares=(30, 100), draws=1, ablation="optimal", **GIVEN
    )
    assert found.attrs["ablation"] == "optimal"
    assert float(found["faithfulness"][1]) == pytest.approx(1.0, abs=1e-6)
    assert abs(float(found["faithfulness"][0]) - 1.0) > 1e-3


@pytest.mark.parametrize("ablation", ["mean", "zero", "optimal"])
@pytest.mark.parametrize("method", ["eap", "greedy", "eap-ig", "clean-corrupted", "mask"])
def test_every_estimate_finds_a_circuit_under_every_ablation(method: str, ablation: str) -> None:
    mask = circuits.Sparsification(0.1, 60) if method == "mask" else None
    if (method, ablation) == ("mask", "zero"):
        with pytest.raises(mt.errors.ArgumentError, match="a mask cannot be learned against zero: norms undo"):
            circuits.find(MODEL, CLEAN, CORRUPT, method=method, ablation=ablation, mask=mask, **GIVEN)
        return
    found = circuits.find(MODEL, CLEAN, CORRUPT, method=method, ablation=ablation, edges=60, mask=mask, **GIVEN)
    assert found.attrs["ablation"] == ablation
    ranked = {"eap": "mean", "greedy": "mean", "mask": None}.get(method, "resample")
    expected = ranked if ablation == "optimal" or ranked == "resample" else None
    assert found.attrs.get("ranked_by") == expected
    assert "ranked_by" not in circuits.find(MODEL, CLEAN, CORRUPT, method=method, edges=60, mask=mask, **GIVEN).attrs


@pytest.mark.parametrize("method", ["acdc", "exact"])
def test_what_would_fit_constants_for_each_edge_is_refused(method: str) -> None:
    with pytest.raises(mt.errors.ArgumentError, match=f"{method} would fit optimal constants anew for every edge"):
        circuits.find(MODEL, CLEAN, CORRUPT, method=method, ablation="optimal", **GIVEN)


def test_an_estimate_of_the_mean_is_of_the_mean() -> None:
    """The slope of the metric along what a mean ablation does, not along what resampling does."""
    exact = circuits.mean_scores(MODEL, pairs_of(), "exact", "mean").nan_to_num(0).flatten()
    found = [
        circuits.mean_scores(MODEL, pairs_of(), "eap", how).nan_to_num(0).flatten() for how in ("mean", "resample")
    ]
    near = [float(torch.corrcoef(torch.stack([exact, x]))[0, 1]) for x in found]
    assert near[0] > 0.4 > near[1] + 0.1


@pytest.mark.usefixtures("quick")
def test_the_question_is_answered_under_every_ablation() -> None:
    found = circuits.circuit(
        MODEL, CLEAN, CORRUPT, method="eap-ig", edges=60, ablation="mean", verify=2, draws=2, **GIVEN
    )
    assert (found.attrs["ablation"], found.attrs["ranked_by"]) == ("mean", "resample")
    best = circuits.circuit(
        MODEL, CLEAN, CORRUPT, method="eap", edges=60, ablation="optimal", verify=2, draws=1, **GIVEN
    )
    assert best.attrs["ranked_by"] == "mean"
    assert "score_exact" not in best


def test_constants_are_learned_along_with_a_mask() -> None:
    bench = of_mean(MODEL)
    gates = torch.full(bench.edges.shape, 0.5)
    constants = Constants.of(bench.groups)
    constants.moved.requires_grad_()
    slope = torch.autograd.grad(soft_mean(bench.groups, gates, constants.values()), constants.moved)[0]
    assert float(slope.norm(dim=1).min()) > 0
