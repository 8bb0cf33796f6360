"""Sign flips: exact where all signs are tried, and never too sure where nothing is there."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from microtome.stream import mean_interval, sign_flip, slope_interval

NUMBERS = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))


@given(st.lists(NUMBERS, min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_equals_a_plain_count_of_all_signs(values: list[float]) -> None:
    own = abs(sum(values))
    sums = [
        abs(sum(s * x for s, x in zip(signs, values, strict=True))) for signs in product((-1, 1), repeat=len(values))
    ]
    expected = sum(s >= own - 1e-7 for s in sums) / len(sums)
    assert float(sign_flip(torch.tensor(values, dtype=torch.float64))) == pytest.approx(expected)


@given(st.lists(NUMBERS.filter(bool), min_size=2, max_size=7))
@settings(max_examples=40, deadline=None)
def test_over_all_signs_of_the_data_p_is_never_too_small(values: list[float]) -> None:
    """Under the null every sign vector is as likely: the share of them with p <= a must not exceed a."""
    flipped = torch.tensor(list(product((-1, 1), repeat=len(values)))).double() * torch.tensor(values).double()
    p = sign_flip(flipped.T)
    for level in p.unique():
        assert float((p <= level + 1e-12).double().mean()) <= float(level) + 1e-9


@given(st.lists(NUMBERS, min_size=2, max_size=14), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_sign_scale_and_order_do_not_matter(values: list[float], factor: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    p = float(sign_flip(x))
    assert 0 < p <= 1
    assert float(sign_flip(-x)) == p
    assert float(sign_flip(factor * x)) == pytest.approx(p)
    if len(values) <= 12:
        assert float(sign_flip(x.flip(0))) == pytest.approx(p)
        assert p >= 2 / 2 ** len(values) - 1e-12


def test_equals_scipy_where_all_signs_are_tried() -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.4

    def mean(x: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis=axis)

    found = permutation_test((x.numpy(),), mean, permutation_type="samples", vectorized=True, axis=0)
    assert torch.allclose(sign_flip(x), torch.from_numpy(found.pvalue))


def test_random_signs_agree_with_symmetric_data_and_see_a_shift() -> None:
    x = torch.randn(20, 4000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = sign_flip(x, draws=2000)
    for level in (0.05, 0.2, 0.5, 0.9):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.025)  # uniform
    shifted = sign_flip(x + 1.5, draws=2000)
    assert float((shifted < 0.01).double().mean()) > 0.95
    assert float(shifted.min()) >= 1 / 2001
    assert torch.equal(sign_flip(x, draws=500, seed=1), sign_flip(x, draws=500, seed=1))


def test_shapes_and_what_is_unknown() -> None:
    assert sign_flip(torch.ones(5, 3, 2)).shape == (3, 2)
    assert float(sign_flip(torch.ones(5))) == 2 / 32
    assert float(sign_flip(torch.zeros(5))) == 1.0
    assert bool(sign_flip(torch.ones(1, 2)).isnan().all())
    assert sign_flip(torch.tensor([[1.0, 1.0], [1.0, float("nan")]])).isnan().tolist() == [False, True]


def test_intervals_of_means_are_the_quantiles_of_resampled_means() -> None:
    """Every resample of three examples is known, and so are the quantiles of their means."""
    x = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    every = torch.tensor([sum(draw) / 3 for draw in product(x.tolist(), repeat=3)], dtype=torch.float64)
    mean, low, high = mean_interval(x, level=0.8, draws=20_000)
    assert float(mean) == 2
    edges = torch.quantile(every, torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert torch.allclose(torch.stack([low, high]), edges)
    wide = mean_interval(torch.stack([x, 10 * x, torch.full_like(x, torch.nan), torch.ones(3).double()], 1), seed=3)
    assert torch.allclose(10 * wide[1][0], wide[1][1])  # all columns have the same resamples
    assert bool(wide[1][2].isnan())
    assert wide[1][3] == wide[2][3] == 1
    assert all(torch.equal(a, b) for a, b in zip(mean_interval(x, seed=4), mean_interval(x, seed=4), strict=True))
    assert bool(mean_interval(torch.ones(1, 2))[1].isnan().all())


def test_slopes_are_exact_on_lines_and_covered_with_noise() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope, low, high = slope_interval(x, -0.7 * x + 2)
    assert (slope + 0.7).abs().max() < 1e-9
    assert (low + 0.7).abs().max() < 1e-6
    assert (high + 0.7).abs().max() < 1e-6
    x, noise = torch.randn(2, 60, 400, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    _, low, high = slope_interval(x, 0.4 * x + noise)
    assert 0.88 < float(((low < 0.4) & (high > 0.4)).double().mean()) < 0.98
    assert bool(slope_interval(torch.ones(5, 2), torch.randn(5, 2))[0].isnan().all())
    assert bool(slope_interval(x[:2], x[:2])[1].isnan().all())
