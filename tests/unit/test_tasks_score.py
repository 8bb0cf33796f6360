"""What a model makes of a task: equal to reading one prompt at a time; metrics serve a sweep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests import families, tokenizers

import microtome as mt
from microtome.errors import EditError, ModelUnsupported, PromptError
from microtome.stream import share_difference_interval


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


@pytest.fixture(scope="module")
def task(model: mt.Model) -> mt.tasks.Task:
    """Random repeats of two lengths; every third pair has as its answer what the model says, and some have sets."""
    both = [mt.tasks.build("induction", model, 6, length=length, seed=length) for length in (5, 8)]
    pairs = []
    for i, pair in enumerate([p for two in zip(*both, strict=True) for p in two]):
        says = int(model.run(list(pair.clean_tokens)).logits[0, -1].argmax())
        right = (says,) if i % 3 == 0 else tuple({(says + 1) % 101, (says + 2) % 101})
        foils = tuple({(says + 3) % 101, (says + 4) % 101})
        pairs.append(replace(pair, answer_ids=right, foil_ids=foils))
    return replace(both[0], pairs=tuple(pairs))


def test_accuracy_is_what_single_runs_say(model: mt.Model, task: mt.tasks.Task) -> None:
    data = task.accuracy(model)
    for i, pair in enumerate(task):
        for name in ("clean", "corrupt"):
            z = model.run(list(getattr(pair, f"{name}_tokens"))).logits[0, -1].double()
            assert bool(data[f"top1_{name}"][i]) == (int(z.argmax()) in pair.answer_ids)
            assert str(data[f"predicted_{name}"][i].item()) == model.to_words([int(z.argmax())])[0]
            p = z.softmax(-1)
            odds = p[list(pair.answer_ids)].sum().log() - p[list(pair.foil_ids)].sum().log()
            assert float(data[f"difference_{name}"][i]) == pytest.approx(float(odds), abs=1e-5)
    assert float(data["accuracy"]) == pytest.approx(4 / 12)
    assert float(data["accuracy"]) == float(data["top1_clean"].mean())
    assert float(data["mean_difference_clean"]) == pytest.approx(float(data["difference_clean"].mean()))
    for name, each in (("accuracy", "top1"), ("mean_difference_clean", "difference")):
        less = (data[f"{each}_clean"].astype(float) - data[f"{each}_corrupt"].astype(float)).mean()
        assert float(data[f"{name}_diff"]) == pytest.approx(float(less))
    right = (data["top1_clean"].values, data["top1_corrupt"].values)
    counts = [int((a & ~b).sum()) for a, b in (right, right[::-1])]
    assert (float(data["accuracy_diff_lo"]), float(data["accuracy_diff_hi"])) == share_difference_interval(*counts, 12)
    names = ("accuracy", "accuracy_corrupt", "preferred", "preferred_corrupt")
    names += ("mean_difference_clean", "mean_difference_corrupt")
    for name in (*names, "accuracy_diff", "preferred_diff", "mean_difference_clean_diff"):
        assert float(data[name + "_lo"]) <= float(data[name]) <= float(data[name + "_hi"])
        assert float(data[name + "_lo"]) < float(data[name + "_hi"])
    assert data.attrs["task"] == "induction"
    assert data.attrs["fingerprint"] == model.fingerprint


def test_known_by_keeps_what_is_answered(model: mt.Model, task: mt.tasks.Task) -> None:
    known = task.known_by(model)
    assert known.pairs == task.pairs[::3]
    assert known.attrs["accuracy"] == pytest.approx(4 / 12)
    assert known.attrs["asked"] == 12
    assert float(known.accuracy(model)["accuracy"]) == 1
    unknown = replace(task, pairs=tuple(p for p in task if p not in known.pairs))
    with pytest.raises(PromptError, match='knows no answer of the task "induction"; got 0 of 8 pairs'):
        unknown.known_by(model)


def test_the_metric_serves_a_sweep(model: mt.Model, task: mt.tasks.Task) -> None:
    """Patching the whole stream of a pair's corrupt prompt from its clean one gives the clean value."""
    data = task.accuracy(model)
    for chosen in (task, mt.tasks.build("induction", model, 3, length=5)):
        data = chosen.accuracy(model)
        metric = chosen.metric()
        assert isinstance(metric, mt.tasks.LogOdds if chosen is task else mt.metric.LogitDifference)
        cells = [
            mt.edit.Patch("0.resid_pre", source=model.run(tokens, capture="0.resid_pre"))
            for tokens in chosen.clean_tokens
        ]
        swept = model.sweep(chosen.corrupt_tokens, cells, metric, prompts=range(len(chosen))).run()
        assert torch.allclose(swept.base.double(), torch.tensor(data["difference_corrupt"].values).double(), atol=1e-4)
        assert torch.allclose(swept.values.double(), torch.tensor(data["difference_clean"].values).double(), atol=1e-4)


