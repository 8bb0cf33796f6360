"""Sign flips: exact where all signs are tried, and never too sure where nothing is there."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.stream import sign_flip, slope_interval

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
