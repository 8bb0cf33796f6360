"""Heads of the default model: what is known of such models is found, and the parts agree with one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import microtome as mt
from microtome.measurements import (
    commit,
    dependency_heads,
    head_types,
    norm_parts,
    relation_damage,
    relation_scores,
    verify_commit,
)

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


@pytest.mark.slow
def test_induction_heads_recall_what_followed_and_copy_it(model: mt.Model) -> None:
    """Heads that attend to what followed the token before are like recall by context, and most of them copy."""
    data = mt.measure(model, "induction", "repeat_lags", "ov_copying", sequences=8, period=40)
    strong = data["induction_diff"].values > 0.5
    assert strong.sum() >= 3
    assert np.median(data["cmr_distance"].values[strong]) < 0.1 < np.median(data["cmr_distance"].values[~strong])
    assert np.median(data["ov_copying"].values[strong]) > 0.8
    assert head_types(data)["heads"].sel(kind="induction") >= strong.sum()


@pytest.mark.slow
def test_some_head_maps_countries_to_their_capitals_far_above_other_countries(model: mt.Model) -> None:
    from microtome.measurements._relations import RELATIONS

    data = relation_scores(model, {"capital": RELATIONS["capital"]})
    assert int(data["pairs"][0]) >= 20
    best, chance = (float(data[name].max()) for name in ("maps", "maps_shuffled"))
    assert best > 0.3 > chance


def test_a_commitment_of_the_model_knows_its_prompt(model: mt.Model) -> None:
    tokens = torch.randint(1000, 40_000, (2, 64), generator=torch.Generator().manual_seed(0))
    runs = [model.run(row, capture="final", logits=False) for row in (tokens[:1], tokens, tokens[1:])]
    made = commit(runs[0])
    assert verify_commit(made, runs[1], row=0).passes
    assert not verify_commit(made, runs[2]).passes


@pytest.mark.slow
def test_some_head_looks_from_verbs_to_subjects_far_above_any_offset(model: mt.Model) -> None:
    data = dependency_heads(model, count=48)
    for relation in ("nsubj", "obj", "det"):
        assert float(data["best_diff_lo"].sel(relation=relation)) > 0.2, relation
    assert float(data["accuracy"].sel(relation="nsubj").median()) < 0.5


@pytest.mark.slow
def test_capitals_are_lost_with_the_heads_whose_weights_map_them(model: mt.Model) -> None:
    from microtome.measurements._relations import RELATIONS

    data = relation_damage(model, {name: RELATIONS[name] for name in ("capital", "past")}, prompts=10, controls=3)
    own = data.sel(relation="capital")
    assert float(own["damage_diff_lo"]) > 1
    assert int(own["own_rank"]) == 1
    assert abs(float(own["damage_random"])) < 0.5


@pytest.mark.slow
def test_without_scaling_one_long_token_outscores_all_others(model: mt.Model) -> None:
    """What the norm's scaling is for: the sink's activations would be selected by any other input's direction."""
    tokens = torch.randperm(40_000, generator=torch.Generator().manual_seed(0))[:48].unsqueeze(0) + 1000
    data = norm_parts(model, tokens, layers=[20])
    assert float(data["selects_itself"].sel(part="none").max()) < 0.2
    assert float(data["selects_itself"].sel(part="scaling").min()) == 1
