"""Results that are equal share all of what matters, and shuffled ones what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import microtome as mt


def result(values: np.ndarray, model: str = "a") -> xr.Dataset:
    return xr.Dataset({"total": (("layer", "head"), values)}, attrs={"fingerprint": model})


def test_equal_results_share_all_and_shuffled_ones_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10, 10)) ** 3
    same = mt.explain.transfer(result(values), result(-values), "total", top=10)
    assert float(same["overlap"]) == 1.0
    assert float(same["rank_correlation"]) == pytest.approx(1.0)
    assert float(same["p"]) == pytest.approx(1 / 17310309456440, rel=1e-6)  # one of (100 choose 10) sets
    assert float(same["carried"]) > 3
    shares = []
    for seed in range(200):
        shuffled = np.random.default_rng(seed).permutation(values.ravel()).reshape(10, 10)
        one = mt.explain.transfer(result(values), result(shuffled), "total", top=10)
        assert float(one["overlap_chance"]) == 0.1
        shares.append(float(one["overlap"]))
    assert np.mean(shares) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("other", "name", "match"),
    [
        (result(np.ones((10, 10))), "direct", 'a result has no "direct"; got total'),
        (result(np.ones((2, 10))), "total", "not of the same places of one model"),
        (result(np.ones((10, 10))).rename(head="neuron"), "total", "not of the same places of one model"),
        (result(np.ones((10, 10))).transpose(), "total", "not of the same places of one model"),
        (result(np.ones((10, 10))).assign_coords(layer=range(2, 12)), "total", "not of the same places of one model"),
        (result(np.ones((10, 10)), "b"), "total", "not of the same places of one model"),
        (result(np.full((10, 10), np.nan)), "total", "too few places to compare; got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: xr.Dataset, name: str, match: str) -> None:
    with pytest.raises(mt.errors.DataError, match=match):
        mt.explain.transfer(result(np.ones((10, 10))), other, name, top=5)
