"""A null span: the trained model answers without it, and attributions are judged by what they put there."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import microtome as mt
from microtome import planted


@cache
def trained() -> planted.Planted:
    return planted.spans(seed=0)


def test_it_answers_whatever_the_null_span_holds() -> None:
    it = trained()
    tokens, answers = planted.span_rows(200, 77)
    assert float((it.model.run(tokens).logits[:, -1].argmax(-1) == answers).double().mean()) > 0.95
    first, end = it.truth["null"]
    other = tokens.clone()
    other[:, first:end] = tokens[torch.randperm(200, generator=torch.Generator().manual_seed(1)), first:end]
    assert float((it.model.run(other).logits[:, -1].argmax(-1) == answers).double().mean()) > 0.95
    first, end = it.truth["signal"]
    other = tokens.clone()
    other[:, first:end] = tokens.roll(1, 0)[:, first:end]
    right = it.model.run(other).logits[:, -1].argmax(-1) == answers.roll(1)
    assert float(right.double().mean()) > 0.95


def test_attribution_leaks_less_to_the_null_span_than_an_even_map() -> None:
    it = trained()
    tokens, _ = planted.span_rows(24, 78)
    data = mt.explain.attribution_check(
        it.model,
        tokens,
        estimates=["gradient_input", "ig", "relp", "legrad", "embedding"],
        null=it.truth["null"],
        every=1,
    )
    share = data["null_share"]
    for name in ("gradient_input", "ig", "relp"):
        assert float(data["null_share_hi"].sel(estimate=name)) < float(data["null_even"]), name
    assert float(data["null_share_lo"].sel(estimate="legrad")) > float(data["null_even"]), "what attention could raise"
    assert float(share.sel(estimate="embedding")) > 0.9 * float(data["null_even"])
    assert float(data["kept"].sel(estimate="ig", layer=0)) < 0.7


@pytest.mark.slow
def test_the_answer_is_learned_from_what_a_gradient_ranks_first() -> None:
    """More than from random tokens; those ranked last tell it too, as what is blank depends on it: see the trap."""
    it = trained()
    tokens, answers = planted.span_rows(512, 79)
    data = mt.explain.diff_roar(
        it.model, tokens, answers=answers.tolist(), estimates=["gradient_input"], keep=0.25, steps=150
    )
    assert float(data["top_lo"][0]) > float(data["random_top_hi"])
    assert float(data["bottom"][0]) > float(data["random_bottom"]) + 0.2
    assert abs(float(data["top_diff"][0])) < 0.25, "it does not discriminate here"
    assert float(data["top"][0]) > 0.7
    assert abs(float(data["random_top_diff"])) < 0.25
    assert float(data["whole"]) > 0.9
    assert float(data["own"]) > 0.95
