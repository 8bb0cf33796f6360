"""Verifying scores: exact ones are found right, reversed ones wrong, and a sample stands for what was not measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests import families
from tests.agreement import agreed, agreement

import microtome as mt
from microtome.explain import graph
from microtome.explain._verify import candidates, rank_correlation, recall

CLEAN, CORRUPT = [7, 20, 33, 41, 52, 28], [7, 20, 64, 41, 52, 28]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def attributed(model: mt.Model, **more: Any) -> Any:
    given: dict[str, Any] = {"answer": 11, "foil": 13, "direction": "noise"}
    return mt.explain.attribute(model, CLEAN, CORRUPT, **(given | more))


def test_exact_scores_agree_and_reversed_ones_do_not(model: mt.Model) -> None:
    known = attributed(model, sites=["attn.z[head]"], verify=12)
    exact = known["attn.z[head]_exact"]
    assert int(exact.notnull().sum()) == 12
    perfect = mt.explain.verify(model, known.assign({"attn.z[head]": exact}), top=4)
    assert float(perfect["rank_correlation"][0]) == pytest.approx(1)
    assert float(perfect["recall"][0]) == 1
    # The largest effect gets the smallest score, with its sign kept.
    wrong = mt.explain.verify(model, known.assign({"attn.z[head]": np.sign(exact) / (1 + 100 * abs(exact))}), top=6)
    assert float(wrong["recall"][0]) == 0
    # Among effects of one sign the order can be reversed whole: both measures are as low as they can be.
    positive = exact.where(exact > 0)
    n = int(positive.notnull().sum())
    assert n >= 4
    reversed_ = mt.explain.verify(model, known.assign({"attn.z[head]": 1 / (1 + 100 * positive)}), top=n // 2)
    assert float(reversed_["recall"][0]) == 0
    assert float(reversed_["rank_correlation"][0]) == pytest.approx(-1)
    negated = mt.explain.verify(model, known.assign({"attn.z[head]": -exact}), top=6)
    assert float(negated["rank_correlation"][0]) == pytest.approx(-1)
    assert float(negated["recall"][0]) == 1  # the sizes are right


def test_measured_cells_are_the_patched_runs(model: mt.Model) -> None:
    data = attributed(model, verify=3)
    source = model.run(CORRUPT, capture="*.mlp_out")
    patched = mt.explain.patch(model, CLEAN, CORRUPT, answer=11, foil=13, direction="noise")
    width = data["corrupt"] - data["clean"]
    for site in data.attrs["sites"]:
        found = data[f"{site}_exact"]
        assert int(found.notnull().sum()) == 6 == int(data["measured"].sel(site=site))
        with agreement(2e-5, most=0.5) as agree:
            agree(found, (patched[site] * width).where(found.notnull()), site)
        best = abs(data[site]).values.argmax()
        assert np.isfinite(found.values.reshape(-1)[best])
    assert data.attrs["verified_top"] == 3
    assert source.tokens.shape[1] == len(CORRUPT)


def test_edges_are_measured_as_edge_cells(model: mt.Model) -> None:
    with mt.settings(seed=3):
        data = attributed(model, method="eap", verify=5, direction="denoise")
        again = attributed(model, method="eap", verify=5, direction="denoise")
    source = model.run(CLEAN, capture=["embed", "*.attn.z", "*.mlp_out"])
    measured = data["score_exact"].stack(edge=("sender", "receiver")).dropna("edge")
    assert measured.sizes["edge"] == 10
    cells = [mt.sweep.Edge(str(s), str(r), source=source) for s, r in measured["edge"].values]
    effects = model.sweep(CORRUPT, cells, mt.metric.LogitDifference(11, foil=13)).run().effects
    agreed(measured, effects, 1e-5)
    assert again.drop_attrs().identical(data.drop_attrs())
    assert data.attrs["seed"] == 3
    with mt.settings(seed=4):
        changed = mt.explain.verify(model, again, top=5)
    assert changed.attrs["seed"] == 4
    other = changed["score_exact"]
    assert not other.equals(data["score_exact"])  # other random others


def test_sites_of_few_cells_are_measured_whole(model: mt.Model) -> None:
    data = attributed(model, sites=["resid_pre", "attn.k[head]"])
    assert data["measured"].values.tolist() == [18, 6]
    assert data.attrs["verified_top"] == 18
    assert data["attn.k[head]_exact"].notnull().all()
    assert np.isnan(float(data["rank_correlation_others"][0]))  # nothing was left


def test_a_stopped_verification_says_only_what_it_measured(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.sweep._sweep._step", lambda *given: 4)
    scores = attributed(model, sites=["attn.z[head]", "mlp_out"], verify=0)

    def stop(stage: str, done: int, everything: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    whole = mt.explain.verify(model, scores, top=5)
    with mt.settings(progress=stop):
        stopped = mt.explain.verify(model, scores, top=5)
    assert whole["measured"].values.tolist() == [10, 10]
    assert int(stopped["measured"].sum()) == 12
    for site in ("attn.z[head]", "mlp_out"):
        found = int(stopped[f"{site}_exact"].notnull().sum())
        assert int(stopped["measured"].sel(site=site)) == found
        for name in ("recall", "rank_correlation", "rank_correlation_others"):
            one, same = (float(data[name].sel(site=site)) for data in (stopped, whole))
            assert one == same if found == 10 else np.isnan(one)


def test_nothing_given_is_changed(model: mt.Model) -> None:
    scores = attributed(model, verify=0)
    before = scores.copy(deep=True)
    mt.explain.verify(model, scores, top=2)
    assert scores.identical(before)
    assert "recall" not in scores


def test_rank_correlation_shares_ranks_between_ties() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 90.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([9.0, 2.0, 1.0])) == pytest.approx(-1)
    assert rank_correlation(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(3**0.5 / 2)
    assert np.isnan(rank_correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])))
    assert np.isnan(rank_correlation(np.array([1.0]), np.array([1.0])))


def test_recall_counts_what_is_missed() -> None:
    assert recall(np.array([5.0, -4.0]), np.array([3.0, 0.0]), 4) == 1
    assert recall(np.array([5.0, 1.0]), np.array([-3.0, 0.0]), 4) == 0.5
    assert recall(np.array([1.0, 0.5]), np.array([-3.0, 2.0]), 4) == 0
    # One of two sampled others is larger than both of the best; it stands for 4 of the 8 that were not looked at.
    assert recall(np.array([2.0, 1.0]), np.array([3.0, 0.0]), 10) == 0
    assert recall(np.arange(10.0, 0.0, -1.0), np.array([5.5]), 15) == pytest.approx(0.5)
    assert recall(np.array([2.0, 1.0]), np.array([]), 2) == 1


def test_recall_from_a_sample_is_right_on_average() -> None:
    random = np.random.default_rng(0)
    exact = random.normal(size=400)
    scores = exact + random.normal(size=400)
    best, _ = candidates(scores, 40, random)
    truth = len(set(best) & set(np.argsort(-abs(exact))[:40])) / 40
    estimates = []
    for seed in range(200):
        _, others = candidates(scores, 40, np.random.default_rng(seed))
        estimates.append(recall(exact[best], exact[others], 400))
    assert 0.1 < truth < 0.9
    assert np.mean(estimates) == pytest.approx(truth, abs=0.06)
    assert recall(exact[best], np.delete(exact, best), 400) == pytest.approx(truth)


def test_candidates_are_the_largest_and_never_what_is_no_cell() -> None:
    scores = np.array([1.0, np.nan, -5.0, 2.0, 0.0, np.nan])
    best, others = candidates(scores, 2, np.random.default_rng(0))
    assert best.tolist() == [2, 3]
    assert set(others) == {0, 4}


def test_what_cannot_be_verified_is_refused(model: mt.Model) -> None:
    scores = attributed(model, verify=0, method="eap")
    other = mt.open(families.build("llama-mha"), prove=False)
    with pytest.raises(
        mt.errors.DataError, match=r"these scores come from another model; got .*; allowed: .*open that"
    ):
        mt.explain.verify(other, scores)
    n = graph(model).n_edges
    with pytest.raises(
        mt.errors.DataError, match=f"cannot verify that many candidates; got top={n + 1}; allowed: 1 to {n}"
    ):
        mt.explain.verify(model, scores, top=n + 1)
    with pytest.raises(mt.errors.ArgumentError, match=r"top must be an integer of 1 or more \(cells\); got 0"):
        mt.explain.verify(model, scores, top=0)
    patched = mt.explain.patch(model, CLEAN, CORRUPT, answer=11, foil=13)
    with pytest.raises(mt.errors.DataError, match="not scores that can be verified; got a dataset without clean_ids"):
        mt.explain.verify(model, patched)


def test_scores_are_verified_by_their_labels_however_they_are_cut_or_turned(model: mt.Model) -> None:
    known = attributed(model, verify=200)  # all cells
    cells = {"mlp_out": ("layer", "pos"), "attn.z[head]": ("layer", "head")}
    parts = (
        known.isel(layer=[1, 2]),
        known.isel(layer=slice(None, None, -1)),
        known.isel(pos=[2, 5], head=[3, 1]),
        known.transpose("pos", "head", "layer", ...),
    )
    for part in parts:
        checked = mt.explain.verify(model, part, top=6)
        for site, dims in cells.items():
            found = checked[f"{site}_exact"].transpose(*dims)
            assert int(found.notnull().sum()) >= 6
            gap = abs(found - known[f"{site}_exact"].sel({dim: found[dim] for dim in dims}))  # by label
            assert float(gap.max()) < 1e-5, site
    edges = attributed(model, method="eap", verify=20)
    turned = mt.explain.verify(
        model, edges.transpose("receiver", "sender", ...).isel(sender=slice(None, None, -1)), top=20
    )
    both = turned["score_exact"].notnull() & edges["score_exact"].notnull()
    assert int(both.sum()) >= 20
    assert float(abs(turned["score_exact"] - edges["score_exact"]).max()) < 1e-5
    with pytest.raises(mt.errors.DataError, match=r"do not say what they are of; got no labels along layer"):
        mt.explain.verify(model, known.drop_vars("layer"), top=4)


def test_as_many_are_measured_as_the_site_of_most_cells_has(model: mt.Model) -> None:
    scores = attributed(model, verify=0, sites=["resid_pre", "attn.z[head]"])
    counts = [int(np.isfinite(scores[site].values).sum()) for site in scores.attrs["sites"]]
    assert max(counts) > min(counts)
    assert mt.explain.verify(model, scores, top=max(counts)).attrs["verified_top"] == max(counts)
    with pytest.raises(mt.errors.DataError, match=f"got top={max(counts) + 1}; allowed: 1 to {max(counts)}"):
        mt.explain.verify(model, scores, top=max(counts) + 1)
