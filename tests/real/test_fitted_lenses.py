"""On the default model: lenses of heads and of tokens further ahead, their controls; causal directions; exits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import microtome as mt

pytestmark = [pytest.mark.real, pytest.mark.slow]
DATA = Path(os.environ.get("MICROTOME_DATA", Path(__file__).parents[3] / "shared" / "data"))
FEW: dict[str, Any] = {"tokens": 8_192, "share": 0.05, "held_out": 1_024, "optimizer": "adamw"}


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


@pytest.fixture(scope="module")
def text() -> Path:
    place = DATA / "wikitext2" / "valid.txt"
    if not place.exists():
        pytest.skip(f"no {place}")
    return place


def test_heads_read_better_through_their_own_maps(model: mt.Model, text: Path) -> None:
    lens = mt.explain.fit_lens(model, text, kind="heads", layers=[20], rank=8, **FEW)
    assert float(lens.kl["gain_lo"].min()) > 0
    assert float((lens.kl["kl_other_head"] - lens.kl["kl"]).mean()) > 0


@pytest.mark.parametrize("ahead", [2, 3])
def test_tokens_further_ahead_are_read_better_than_by_the_logit_lens(model: mt.Model, text: Path, ahead: int) -> None:
    lens = mt.explain.fit_lens(model, text, ahead=ahead, layers=[10, 29], **FEW)
    assert float(lens.kl["gain_lo"].min()) > 0
    data = mt.explain.lens(
        model, "The capital of France is Paris, and the capital of Italy is", kind="ahead", lens=lens
    )
    assert data["kl"].mean() < data["logit_lens_kl"].mean()


def test_directions_that_matter_to_the_lens_matter_to_the_model(model: mt.Model, text: Path) -> None:
    data = mt.explain.causal_basis(model, layer=20, text=text, directions=2, size=128, steps=1)
    assert (data["influence"] > 5 * data["random_influence"]).all()
    assert float(data["model_influence"][0]) > 5 * float(data["random_model_influence"])


def test_a_capital_is_likely_at_late_exits_alone(model: mt.Model) -> None:
    prompts = ["The capital of France is", "The capital of Italy is", "The capital of Japan is"]
    data = mt.explain.exits(model, prompts, tokens=[[" Paris"], [" Rome"], [" Tokyo"]], size=256)
    assert float(data["share"].sel(layer=29)) > 0.2
    assert float(data["share"].sel(layer=10)) < 0.01
    assert float(data["share_other"].max()) < 0.05
    assert float(data["rank"].sel(layer=29)) < 5


def test_false_demonstrations_do_not_decidedly_mislead_a_small_model(model: mt.Model) -> None:
    place = DATA / "icl" / "abstractive__sentiment.json"
    if not place.exists():
        pytest.skip(f"no {place}")
    pairs = [(item["input"], item["output"]) for item in json.loads(place.read_text(encoding="utf-8"))]
    data = mt.explain.false_demonstrations(model, pairs, shots=6, tests=24, controls=2)
    assert data["true_accuracy"].sizes["layer"] == 30
    assert float(data["gap_lo"]) < 0 < float(data["gap_hi"]), "24 questions do not decide it"
    assert data.attrs["parts_at"] == "nowhere"
    assert abs(float(data["gap_without"]) - float(data["gap_random"])) < 0.25
