"""The comparison of effects refuses what is wrong, and what could not have been seen to be wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from tests.agreement import agreed, agreement


def test_a_wrong_effect_is_refused_by_its_name() -> None:
    with agreement(1e-3) as agree:
        agree(0.5, 0.5004, "right")
        with pytest.raises(AssertionError, match=r"cell 7: 0\.002 apart, allowed 1e-03"):
            agree(0.5, 0.502, "cell 7")
    with pytest.raises(AssertionError, match="apart"):
        agreed(torch.ones(3), torch.tensor([1.0, 1.0, 1.1]), 1e-3)


@pytest.mark.parametrize(("size", "passes"), [(0.0, False), (0.009, False), (0.02, True)])
def test_effects_that_do_not_stand_out_are_refused(size: float, passes: bool) -> None:
    effects = np.full(10, size)
    if passes:
        agreed(effects, effects, 1e-3)
        return
    with pytest.raises(AssertionError, match=r"0% of 10 effects .* stand out of 1e-03; needed: 70%"):
        agreed(effects, effects, 1e-3)


def test_most_of_them_are_enough_and_missing_ones_must_be_missing() -> None:
    effects = np.array([1.0, 1.0, 1.0, 0.0, np.nan])
    agreed(xr.DataArray(effects), torch.from_numpy(effects), 1e-3)
    with pytest.raises(AssertionError):
        agreed(effects, np.nan_to_num(effects), 1e-3)
    with pytest.raises(AssertionError):
        agreed(effects[:3], effects[:4], 1e-3)
    with pytest.raises(AssertionError, match="no effect was compared"), agreement(1e-3):
        pass


def test_what_a_cell_reads_is_one_effect() -> None:
    base, value = np.zeros(50), np.zeros(50)
    value[3] = 1.0
    with agreement(1e-3) as agree:
        agree.cell(value, value, base)
    with pytest.raises(AssertionError, match="0% of 1 effects"), agreement(1e-3) as agree:
        agree.cell(value, value, value)
