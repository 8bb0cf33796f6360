"""Scores of rows that are like a text or not: their parts against plain sums, and two halves of one text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements import out_of_distribution
from microtome.measurements._outside import SCORES, _Ends, _histogram, _split, auroc, coverage, scaled
from microtome.stream import TokenBatch


def ids(rows: int, seed: int = 0, low: int = 5, high: int = families.VOCAB) -> Tensor:
    return torch.randint(low, high, (rows, 16), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def test_the_auroc_is_that_of_scikit_learn_with_ties_half() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, 30) / 8, rng.integers(0, 6, 20) / 8
    expected = roc_auc_score([1] * 30 + [0] * 20, [*a, *b])
    assert auroc(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected)
    assert auroc(torch.ones(3).double(), torch.zeros(2).double()) == 1


def test_coverage_lies_in_0_to_1_and_is_full_where_all_states_were() -> None:
    states = torch.rand(1000, 7, generator=torch.Generator().manual_seed(0))
    density = _histogram(states)
    assert torch.allclose(density.sum(1), torch.ones(7))
    found = coverage(states.reshape(10, 100, 7), density)
    assert bool(((found >= 0) & (found <= 1)).all())
    narrow = _histogram(states * 0.1)  # in five bins of 50
    assert torch.equal(coverage(states[:9, None] * 0.1, narrow), torch.ones(9, 1))
    assert torch.equal(coverage(states[:9, None] * 0 + 0.9, narrow), torch.zeros(9, 1))


def test_scaling_keeps_directions_and_even_states_grow_most() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.cosine_similarity(scaled(x), x), torch.ones(5))
    even, peaked = torch.ones(40), torch.eye(40)[0]
    assert float(scaled(even)[0]) == pytest.approx(float(np.exp(40 / 6)), rel=1e-5)
    assert float(scaled(peaked)[0]) == pytest.approx(float(np.e), rel=1e-5)


def test_the_logits_read_from_a_state_are_those_of_the_model(model: mt.Model) -> None:
    for kind in ("llama-gqa", "gemma2", "cohere"):
        own = model if kind == "llama-gqa" else mt.open(families.build(kind), prove=False)
        batch = TokenBatch.of(ids(2))
        ends = _Ends(own, ("energy",), [batch])
        logits = ends._read(ends._state(batch))
        torch.testing.assert_close(logits, own.run(batch.tokens).logits, rtol=1e-4, atol=1e-4)
        scores = ends.scores(batch)
        torch.testing.assert_close(scores[0], logits.logsumexp(-1).double().mean(1), rtol=1e-5, atol=1e-5)


def test_a_push_is_the_derivative_by_differences(model: mt.Model) -> None:
    batch = TokenBatch.of(ids(1))
    ends = _Ends(model, ("nac",), [TokenBatch.of(ids(4, 1))])
    push = ends._push(batch)[0, 7, 3]
    a = float(model.run(batch.tokens, capture="2.mlp.post")["2.mlp.post"][0, 7, 3])

    def cross(value: float) -> float:
        y = model.run(batch.tokens, edits=mt.edit.Set("2.mlp.post[3]@7", value)).logits[0, 7].double()
        return float(y.logsumexp(-1) - y.mean())

    slope = (cross(a + 1e-2) - cross(a - 1e-2)) / 2e-2
    assert float(push) == pytest.approx(slope * a, rel=2e-2, abs=1e-5)


def test_two_halves_of_one_text_are_not_told_apart(model: mt.Model) -> None:
    data = out_of_distribution(model, ids(120, 0), ids(60, 1))
    assert data["score"].values.tolist() == list(SCORES)
    for score in SCORES:
        one = data.sel(score=score)
        assert float(one["auroc_lo"]) - 0.05 <= 0.5 <= float(one["auroc_hi"]) + 0.05, score
        assert float(one["auroc_lo"]) < float(one["auroc"]) < float(one["auroc_hi"])
    assert data.sizes == {"score": 6, "row": 60, "other": 60}
    nac = data["inside"].sel(score="nac")
    assert 0 <= float(nac.min()) <= float(nac.max()) <= 1


def test_calibration_rows_and_scored_rows_are_apart() -> None:
    batches = [TokenBatch.of(ids(4, n), torch.arange(4) * 16 + 64 * n) for n in range(3)]
    first, rest = _split(batches, 6)
    starts = [torch.cat([b.start for b in some]).tolist() for some in (first, rest)]
    assert [len(some) for some in starts] == [6, 6]
    assert sorted(starts[0] + starts[1]) == list(range(0, 192, 16))


def test_wrong_calls_are_refused(model: mt.Model) -> None:
    with pytest.raises(mt.errors.ArgumentError, match="no such score; got vim"):
        out_of_distribution(model, ids(20), ids(20), scores=["vim"])
    with pytest.raises(mt.errors.DataError, match="the text inside has too few rows; got 9; allowed: 16 or more"):
        out_of_distribution(model, ids(9), ids(20))
    with pytest.raises(mt.errors.DataError, match="the text outside has too few rows"):
        out_of_distribution(model, ids(20), ids(2))
    with pytest.raises(mt.errors.SiteError):
        out_of_distribution(mt.open(families.build("mixtral"), prove=False), ids(20), ids(20), scores=["nac"])
