"""Many pairs: each is what it is alone, and the mean comes with what is known of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests import families

import microtome as mt

CLEAN = [[7, 20, 33, 41, 52], [9, 21, 34, 42, 53, 60, 61], [8, 22, 35, 43, 54], [6, 23, 36, 44, 55, 66]]
CORRUPT = [[7, 20, 64, 41, 52], [9, 71, 72, 42, 53, 60, 61], [8, 22, 65, 43, 54], [6, 73, 36, 44, 55, 66]]
ANSWERS, FOILS = [11, 12, 17, 14], [15, 16, 13, 18]  # all gaps are above 0
SPANS = [
    {"subject": (2, 3), "last": (4, 5)},
    {"subject": (1, 3), "last": -1, "other": 5},
    {"last": 4, "subject": 2},
    {"subject": (1, 2), "last": (5, 6)},
]
SITES = ["resid_pre", "mlp_out", "attn.z[head]", "attn.v[head]", "attn.pattern[head]"]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"))


def difference(model: mt.Model, i: int, tokens: list[int], edits: list[mt.edit.Edit] | None = None) -> float:
    logits = model.run([tokens], edits=edits or []).logits[0, -1]
    return float(logits[ANSWERS[i]] - logits[FOILS[i]])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_pair_is_its_literal_forwards(model: mt.Model, direction: str) -> None:
    data = mt.explain.patch_pairs(
        model, CLEAN, CORRUPT, answers=ANSWERS, foils=FOILS, spans=SPANS, sites=SITES, direction=direction, share=False
    )
    assert data["span"].values.tolist() == ["subject", "last"]
    assert data["mlp_out"].dims == ("layer", "span")
    assert data["attn.v[head]_each"].dims == ("example", "layer", "kv_head")
    at = [("2", "4"), ("1-2", "6"), ("2", "4"), ("1", "5")]
    for i in range(4):
        start, goal = (CORRUPT[i], CLEAN[i]) if direction == "denoise" else (CLEAN[i], CORRUPT[i])
        source = model.run([goal], capture=["*.resid_pre", "*.mlp_out", "*.attn.z", "*.attn.v", "*.attn.pattern"])
        began = difference(model, i, start)
        for site, value in (
            (f"1.resid_pre@{at[i][0]}", data["resid_pre_each"][i, 1, 0]),
            (f"2.mlp_out@{at[i][1]}", data["mlp_out_each"][i, 2, 1]),
            ("1.attn.z[3]", data["attn.z[head]_each"][i, 1, 3]),
            ("2.attn.pattern[1]", data["attn.pattern[head]_each"][i, 2, 1]),
            ("0.attn.v[1]", data["attn.v[head]_each"][i, 0, 1]),
        ):
            literal = difference(model, i, start, [mt.edit.Patch(site, source=source)])
            assert float(value) == pytest.approx(literal - began, abs=1e-4)
        assert float(data["clean"][i]) == pytest.approx(difference(model, i, CLEAN[i]), abs=1e-4)
        assert float(data["corrupt"][i]) == pytest.approx(difference(model, i, CORRUPT[i]), abs=1e-4)


def test_a_pair_is_what_it_is_alone(model: mt.Model) -> None:
    some = [0, 2]
    data = mt.explain.patch_pairs(
        model, [CLEAN[i] for i in some], [CORRUPT[i] for i in some], answers=[ANSWERS[i] for i in some],
        foils=[FOILS[i] for i in some], sites=["resid_mid"],
    )  # fmt: skip
    gaps = data["clean"] - data["corrupt"]
    for example, i in enumerate(some):
        alone = mt.explain.activation_patching(
            model, CLEAN[i], CORRUPT[i], answer=ANSWERS[i], foil=FOILS[i], sites=["resid_mid"]
        )
        share = alone["resid_mid"] * float(gaps[example] / gaps.mean())
        assert float(abs(data["resid_mid_each"][example] - share).max()) < 1e-4
    assert data["resid_mid"].dims == ("layer", "pos")
    assert data["resid_mid_each"].attrs["unit"] == "share of the mean gap"


def test_the_statistics_are_those_of_the_examples(model: mt.Model) -> None:
    arguments = {"answers": ANSWERS, "foils": FOILS, "spans": SPANS, "sites": ["mlp_out"]}
    data = mt.explain.patch_pairs(model, CLEAN, CORRUPT, seed=5, **arguments)
    each = torch.from_numpy(data["mlp_out_each"].values)
    mean, low, high = mt.stream.mean_interval(each, seed=5)
    for name, x in (("", mean), ("_lo", low), ("_hi", high), ("_p", mt.stream.sign_flip(each, seed=5))):
        assert torch.equal(torch.from_numpy(data[f"mlp_out{name}"].values), x)
    assert mt.explain.patch_pairs(model, CLEAN, CORRUPT, seed=5, **arguments).equals(data)
    many = mt.explain.patch_pairs(
        model, CLEAN * 5, CORRUPT * 5, answers=ANSWERS * 5, foils=FOILS * 5, spans=SPANS * 5, sites=["mlp_out"]
    )  # more than are held at once
    assert float(abs(many["mlp_out_each"][16:20].values - data["mlp_out_each"].values).max()) < 1e-4


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_mean_is_the_ratio_of_sums(model: mt.Model, direction: str) -> None:
    """One pair of the other sign: its own share would be turned round, and the larger the smaller its gap is."""
    foils, answers = [*FOILS[:2], ANSWERS[2], FOILS[3]], [*ANSWERS[:2], FOILS[2], ANSWERS[3]]
    order = [0, 0, 0, 1, 1, 1, 2]
    arguments = {
        "cleans": [CLEAN[i] for i in order], "corrupts": [CORRUPT[i] for i in order], "sites": ["mlp_out"],
        "answers": [answers[i] for i in order], "foils": [foils[i] for i in order], "spans": [SPANS[i] for i in order],
        "direction": direction,
    }  # fmt: skip
    shares, raw = (mt.explain.patch_pairs(model, **arguments, share=share) for share in (True, False))
    gaps = (raw["clean"] - raw["corrupt"]).values * (1 if direction == "denoise" else -1)
    assert float(abs(shares["mlp_out"] - raw["mlp_out_each"].sum("example") / gaps.sum()).max()) < 1e-9
    assert shares.attrs["flipped_gaps"] == 1
    assert shares.attrs["smallest_gap"] == pytest.approx(abs(gaps).min())
    assert shares.attrs["mean_gap"] == pytest.approx(abs(gaps.mean()))
    assert shares.attrs["examples"] == 7


def test_gaps_without_a_clear_mean_are_refused_before_a_sweep(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def swept(*given: object, **named: object) -> None:
        raise AssertionError("swept")

    monkeypatch.setattr(mt.Model, "sweep", swept)
    with pytest.raises(
        mt.errors.SiteError, match=r"the gaps .* no clear mean .*; got .* 2 of 4 gaps of the other sign"
    ):
        mt.explain.patch_pairs(
            model, CLEAN, CORRUPT, answers=[11, 16, 17, 18], foils=[15, 12, 13, 14], spans=SPANS, sites=["mlp_out"]
        )
    with pytest.raises(mt.errors.PromptError, match="pair 19: the clean and the corrupt prompt are the same"):
        mt.explain.patch_pairs(
            model, CLEAN * 5, CORRUPT * 4 + CORRUPT[:3] + CLEAN[3:], answers=ANSWERS * 5, foils=FOILS * 5,
            spans=SPANS * 5,
        )  # fmt: skip
    with pytest.raises(mt.errors.SiteError, match="both prompts of pair 0 give the same metric"):
        mt.explain.patch_pairs(
            model,
            CLEAN,
            CORRUPT,
            metric=mt.metric.FunctionMetric(lambda z, p: 0 * z[:, 0, 0]),
            spans=SPANS,
            sites=["mlp_out"],
        )


def test_stopped_it_keeps_the_pairs_that_are_whole(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"answers": ANSWERS * 9, "foils": FOILS * 9, "spans": SPANS * 9, "sites": ["mlp_out"]}

    def stop(done: int, everything: int) -> None:
        assert everything == 36
        if done >= 32:
            raise KeyboardInterrupt

    whole = mt.explain.patch_pairs(model, CLEAN * 9, CORRUPT * 9, **arguments)
    told = mt.explain.patch_pairs(model, CLEAN * 9, CORRUPT * 9, progress=stop, **arguments)
    assert told.sizes["example"] == told.attrs["examples"] == told["answer"].size == 32
    gaps = told["clean"] - told["corrupt"]
    mean = told["mlp_out_each"].mean("example")
    assert float(abs(told["mlp_out"] - mean).max()) < 1e-12
    ratio = float((whole["clean"] - whole["corrupt"]).mean() / gaps.mean())
    assert float(abs(told["mlp_out_each"] - whole["mlp_out_each"][:32] * ratio).max()) < 1e-6
    # Ctrl-C inside a sweep, which keeps what it has and says how much.
    real, calls = mt.Model.sweep, []

    def cut(self: mt.Model, *given: object, **named: object) -> object:
        calls.append(1)
        found = real(self, *given, **named)
        if len(calls) < 2:
            return found
        effects = found.effects.clone()
        effects[2 * 6 + 1 :] = torch.nan  # two pairs and one cell, of 3 layers x 2 spans a pair
        return replace(found, effects=effects, done=13)

    monkeypatch.setattr(mt.Model, "sweep", cut)
    told = mt.explain.patch_pairs(model, CLEAN * 9, CORRUPT * 9, **arguments)
    assert len(calls) == 2
    assert told.attrs["examples"] == told.sizes["example"] == 18
    assert bool(told["mlp_out_each"].notnull().all())


def test_a_metric_of_all_pairs_is_read_of_each(model: mt.Model) -> None:
    arguments = {"spans": SPANS * 5, "sites": ["mlp_out"], "share": False}
    metric = mt.metric.LogitDifference(ANSWERS * 5, foil=FOILS * 5)
    data = mt.explain.patch_pairs(model, CLEAN * 5, CORRUPT * 5, metric=metric, **arguments)
    same = mt.explain.patch_pairs(model, CLEAN * 5, CORRUPT * 5, answers=ANSWERS * 5, foils=FOILS * 5, **arguments)
    assert float(abs(data["mlp_out_each"] - same["mlp_out_each"]).max()) < 1e-5
    assert data["mlp_out"].attrs["unit"] == "LogitDifference"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spans": None}, r"pairs of several lengths have no positions in common; got \[5, 6, 7\]"),
        ({"spans": SPANS[:3]}, "there must be spans for each pair; got 3; allowed: 4"),
        ({"spans": [{"a": 1}, {"b": 1}, {"a": 1}, {"a": 1}]}, "the pairs have no span in common"),
        ({"spans": [*SPANS[:3], {"subject": 9, "last": 5}]}, "the prompt has no such subject; got 9"),
        ({"corrupts": CORRUPT[:3]}, "one corrupt prompt a clean one; got 3; allowed: 4"),
        ({"corrupts": [*CORRUPT[:3], [6, 73]]}, "pair 3: the prompts do not align: they differ first at token 1"),
        ({"foils": [15, 16, 17, 18]}, 'the foil equals the answer in example 2; got "17"'),
        ({"answers": [11, 12]}, "there must be one answer an example; got 2; allowed: 4"),
        ({"corrupts": [*CORRUPT[:3], CLEAN[3]]}, "pair 3: the clean and the corrupt prompt are the same"),
        ({"answers": None, "foils": None}, r"there is nothing to read\. To do: give answers= or metric="),
        ({"sites": []}, r"there is no site to patch; got \[\]; allowed: resid_pre, "),
        (
            {"metric": mt.metric.LogProbability([11, 12])},
            "names fewer tokens than there are prompts; got 2 for 3 prompts",
        ),
        ({"sites": ["final"]}, 'cannot patch "final" by layer'),
        ({"direction": "sideways"}, 'no direction "sideways"; allowed: noise, denoise'),
        ({"metric": mt.metric.Probability(11, position=0)}, "does not depend on what is patched, so that every effect"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(model: mt.Model, change: dict[str, object], text: str) -> None:
    arguments = {"corrupts": CORRUPT, "answers": ANSWERS, "foils": FOILS, "spans": SPANS} | change
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.patch_pairs(model, CLEAN, **arguments)


def test_the_plan_of_every_sweep_comes_before_its_cells(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    own = mt.sweep.Sweep.run

    def run(*given: object, **named: object) -> mt.sweep.SweepResult:
        told.append("swept")
        return own(*given, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(mt.sweep.Sweep, "run", run)
    mt.explain.patch_pairs(
        model, CLEAN * 5, CORRUPT * 5, answers=ANSWERS * 5, foils=FOILS * 5, spans=SPANS * 5, sites=["mlp_out"],
        on_plan=lambda plan: told.append(str(plan.cells)),
    )  # fmt: skip
    assert told == [f"{16 * 6}", "swept", f"{4 * 6}", "swept"]  # 3 layers by 2 spans
