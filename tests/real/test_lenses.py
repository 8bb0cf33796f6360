"""On the default model: what a context and demonstrations leave in the weights and in the stream."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import microtome as mt

pytestmark = pytest.mark.real
DATA = Path(os.environ.get("MICROTOME_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


def test_the_context_is_a_change_of_weights(model: mt.Model) -> None:
    data = mt.explain.context_update(
        model, "Berlin is in Germany. Rome is in Italy. Madrid is in", " Spain. Paris is in"
    )
    assert float(data["error"].max()) < 1e-4
    assert float(data["unchanged_error"].min()) > 0.05
    assert float(data["norm_error"].median()) > 10 * float(data["error"].median())
    assert float(data["kl"]) < 1e-3 < 0.1 < float(data["unchanged_kl"])
    assert data.attrs["answer"] == " France"


def test_the_state_that_demonstrations_leave_names_capitals_without_one(model: mt.Model) -> None:
    place = DATA / "icl" / "abstractive__country-capital.json"
    if not place.exists():
        pytest.skip(f"no {place}")
    pairs = [(item["input"], item["output"]) for item in json.loads(place.read_text(encoding="utf-8"))]
    data = mt.explain.function_vector(model, pairs, tests=32, samples=8, controls=2)
    assert float(data["with_state"]) > float(data["zero_shot"]) + 0.1
    assert float(data["with_state_diff_lo"]) > 0
