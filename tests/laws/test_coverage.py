"""Intervals hold the truth in 93 to 97.5 of a hundred samples, at every number of examples that a default gives.

Each simulated share has a standard error of 0.13 % or less, so that what lies within the promise by half a percent, as
all do, is not so by chance.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.scripts import ROOT, script

from microtome.stream import LEAST

BENCH = script("benchmarks/coverage.py")
DEFAULTS = list(BENCH.defaults())
PROMISED = [law for law, (_, _, promised) in BENCH.LAWS.items() if promised]
LOW, HIGH = 0.93, 0.975
SAMPLES = 40_000


def test_the_defaults_are_those_of_the_methods() -> None:
    assert min(DEFAULTS) == LEAST
    assert {8, 10, 16, 20, 50, 78} <= set(DEFAULTS)
    assert any("skew" in law for law in PROMISED)
    assert any("zeros" in law for law in PROMISED)


@pytest.mark.parametrize("law", PROMISED)
@pytest.mark.parametrize("n", DEFAULTS)
def test_means(law: str, n: int) -> None:
    assert LOW <= BENCH.of_means(law, n, SAMPLES) <= HIGH


@pytest.mark.parametrize("weights", BENCH.WEIGHTS)
@pytest.mark.parametrize("n", DEFAULTS)
def test_means_of_examples_of_unequal_length(weights: str, n: int) -> None:
    for law in (law for law in PROMISED if law not in BENCH.EVEN_ONLY):
        assert LOW <= BENCH.of_weighted(law, weights, n, SAMPLES) <= HIGH, law


@pytest.mark.parametrize("n", DEFAULTS)
def test_shares_of_a_mean_gap_and_slopes(n: int) -> None:
    assert LOW <= BENCH.of_ratios(n, SAMPLES) <= HIGH
    for noise in BENCH.NOISES:
        assert LOW <= BENCH.of_slopes(noise, n, SAMPLES) <= HIGH, noise


@pytest.mark.parametrize("n", DEFAULTS)
def test_shares_of_successes_exactly(n: int) -> None:
    chances = BENCH.of_shares(n, np.linspace(0.001, 0.999, 999))
    assert LOW <= chances.mean() <= HIGH
    assert chances.min() >= 0.91  # shares are discrete: no interval of fixed ends holds 93 % at each without excess
    assert LOW <= BENCH.of_share_differences(n, 100).mean() <= HIGH


def test_below_the_least_nothing_covers_zero_inflated_data() -> None:
    """Why there is no interval of fewer: Student's t of four values, half of them zeros, covers four fifths."""
    import torch

    from microtome.stream import mean_interval

    draw, mean, _ = BENCH.LAWS["half zeros, else exponential"]
    x = draw(np.random.default_rng(0), (4, SAMPLES))
    half = 3.1824 * x.std(0, ddof=1) / 2
    assert 0.75 < (abs(x.mean(0) - mean) <= half).mean() < 0.81
    for n in range(1, LEAST):
        value, low, high = mean_interval(torch.ones(n, 2))
        assert bool((value == 1).all())
        assert bool(low.isnan().all())
        assert bool(high.isnan().all())


def test_the_table_of_the_documentation_is_what_was_measured_with_these_defaults() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())
    assert found["examples"] == {str(n): what for n, what in BENCH.defaults().items()}, "run benchmarks/coverage.py"
    page = (ROOT / "docs" / "statistics.md").read_text()
    assert BENCH.table(found) in page, "copy the table that benchmarks/coverage.py prints"
    for row in found["rows"]:
        if row["promised"]:
            assert all(LOW - 0.0005 <= x <= HIGH for x in row["coverage"].values()), row
