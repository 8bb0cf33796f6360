"""Many pairs: each is what it is alone, and the mean comes with what is known of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import families, tokenizers
from tests.agreement import Agreement, agreed

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


ORDER = [*range(4)] * 4 + [2, 0, 3, 1]
"""Of more pairs than are held at once; those behind stand in another order, so that numbers cannot be mistaken."""


def ordered(given: list) -> list:
    return [given[i] for i in ORDER]


def ordered_arguments() -> dict[str, object]:
    return {"answer": ordered(ANSWERS), "foil": ordered(FOILS), "spans": ordered(SPANS), "sites": ["mlp_out"]}


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"))


def difference(model: mt.Model, i: int, tokens: list[int], edits: list[mt.edit.Edit] | None = None) -> float:
    logits = model.run([tokens], edits=edits or []).logits[0, -1]
    return float(logits[ANSWERS[i]] - logits[FOILS[i]])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_pair_is_its_literal_forwards(model: mt.Model, direction: str) -> None:
    data = mt.explain.patch(
        model, CLEAN, CORRUPT, answer=ANSWERS, foil=FOILS, spans=SPANS, sites=SITES, direction=direction, share=False
    )
    assert data["span"].values.tolist() == ["subject", "last"]
    assert data["mlp_out"].dims == ("layer", "span")
    assert data["attn.v[head]_each"].dims == ("example", "layer", "kv_head")
    at = [("2", "4"), ("1-2", "6"), ("2", "4"), ("1", "5")]
    agree = Agreement(1e-4)
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
            agree(value, literal - began, (i, site))
        assert float(data["clean"][i]) == pytest.approx(difference(model, i, CLEAN[i]), abs=1e-4)
        assert float(data["corrupt"][i]) == pytest.approx(difference(model, i, CORRUPT[i]), abs=1e-4)
    agree.stands_out(0.9)


def test_a_pair_is_what_it_is_alone(model: mt.Model) -> None:
    some = [0, 2]
    data = mt.explain.patch(
        model, [CLEAN[i] for i in some], [CORRUPT[i] for i in some], answer=[ANSWERS[i] for i in some],
        foil=[FOILS[i] for i in some], sites=["resid_mid"],
    )  # fmt: skip
    gaps = data["clean"] - data["corrupt"]
    for example, i in enumerate(some):
        alone = mt.explain.patch(model, CLEAN[i], CORRUPT[i], answer=ANSWERS[i], foil=FOILS[i], sites=["resid_mid"])
        share = alone["resid_mid"] * float(gaps[example] / gaps.mean())
        agreed(data["resid_mid_each"][example][:, 2:], share[:, 2:], 1e-4)  # it is 0 before the prompts differ
    assert data["resid_mid"].dims == ("layer", "pos")
    assert data["resid_mid_each"].attrs["unit"] == "share of the mean gap"


def test_the_statistics_are_those_of_the_examples(model: mt.Model) -> None:
    arguments = {"answer": ANSWERS, "foil": FOILS, "spans": SPANS, "sites": ["mlp_out"]}
    with mt.settings(seed=5):
        data = mt.explain.patch(model, CLEAN, CORRUPT, **arguments)
        again = mt.explain.patch(model, CLEAN, CORRUPT, **arguments)
    assert again.equals(data)
    assert bool(data["mlp_out_lo"].isnull().all())  # of four pairs
    many = mt.explain.patch(model, *(ordered(x) for x in (CLEAN, CORRUPT)), **ordered_arguments())
    expected = data["mlp_out_each"].values[ORDER]
    agreed(many["mlp_out_each"], expected, 1e-4)
    assert float(abs(many["mlp_out_each"].values[16:] - expected[:4]).max()) > 0.01  # it is not the first ones again
    each, ends = (torch.from_numpy(many[name].values) for name in ("mlp_out_each", "clean"))
    gaps = ends - torch.from_numpy(many["corrupt"].values)
    mean, low, high = mt.stream.mean_interval(each, weights=gaps / gaps.mean())
    for name, x in (("", mean), ("_lo", low), ("_hi", high), ("_p", mt.stream.sign_flip(each))):
        np.testing.assert_array_equal(many[f"mlp_out{name}"], x)
    fixed = mt.stream.mean_interval(each)
    assert float((high - low - fixed[2] + fixed[1]).abs().max()) > 0.05  # effects and gaps go together


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_mean_is_the_ratio_of_sums(model: mt.Model, direction: str) -> None:
    """One pair of the other sign: its own share would be turned round, and the larger the smaller its gap is."""
    foils, answers = [*FOILS[:2], ANSWERS[2], FOILS[3]], [*ANSWERS[:2], FOILS[2], ANSWERS[3]]
    order = [0, 0, 0, 1, 1, 1, 2]
    arguments = {
        "clean": [CLEAN[i] for i in order], "corrupt": [CORRUPT[i] for i in order], "sites": ["mlp_out"],
        "answer": [answers[i] for i in order], "foil": [foils[i] for i in order], "spans": [SPANS[i] for i in order],
        "direction": direction,
    }  # fmt: skip
    shares, raw = (mt.explain.patch(model, **arguments, share=share) for share in (True, False))
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
        mt.errors.SiteError, match=r"the mean gap .* not clearly different from 0; got .* 2 of 4 gaps of the other sign"
    ):
        mt.explain.patch(
            model, CLEAN, CORRUPT, answer=[11, 16, 17, 18], foil=[15, 12, 13, 14], spans=SPANS, sites=["mlp_out"]
        )
    with pytest.raises(mt.errors.PromptError, match="pair 19: the clean and the corrupt prompt are the same"):
        mt.explain.patch(
            model, CLEAN * 5, CORRUPT * 4 + CORRUPT[:3] + CLEAN[3:], answer=ANSWERS * 5, foil=FOILS * 5,
            spans=SPANS * 5,
        )  # fmt: skip
    with pytest.raises(mt.errors.SiteError, match="both prompts of pair 0 give the same metric"):
        mt.explain.patch(
            model,
            CLEAN,
            CORRUPT,
            metric=mt.metric.FunctionMetric(lambda z, p: 0 * z[:, 0, 0]),
            spans=SPANS,
            sites=["mlp_out"],
        )


def test_stopped_it_keeps_the_pairs_that_are_whole(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"answer": ANSWERS * 9, "foil": FOILS * 9, "spans": SPANS * 9, "sites": ["mlp_out"]}

    def stop(stage: str, done: int, everything: int) -> None:
        if stage == "patching pairs 33-36 of 36":
            raise KeyboardInterrupt

    whole = mt.explain.patch(model, CLEAN * 9, CORRUPT * 9, **arguments)
    with mt.settings(progress=stop):
        told = mt.explain.patch(model, CLEAN * 9, CORRUPT * 9, **arguments)
    kept = [*range(32), 32, 34]  # of the last four, the two of one length came first
    assert told.sizes["example"] == told.attrs["examples"] == told["answer"].size == 34
    assert told["answer"].values.tolist() == whole["answer"].values[kept].tolist()
    gaps = told["clean"] - told["corrupt"]
    mean = told["mlp_out_each"].mean("example")
    assert float(abs(told["mlp_out"] - mean).max()) < 1e-12
    ratio = float((whole["clean"] - whole["corrupt"]).mean() / gaps.mean())
    agreed(told["mlp_out_each"], whole["mlp_out_each"][kept] * ratio, 1e-6)
    # Ctrl-C inside a sweep, which keeps what it has and says how much.
    real, calls = mt.sweep.Sweep.run, []

    def cut(self: mt.sweep.Sweep, *given: object, **named: object) -> object:
        calls.append(1)
        found = real(self, *given, **named)
        if len(calls) < 2:
            return found
        effects = found.effects.clone()
        effects[2 * 6 + 1 :] = torch.nan  # two pairs and one cell, of 3 layers x 2 spans a pair
        return replace(found, effects=effects, done=13)

    monkeypatch.setattr(mt.sweep.Sweep, "run", cut)
    told = mt.explain.patch(model, CLEAN * 9, CORRUPT * 9, **arguments)
    assert len(calls) == 2
    assert told.attrs["examples"] == told.sizes["example"] == 18
    assert bool(told["mlp_out_each"].notnull().all())


def test_a_metric_of_all_pairs_is_read_of_each(model: mt.Model) -> None:
    rows, arguments = (ordered(CLEAN), ordered(CORRUPT)), ordered_arguments() | {"share": False}
    same = mt.explain.patch(model, *rows, **arguments)
    answers, foils = arguments.pop("answer"), arguments.pop("foil")
    data = mt.explain.patch(model, *rows, metric=mt.metric.LogitDifference(answers, foil=foils), **arguments)
    agreed(data["mlp_out_each"], same["mlp_out_each"], 1e-5)
    assert float(abs(data["clean"] - same["clean"]).max()) < 1e-5
    assert data["mlp_out"].attrs["unit"] == "logits"
    assert data.attrs["metric"] == "logit difference"


def test_the_axes_of_a_result_are_not_interchanged(model: mt.Model) -> None:
    """Heads differ from layers in number and spans in order: each value stands where its own cell is."""
    some = {"answer": ANSWERS[:3], "foil": FOILS[:3], "share": False}
    data = mt.explain.patch(model, CLEAN[:3], CORRUPT[:3], spans=SPANS[:3], sites=["mlp_out", "attn.z[head]"], **some)
    turned = [dict(reversed(list(own.items()))) for own in SPANS[:3]]
    other = mt.explain.patch(model, CLEAN[:3], CORRUPT[:3], spans=turned, sites=["attn.z[head]", "mlp_out"], **some)
    assert other["span"].values.tolist() == ["last", "subject"]
    for name in ("mlp_out", "attn.z[head]"):
        agreed(
            data[f"{name}_each"],
            other[f"{name}_each"].sel(span=data["span"]) if name == "mlp_out" else other[f"{name}_each"],
            1e-5,
        )
    assert data["attn.z[head]"].shape == (3, 4)
    assert float(abs(data["mlp_out"].sel(span="subject") - data["mlp_out"].sel(span="last")).max()) > 1e-4


def test_one_mapping_of_spans_serves_all_pairs_and_one_pair_too(model: mt.Model) -> None:
    one = {"answer": ANSWERS[:2], "foil": FOILS[:2], "sites": ["mlp_out"], "share": False}
    data = mt.explain.patch(model, CLEAN[:2], CORRUPT[:2], spans={"last": -1}, **one)
    places = mt.explain.patch(model, CLEAN[:2], CORRUPT[:2], spans=[{"last": (4, 5)}, {"last": (6, 7)}], **one)
    assert data.equals(places)
    alone = mt.explain.patch(
        model, CLEAN[1], CORRUPT[1], answer=12, foil=16, spans={"last": -1}, sites=["mlp_out"], share=False
    )
    assert alone["mlp_out"].dims == ("layer", "span")
    agreed(alone["mlp_out"], data["mlp_out_each"][1], 1e-5)


def test_a_task_is_its_prompts_and_answers(model: mt.Model) -> None:
    task = mt.tasks.build("induction", model, 5, length=4)
    rows = {"answer": [p.answer_ids[0] for p in task], "foil": [p.foil_ids[0] for p in task]}
    arguments = {"sites": ["mlp_out", "attn.z[head]"], "share": False}
    data = mt.explain.patch(model, task, **arguments)
    same = mt.explain.patch(model, task.clean_tokens, task.corrupt_tokens, **rows, **arguments)
    assert data.drop_vars("group").equals(same)
    assert data["group"].values.tolist() == ["length 4"] * 5
    assert data["mlp_out"].dims == ("layer", "pos")
    assert data["mlp_out"].attrs["unit"] == "logits"
    alone = mt.explain.patch(model, task[1:2], **arguments)
    assert alone["mlp_out"].dims == ("layer", "pos")
    agreed(alone["mlp_out"], data["mlp_out_each"][1], 1e-5, most=0.4)  # it is 0 before the prompts differ
    longer = mt.tasks.build("induction", model, 2, length=6)
    mixed = replace(task, pairs=(*task.pairs[:2], *longer.pairs))
    spanned = mt.explain.patch(model, mixed, **arguments)
    assert spanned["span"].values.tolist() == ["previous", "source", "end"]
    first = int(task[0].spans["source"][0])
    assert float(spanned["mlp_out_each"][0].sel(span="source")[1]) == pytest.approx(
        float(data["mlp_out_each"][0, 1, first]), abs=1e-5
    )
    with pytest.raises(mt.errors.PromptError, match=r"a task has corrupt prompts of its own; got corrupt="):
        mt.explain.patch(model, task, task.corrupt_tokens)


def test_a_file_of_pairs_is_its_task(tmp_path: Path) -> None:
    tokenizer = tokenizers.build("bpe-bos")
    hf = families.build("llama-gqa")
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = mt.open(hf, tokenizer=tokenizer, prove=False)
    path = tmp_path / "pairs.csv"
    rows = ["clean,corrupt,answer,foil,subject", "One apple and two,One dog and two, apples, dogs,apple"]
    rows.append("I see the key near the door; it,I see the keys near the door; it, is, are,key")
    path.write_text("\n".join(rows), encoding="utf-8")
    task = mt.tasks.read(path, model)
    arguments = {"sites": ["mlp_out"], "share": False}
    expected = mt.explain.patch(model, task, **arguments)
    assert expected["span"].values.tolist() == ["subject", "end", "subject_last"]
    for given in (path, str(path)):
        assert mt.explain.patch(model, given, **arguments).equals(expected)
    sets = replace(task, pairs=tuple(replace(p, answer_ids=(*p.answer_ids, 7)) for p in task.pairs))
    data = mt.explain.patch(model, sets, **arguments)
    assert data.attrs["metric"] == "log-odds of the answers against the foils"
    logits = model.run(task.clean_tokens[:1]).logits[0, -1].double()
    right = logits[[*sets[0].answer_ids]].logsumexp(0) - logits[[*sets[0].foil_ids]].logsumexp(0)
    assert float(data["clean"][0]) == pytest.approx(float(right), abs=1e-4)
    other = mt.open(hf, tokenizer=tokenizers.build("bpe-three-digits"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="the task was built with another tokenizer"):
        mt.explain.patch(other, task)
    with pytest.raises(mt.errors.DataError, match="it does not exist"):
        mt.explain.patch(model, "nothing.csv")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spans": None}, r"pairs of several lengths have no positions in common; got \[5, 6, 7\]"),
        ({"spans": SPANS[:3]}, "there must be spans for each pair; got 3; allowed: 4"),
        ({"spans": [{"a": 1}, {"b": 1}, {"a": 1}, {"a": 1}]}, "the pairs have no span in common"),
        ({"spans": [*SPANS[:3], {"subject": 9, "last": 5}]}, "the prompt has no such subject; got 9"),
        ({"corrupt": CORRUPT[:3]}, "one corrupt prompt per clean one; got 3; allowed: 4"),
        ({"corrupt": [*CORRUPT[:3], [6, 73]]}, "pair 3: the prompts do not align: they differ first at token 1"),
        ({"foil": [15, 16, 17, 18]}, 'the foil equals the answer in example 2; got "17"'),
        ({"answer": [11, 12]}, "there must be one answer per example; got 2; allowed: 4"),
        ({"corrupt": [*CORRUPT[:3], CLEAN[3]]}, "pair 3: the clean and the corrupt prompt are the same"),
        ({"answer": None, "foil": None}, r"there is nothing to read\. To do: give answer= or metric="),
        ({"sites": []}, r"sites names nothing; allowed: resid_pre, "),
        (
            {"metric": mt.metric.LogProbability([11, 12]), "answer": None, "foil": None},
            "names fewer tokens than there are prompts; got 2 for 3 prompts",
        ),
        ({"sites": ["final"]}, "sites must be one of resid_pre, .*; got 'final'"),
        ({"direction": "sideways"}, "direction must be one of denoise, noise; got 'sideways'"),
        (
            {"metric": mt.metric.Probability(11, position=0), "answer": None, "foil": None},
            "does not depend on what is patched, so that every effect",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(model: mt.Model, change: dict[str, object], text: str) -> None:
    arguments = {"corrupt": CORRUPT, "answer": ANSWERS, "foil": FOILS, "spans": SPANS} | change
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.patch(model, CLEAN, **arguments)


def test_the_plan_of_every_sweep_comes_before_its_cells(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    own = mt.sweep.Sweep.run

    def run(*given: object, **named: object) -> mt.sweep.SweepResult:
        told.append("swept")
        return own(*given, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(mt.sweep.Sweep, "run", run)
    with mt.settings(on_plan=lambda plan: told.append(str(plan.cells))):
        mt.explain.patch(
            model, CLEAN * 5, CORRUPT * 5, answer=ANSWERS * 5, foil=FOILS * 5, spans=SPANS * 5, sites=["mlp_out"]
        )
    assert told == [f"{16 * 6}", "swept", f"{4 * 6}", "swept"]  # 3 layers by 2 spans
