"""Learning in context on the default model: which recipes do a task without demonstrations, and what rounds change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import microtome as mt

pytestmark = [pytest.mark.real, pytest.mark.slow]
DATA = Path(os.environ.get("MICROTOME_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


def task(name: str) -> str:
    place = DATA / "icl" / f"abstractive__{name}.json"
    if not place.exists():
        pytest.skip(f"no {place}")
    return str(place)


def test_the_best_heads_scaled_put_verbs_into_the_past_and_random_heads_do_not(model: mt.Model) -> None:
    data = mt.explain.task_vectors(model, task("present-past"), samples=6, tests=20)
    scaled = data.sel(recipe="heads scaled")
    assert float(data["zero_shot"]) < 0.1
    assert float(data["few_shot"]) > 0.9
    assert float(scaled["accuracy"]) > 0.4
    assert float(scaled["control_accuracy"]) < 0.1
    assert float(scaled["gain_diff_lo"]) > 4
    assert float(data["accuracy"].sel(recipe="heads")) < float(scaled["accuracy"])


def test_one_round_is_what_demonstrations_do(model: mt.Model) -> None:
    data = mt.explain.forward_tuning(model, task("present-past"), rounds=2, draws=1, tests=8)
    assert float(data["accuracy"].sel(round=1)) > 0.7 > float(data["zero_shot"])
    assert float(data["moved"].sel(round=2)) > 0.0005


def test_heads_of_sums_are_partly_those_of_later_years(model: mt.Model) -> None:
    results = [
        mt.explain.attribute(model, mt.tasks.build(name, model, 24), sites=["attn.z[head]"], verify=0)
        for name in ("addition", "greater_than")
    ]
    shared = mt.explain.transfer(*results, "attn.z[head]", top=20)
    assert float(shared["overlap"]) > 2 * float(shared["overlap_chance"])
    assert float(shared["rank_correlation"]) > 0.2


def test_tuned_heads_learn_and_the_model_stays(model: mt.Model) -> None:
    pairs, before = mt.tasks.build("addition", model, 12), model.fingerprint
    data = mt.training.tune(model, pairs, ["23.attn.z[3]", "20.attn.z[6]"], steps=4, batch=4, sets=1, tokens=256)
    assert model.fingerprint == before
    assert np.isfinite(data["gain"]).all()
    assert (data["forgetting"] < 0.2).all()
