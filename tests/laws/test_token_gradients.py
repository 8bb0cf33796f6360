"""Integrated gradients of tokens: complete, and exact where the network is linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.agreement import agreed
from tests.linear import linear

import microtome as mt

PROMPT = [7, 20, 33, 41, 52, 28]


def integrated(model: mt.Model, **more: Any) -> Any:
    return mt.explain.integrated_gradients(model, PROMPT, **({"answer": 11, "foil": 13} | more))


@pytest.mark.parametrize(("name", "baseline"), [("llama-gqa", "mean"), ("gpt2", "zero"), ("gemma2", 3), ("gptj", 3)])
def test_scores_add_up_to_the_whole(name: str, baseline: str | int) -> None:
    model = mt.open(families.build(name), prove=False)
    data = integrated(model, baseline=baseline, tolerance=1e-3)
    if baseline == "mean":
        with mt.settings(seed=0):
            many = torch.randperm(model.anatomy.d_vocab, generator=torch.Generator().manual_seed(0))[:256]
        mean = model.run(many.reshape(-1, 1).expand(-1, 6), capture="embed")["embed"].mean(0, keepdim=True)
        edit: list[Any] = [mt.edit.Set("embed", value=mean)]
    else:
        edit = [mt.edit.Zero("embed")] if baseline == "zero" else []
    tokens = [[baseline] * len(PROMPT)] if isinstance(baseline, int) else [PROMPT]
    reads = [model.run(t, edits=e).logits[0, -1].detach().double() for t, e in (([PROMPT], []), (tokens, edit))]
    whole = float((reads[0] - reads[1])[11] - (reads[0] - reads[1])[13])
    assert float(data["whole"]) == pytest.approx(whole, abs=1e-5)
    assert float(data["gap"]) <= 1e-3
    assert float(data["score"].sum()) == pytest.approx(whole, rel=2e-3)
    assert float(data["gap_gradient"]) > 2e-3


def test_zeros_behind_a_norm_need_points_at_the_beginning() -> None:
    """All of the change lies where the size of the stream is that of the norm's epsilon: equal spacing misses it."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    spaced = integrated(model, baseline="zero", points=64, most=64)
    assert float(spaced["gap"]) > 0.1
    assert int(spaced["points"]) == 64
    halved = integrated(model, baseline="zero")
    assert float(halved["gap"]) <= 0.01
    assert int(halved["points"]) <= 512


def test_it_is_exact_where_the_network_is_linear() -> None:
    net = linear()
    data = integrated(net, baseline=3, points=1)
    width = float(abs(data["whole"]))
    assert int(data["points"]) == 1
    agreed(data["score"] / width, data["deletion"] / width, 1e-5)
    agreed(data["gradient"] / width, data["deletion"] / width, 1e-5)
    assert float(data["rank_correlation"]) == pytest.approx(1.0)


def test_deletions_are_exact() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = integrated(model, baseline=3)
    logits = model.run([PROMPT]).logits[0, -1]
    for p in (1, 4):
        tokens = [*PROMPT[:p], 3, *PROMPT[p + 1 :]]
        other = model.run([tokens]).logits[0, -1]
        fall = float((logits[11] - logits[13]) - (other[11] - other[13]))
        assert float(data["deletion"][p]) == pytest.approx(fall, abs=1e-5)


def test_a_gap_that_is_left_is_said() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = integrated(model, points=1, most=1, tolerance=0.0)
    assert float(data["gap"]) > 1e-3
    assert int(data["points"]) == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"baseline": 99_999}, "token id 99999 is not in the vocabulary; allowed: 0 to"),
        ({"baseline": -1}, "token id -1 is not in the vocabulary"),
        ({"baseline": "the cat"}, "this model was opened without a tokenizer"),
        ({"foil": 11}, "the foil equals the answer"),
        ({"points": 0}, "points must be an integer of 1 or more"),
    ],
)
def test_what_cannot_be_attributed(given: dict[str, Any], text: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        integrated(model, **given)


def test_a_baseline_that_is_the_prompt() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="the baseline gives the same metric as the prompt"):
        mt.explain.integrated_gradients(model, [3, 3, 3], answer=11, foil=13, baseline=3)
