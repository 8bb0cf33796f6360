"""Sign flips are exact where all signs are tried, and intervals are what their formulas and SciPy say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, permutation_test, skew, t, ttest_1samp

from microtome.stream import (
    LEAST,
    difference_interval,
    mean_interval,
    share_difference_interval,
    share_interval,
    sign_flip,
    slope_interval,
)

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


def samples(n: int, units: int = 60, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, units, generator=generator, dtype=torch.float64).exp()


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_of_symmetric_examples_the_interval_is_students_t(level: float) -> None:
    half = torch.randn(5, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = torch.cat([3 + half, 3 - half])
    mean, low, high = mean_interval(x, level=level)
    expected = ttest_1samp(x.numpy(), 0).confidence_interval(level)
    assert torch.allclose(mean, torch.full_like(mean, 3.0))
    assert np.allclose(low, expected.low, rtol=1e-9)
    assert np.allclose(high, expected.high, rtol=1e-9)


def test_the_ends_solve_halls_cubic_or_are_students() -> None:
    """At each end the farther one: there the transformed statistic, or the plain one, is the quantile of t."""
    x = samples(12)
    mean, low, high = (v.numpy() for v in mean_interval(x))
    s, g, n = x.std(0).numpy(), skew(x.numpy(), axis=0, bias=False), len(x)
    q = t.ppf(0.975, n - 1) / n**0.5
    for end, at, side in ((low, q, 1), (high, -q, -1)):
        w = (mean - end) / s
        cubic = w + g * w**2 / 3 + g**2 * w**3 / 27 + g / (6 * n)
        student, hall = np.isclose(w, at, atol=1e-9), np.isclose(cubic, at, atol=1e-9)
        assert (student | hall).all()
        assert (side * w >= side * at - 1e-9).all()  # never nearer than Student's
        assert (side * cubic >= side * at - 1e-9).all()  # nor than Hall's: the cubic grows with w
    assert (high - mean > mean - low).mean() > 0.95  # the longer side is that of the tail


def test_the_ends_of_unequal_weights_solve_halls_cubic() -> None:
    x, w = samples(12), torch.tensor([1.0, 9.0, *[3.0] * 10], dtype=torch.float64)
    mean, low, high = (v.numpy() for v in mean_interval(x * w[:, None], weights=w))
    total, n = w.sum(), len(x)
    each = (
        n * torch.from_numpy(mean) - (n - 1) * ((x * w[:, None]).sum(0) - x * w[:, None]) / (total - w)[:, None]
    ).numpy()
    s, g = each.std(0, ddof=1), skew(each, axis=0, bias=False)
    freedom = float(w.square().sum() ** 2 / w.pow(4).sum() - 1)
    assert freedom < 0.9 * (n - 1)
    q = t.ppf(0.975, freedom) / n**0.5
    for end, at in ((low, q), (high, -q)):
        v = (mean - end) / s
        assert np.allclose(v + g * v**2 / 3 + g**2 * v**3 / 27 + g / (6 * n), at, atol=1e-9)


def test_intervals_turn_shift_and_stretch_with_the_data() -> None:
    x = samples(9)
    mean, low, high = mean_interval(x)
    assert all(torch.allclose(a, b) for a, b in zip(mean_interval(-x), (-mean, -high, -low), strict=True))
    assert all(torch.allclose(a, 7 * b - 5) for a, b in zip(mean_interval(7 * x - 5), (mean, low, high), strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(mean_interval(x.flip(0)), (mean, low, high), strict=True))
    same = mean_interval(x.reshape(9, 6, 10))
    assert all(torch.equal(a.reshape(-1), b) for a, b in zip(same, (mean, low, high), strict=True))


def test_with_weights_it_is_the_ratio_of_sums_and_its_jackknife() -> None:
    x, w = samples(10), torch.arange(3.0, 13.0, dtype=torch.float64)
    total = x * w.unsqueeze(1)
    mean, low, high = mean_interval(total, weights=w)
    assert torch.allclose(mean, total.sum(0) / w.sum())
    without = torch.stack([(total.sum(0) - total[e]) / (w.sum() - w[e]) for e in range(10)])
    pseudo = 10 * mean - 9 * without
    freedom = float((w**2).sum() ** 2 / (w**4).sum()) - 1
    s, g = pseudo.std(0).numpy(), skew(pseudo.numpy(), axis=0, bias=False)
    drop = (mean - low).numpy() / s
    assert np.allclose(
        drop + g * drop**2 / 3 + g**2 * drop**3 / 27 + g / 60, t.ppf(0.975, freedom) / 10**0.5, atol=1e-9
    )
    alike = mean_interval(3 * x, weights=torch.full((10,), 3.0))
    assert all(torch.allclose(a, b) for a, b in zip(alike, mean_interval(x), strict=True))
    every = w.unsqueeze(1).expand(total.shape)
    each = mean_interval(total, weights=every)
    assert all(torch.allclose(a, b) for a, b in zip(each, (mean, low, high), strict=True))
    one = torch.tensor([1e6, *[1.0] * 9], dtype=torch.float64)
    assert bool(mean_interval(total, weights=one)[1].isnan().all())  # that of one example is no interval


def test_differences_are_those_of_each_example() -> None:
    x, c = samples(9), samples(9, seed=2)
    expected = mean_interval(x - c)
    assert all(torch.allclose(a, b) for a, b in zip(difference_interval(x, c), expected, strict=True))
    w, v = (torch.randint(3, 9, (9,), generator=torch.Generator().manual_seed(i)).double() for i in (3, 4))
    value, low, high = difference_interval(x * w[:, None], c * v[:, None], weights=w, control_weights=v)
    assert torch.allclose(value, (x * w[:, None]).sum(0) / w.sum() - (c * v[:, None]).sum(0) / v.sum())
    assert bool(((low < value) & (value < high)).all())
    moved = difference_interval(x + 5, x + 2)  # paired: what both have in common does not widen it
    assert all(torch.allclose(m, torch.full_like(m, 3.0)) for m in moved)


def test_where_nothing_is_known_there_is_no_interval() -> None:
    x = samples(LEAST, 3)
    x[0, 1] = torch.nan
    mean, low, high = mean_interval(x)
    assert low.isnan().tolist() == high.isnan().tolist() == mean.isnan().tolist() == [False, True, False]
    few = mean_interval(samples(LEAST - 1, 3))
    assert bool(few[0].isfinite().all())
    assert bool(few[1].isnan().all())
    equal = mean_interval(torch.full((LEAST, 2), 0.1))
    assert all(torch.allclose(v, torch.full((2,), 0.1).double(), atol=1e-12) for v in equal)
    assert bool(mean_interval(torch.zeros(0, 2))[0].isnan().all())


def test_slopes_are_exact_on_lines_and_have_hc3_errors() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope, low, high = slope_interval(x, -0.7 * x + 2)
    for v in (slope, low, high):
        assert (v + 0.7).abs().max() < 1e-9
    y = 0.4 * x + torch.randn(12, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * (1 + x.abs())
    slope, low, high = slope_interval(x, y)
    for k in range(3):
        design = np.stack([np.ones(12), x[:, k].numpy()], 1)
        bread = np.linalg.inv(design.T @ design)
        beta = bread @ design.T @ y[:, k].numpy()
        left = (y[:, k].numpy() - design @ beta) / (1 - np.einsum("ij,jk,ik->i", design, bread, design))
        error = np.sqrt((bread @ (design * (left**2)[:, None]).T @ design @ bread)[1, 1])
        assert float(slope[k]) == pytest.approx(beta[1])
        assert float(low[k]) == pytest.approx(beta[1] - t.ppf(0.975, 10) * error)
        assert float(high[k]) == pytest.approx(beta[1] + t.ppf(0.975, 10) * error)
    assert bool(slope_interval(torch.ones(8, 2), torch.randn(8, 2))[0].isnan().all())
    one = torch.zeros(8, 1).double()
    one[0] = 1
    assert bool(slope_interval(one, torch.randn(8, 1))[1].isnan().all())  # that of one example
    assert bool(slope_interval(x[:2], x[:2])[0].isnan().all())
    few = slope_interval(x[: LEAST - 1], y[: LEAST - 1])
    assert bool(few[0].isfinite().all())
    assert bool(few[1].isnan().all())


def test_intervals_of_shares_are_those_of_their_papers() -> None:
    low, high = share_interval(3, 10)
    z = norm.ppf(0.975)
    p = (3 + z**2 / 2) / (10 + z**2)
    assert (low, high) == pytest.approx((p - z * (p * (1 - p) / (10 + z**2)) ** 0.5, 2 * p - low))
    assert share_interval(10, 10)[1] == 1.0
    assert 0.6 < share_interval(10, 10)[0] < 0.75
    assert share_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    low, high = share_difference_interval(4, 1, 20)
    assert (low + high) / 2 == pytest.approx(3 / 22)
    assert high - low == pytest.approx(2 * z * (6 / 22 - (3 / 22) ** 2) ** 0.5 / 22**0.5)
    assert share_difference_interval(1, 4, 20) == pytest.approx((-high, -low))