def test_log_odds_of_single_tokens_is_the_logit_difference() -> None:
    logits, prompts = torch.randn(4, 1, 11, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1, 2])
    answers, foils = [3, 4, 5], [6, 7, 8]
    odds = mt.tasks.LogOdds([(a,) for a in answers], [(f,) for f in foils])
    assert torch.equal(odds.read(logits, prompts), mt.metric.LogitDifference(answers, foil=foils).read(logits, prompts))
    with pytest.raises(EditError, match="two disjoint sets of tokens; got 2 answers, 1 foils, 1 in both"):
        mt.tasks.LogOdds([(1, 2)], [(2,)])
    with pytest.raises(EditError, match="got 0 answers, 1 foils, 0 in both"):
        mt.tasks.LogOdds([()], [(2,)])
    with pytest.raises(EditError, match="answers and foils differ in number; got 1 and 2 sets"):
        mt.tasks.LogOdds([(1,)], [(2,), (3,)])
    with pytest.raises(EditError, match="fewer sets of tokens than prompts; got 1 for 3 prompts"):
        mt.tasks.LogOdds([(1,)], [(2,)]).read(logits, prompts)


def test_a_task_without_pairs_says_so(model: mt.Model, task: mt.tasks.Task) -> None:
    for call in (task[:0].metric, task[:0].dataset, lambda: task[:0].accuracy(model), lambda: task[:0].known_by(model)):
        with pytest.raises(PromptError, match=f'the task "{task.name}" has no pairs'):
            call()


def test_a_task_goes_with_its_tokenizer() -> None:
    task = mt.tasks.build("fact.next_letter", tokenizers.build("bpe-bos"), 3)
    other = mt.open(families.build("llama-gqa"), tokenizer=tokenizers.build("wordpiece"), prove=False)
    with pytest.raises(PromptError, match="built with another tokenizer than that of .*; got other tokens in pair 0"):
        task.accuracy(other)
    masked = next(n for n in families.NAMES if families.KIND[n] == "masked")
    with pytest.raises(ModelUnsupported, match="does not predict the next token; got attention in both directions"):
        mt.tasks.build("induction", mt.open(families.build(masked), prove=False), 2, length=4).accuracy(
            mt.open(families.build(masked), prove=False)
        )


def test_a_task_is_a_sequence_and_a_table() -> None:
    task = mt.tasks.build("indirect_object", tokenizers.build("bpe-bos"), 5)
    assert [*task] == [task[i] for i in range(5)]
    assert task[1:3].pairs == task.pairs[1:3]
    assert task[1:3].name == task.name
    data = task.dataset()
    assert dict(data.sizes) == {"example": 5}
    for i, pair in enumerate(task):
        assert str(data["clean"].values[i]) == pair.clean
        assert (int(data["s2_first"][i]), int(data["s2_end"][i])) == pair.spans["s2"]
    assert data.attrs["seed"] == 0
    assert data.attrs["corruption"] == "swap"
    assert repr(task) == "Task(indirect_object: 5 pairs, who is given something, of two people named before)"
