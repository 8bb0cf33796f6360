"""Sinks, massive activations and stages of depth of the default model: what holds of it, and its controls."""

from __future__ import annotations

import numpy as np
import pytest

import microtome as mt

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(prove=False)


def test_first_tokens_are_sinks_where_they_are_massive(model: mt.Model) -> None:
    data = mt.measure(model, "sinks", "massive_tokens", tokens=2_000)
    massive = data["massive_first"].values == 1
    massive[:3] = False  # an activation of the row's first token, but not yet a large one
    assert massive.sum() > 10
    above = data["sink_attention_diff"].mean("head").values
    after = np.flatnonzero(massive[:-1]) + 1  # what a layer writes is read by the next
    assert (above[after] > 0.15).all()
    assert (abs(above[:2]) < 0.1).all()
    assert (data["value_drain"].min("head").values[after] < 0.5).all()
    assert np.allclose(data["value_drain_elsewhere"].median("head"), 1, atol=0.4)


def test_secondary_sinks_end_where_the_first_token_is_massive(model: mt.Model) -> None:
    found = mt.measurements.secondary_sinks(model, sequences=12)
    assert found.sizes["sink"] > 3
    assert int((found["birth"] + found["lifetime"]).max()) < 13
    assert (found["made_by"] < found["birth"]).all()
    assert float(found["made_cos"].min()) > 0.5


def test_neurons_are_aligned_far_beyond_mismatched_ones(model: mt.Model) -> None:
    data = mt.measure(model, "io_classes")
    assert np.allclose(data["beyond_in_out_mismatched"].mean(), 0.05, atol=0.03)
    assert (data["beyond_in_out"] > data["beyond_in_out_mismatched"]).mean() > 0.9
    shares = data["class_share"].values  # conditional strengthening comes early, conditional weakening late
    assert shares[3:15, 1].mean() > 5 * shares[20:, 1].mean()
    assert shares[15:25, 4].mean() > 2 * shares[:10, 4].mean()
