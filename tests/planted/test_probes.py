"""A planted concept is found where it is written, along the direction it is written in, and shown to be used."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.scripts import script

import microtome as mt
from microtome.planted import Planted, steering
from microtome.probes import Probe

N = 80
NAMES = ("good", "bad")


@cache
def planted() -> Planted:
    return steering(seed=0)


def moods(n: int = N, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with one word of a tone, then neutral words: the last word tells nothing of the tone."""
    truth, rng = planted().truth, np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = NAMES[i % 2]
        word = truth[label][i // 2 % 20]
        rest = rng.choice(truth["neutral"], 4).tolist()
        rows.append({"text": [truth["bos"], word, *rest], "label": label, "group": str(word)})
    return rows


@cache
def linear() -> Probe:
    truth = planted().truth
    return mt.probes.fit(
        planted().model, moods(), site="0.resid_pre@-1,0-1.resid_post@-1",
        answer=truth["good"][0], foil=truth["bad"][0], target="good",
    )  # fmt: skip


def test_it_is_told_from_where_it_is_written_on() -> None:
    scores = linear().scores
    before, after = scores["accuracy"].sel(site="resid_pre@-1"), scores["accuracy"].sel(site="resid_post@-1")
    assert float(before[0]) < 0.7
    assert (
        float(scores["accuracy_lo"].sel(site="resid_pre@-1")[0])
        < 0.5
        < float(scores["accuracy_hi"].sel(site="resid_pre@-1")[0])
    )
    assert after.values.tolist() == [1.0, 1.0]
    assert np.isnan(before[1]), "the site was asked for in layer 0 alone"
    assert float(scores["control_task"].sel(site="resid_post@-1").max()) < 0.8
    assert (scores["accuracy_lo"].sel(site="resid_post@-1") > scores["control_task_hi"].sel(site="resid_post@-1")).all()
    assert scores["selectivity"].isnull().all(), "no text repeats over folds: the control task could be no more"
    assert "no type repeats over folds" in scores.attrs["control_types"]
    assert float(scores["majority"]) == pytest.approx(0.5, abs=0.1)


def test_where_types_repeat_the_control_task_learns_them_and_there_is_a_selectivity() -> None:
    rows = [row | {"type": str(row["text"][-1])} for row in moods()]
    scores = mt.probes.probe(planted().model, rows, site="0.resid_post@-1", untrained=False)
    assert float(scores.attrs["control_types"].split()[0]) > 0.8
    assert float(scores["control_task"][0]) > 0.6
    assert float(scores["selectivity"][0]) == pytest.approx(float(scores["accuracy"][0] - scores["control_task"][0]))
    assert -1 <= float(scores["selectivity_lo"][0]) <= float(scores["selectivity_hi"][0]) <= 1


@pytest.mark.parametrize(("kind", "least"), [("mass-mean", 0.98), ("linear", 0.98), ("sparse", 0.5)])
def test_its_direction_is_the_one_it_is_written_in(kind: str, least: float) -> None:
    options = {"k": 12} if kind == "sparse" else {}
    found = mt.probes.fit(planted().model, moods(), site="0.resid_post@-1", kind=kind, untrained=False, **options)
    cosine = found.direction(0, "good") @ planted().truth["direction"].double()
    assert float(cosine) > least
    assert float(found.direction(0, "bad") @ planted().truth["direction"].double()) == pytest.approx(-float(cosine))


def test_it_is_used_and_a_random_direction_is_not() -> None:
    scores = linear().scores.sel(site="resid_post@-1", layer=0)
    for way in ("adding", "ablating", "patching"):
        assert float(scores[f"{way}_lo"]) > 3 * abs(float(scores[f"{way}_random"])), way
        assert float(scores[f"{way}_p_value"]) == pytest.approx(1 / 21), way
        assert float(scores[f"{way}_diff_lo"]) > 0, way
    # From one tone to the other is twice as far as from it to neither.
    assert float(scores["patching"]) == pytest.approx(2 * float(scores["ablating"]), rel=0.15)
    before = linear().scores.sel(site="resid_pre@-1", layer=0)
    assert min(float(before[f"{way}_p_value"]) for way in ("adding", "ablating", "patching")) > 0.1
    assert abs(float(before["adding"])) < 0.05, "nothing is there to move"


def test_its_edits_do_what_was_measured() -> None:
    truth, model = planted().truth, planted().model
    good, bad = truth["good"], truth["bad"]
    prompt = [truth["bos"], bad[0], *truth["neutral"][:4]]
    turned = model.run([prompt], edits=linear().edit(0, "good", site="resid_post", positions="-1"))
    plain = model.run([prompt])
    gap = [float(run.logits[0, -1, good].mean() - run.logits[0, -1, bad].mean()) for run in (plain, turned)]
    assert gap[0] < -1 < 1 < gap[1]
    without = model.run([prompt], edits=linear().edit(0, "good", site="resid_post", ablate=True))
    none = without.logits[0, -1]
    assert abs(float(none[good].mean() - none[bad].mean())) < 0.5 * abs(gap[0])


def test_a_planted_concept_scores_1_and_random_directions_half() -> None:
    truth = planted().truth
    rows = [row | {"label": row["label"] if row["label"] == "good" else "random"} for row in moods()]
    found = mt.probes.fit(
        planted().model, rows, site="0.resid_post@-1", kind="concept", target="good", splits=200, untrained=False,
        answer=truth["good"][0], foil=truth["bad"][0],
    )  # fmt: skip
    scores = found.scores.sel(layer=0)
    assert float(scores["score"]) == 1.0
    assert float(scores["score_random"]) == pytest.approx(0.5, abs=0.12)
    assert float(scores["concept_p_value"]) < 0.05
    assert float(scores["sensitivity"]) > 2 * float(scores["sensitivity_random"])


def test_a_label_that_nothing_holds_is_at_chance_everywhere() -> None:
    rng = np.random.default_rng(1)
    names = {str(word): rng.choice(["a", "b"]) for side in NAMES for word in planted().truth[side]}
    rows = [row | {"label": names[row["group"]]} for row in moods()]
    scores = mt.probes.probe(planted().model, rows, untrained=False)
    assert (scores["accuracy_lo"] < 0.5).all()
    assert (scores["accuracy_hi"] > 0.5).all()


def test_a_small_network_reads_it_too_and_its_probe_is_kept_whole(tmp_path: Any) -> None:
    for kind in ("mlp", "kan"):
        found = mt.probes.fit(
            planted().model, moods(40), site="0.resid_post@-1", kind=kind, hidden=4, folds=2, untrained=False
        )
        assert float(found.scores["accuracy"][0]) > 0.9, kind
        found.save(tmp_path / "probe.safetensors")
        again = Probe.load(tmp_path / "probe.safetensors", planted().model)
        texts = [row["text"] for row in moods(8, seed=3)]
        assert torch.equal(again.logits(planted().model, texts, 0), found.logits(planted().model, texts, 0))
        assert again.predict(planted().model, texts, 0) == [NAMES[i % 2] for i in range(8)]
        with pytest.raises(mt.errors.ArgumentError, match=f"a probe of the kind {kind} has no one direction"):
            found.direction(0)


@pytest.mark.slow
def test_the_case_of_the_table_finds_all_and_nothing_else() -> None:
    found = script("tools/planted_cases/probes.py").tone_of_a_text()
    assert (found["found"], found["false"]) == ("8 of 8", "0 of 8")
