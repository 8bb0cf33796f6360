"""Demonstrations read several times: one round is the ordinary prompt, and further ones are what the formula says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor
from transformers import DynamicCache

import microtome as mt

CONTEXT, QUERY = [7, 20, 33, 41, 52, 60, 9], [15, 33, 71]
KINDS = ("llama-gqa", "gpt2", "phi3", "gpt_neox-parallel", "falcon-mqa", "bloom", "gpt_bigcode-mqa", "olmo2")
PLACED = ("llama-gqa", "gpt2", "phi3", "olmo2")
"""Families whose positions are an input, without windows."""


def opened(kind: str) -> mt.Model:
    return mt.open(families.build(kind).requires_grad_(False), prove=False)


@pytest.mark.parametrize("kind", KINDS)
def test_one_round_is_the_ordinary_prompt_and_at_rate_0_so_are_all(kind: str) -> None:
    model = opened(kind)
    expected = model.run([CONTEXT + QUERY]).logits[0, -1]
    alone = model.run([QUERY]).logits[0, -1]
    assert (alone - expected).abs().max() > 1e-2  # the context matters
    for stored in mt.explain.tuned_context(model, [CONTEXT], rounds=3, rate=0.0):
        assert stored.length == len(CONTEXT)
        torch.testing.assert_close(stored.logits([QUERY]), expected, rtol=1e-4, atol=1e-4)
    last = mt.explain.tuned_context(model, [CONTEXT], rounds=3, rate=0.5)[-1].logits([QUERY])
    assert (last - expected).abs().max() > 1e-4  # rounds do something


def test_a_window_is_refused_where_stored_tokens_would_leave_it() -> None:
    for kind in ("mistral", "gemma2", "gemma3"):  # windows of 4
        model = opened(kind)
        once = mt.explain.tuned_context(model, [CONTEXT], rounds=1)[0].logits([QUERY])
        torch.testing.assert_close(once, model.run([CONTEXT + QUERY]).logits[0, -1], rtol=1e-4, atol=1e-4)
        text = r"longer than a window of .*; got 2 x 7 tokens; allowed: 4 or fewer"
        with pytest.raises(mt.errors.SiteError, match=text) as refused:
            mt.explain.tuned_context(model, [CONTEXT], rounds=2)
        assert "\n" not in str(refused.value)
        short = mt.explain.tuned_context(model, [CONTEXT[:2]], rounds=2, rate=0.0)[-1]
        expected = model.run([CONTEXT[:2] + QUERY[:1]]).logits[0, -1]
        torch.testing.assert_close(short.logits([QUERY[:1]]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox-parallel"])
def test_it_is_read_in_evaluation_mode(kind: str) -> None:
    model = opened(kind)
    hf: Any = model.hf
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = mt.explain.tuned_context(model, [CONTEXT], rounds=2, rate=0.5)[-1].logits([QUERY])
    hf.train()
    found = mt.explain.tuned_context(model, [CONTEXT], rounds=2, rate=0.5)[-1].logits([QUERY])
    assert hf.training
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def held(model: mt.Model, tokens: list[int], first: int, before: DynamicCache | None) -> list[Tensor]:
    """Keys and values of tokens behind a cache, plainly."""
    cache: Any = DynamicCache() if before is None else before
    places = torch.arange(first, first + len(tokens)).unsqueeze(0)
    model.hf(input_ids=torch.tensor([tokens]), position_ids=places, past_key_values=cache, use_cache=True)
    return [x[..., -len(tokens) :, :] for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("kind", PLACED)
def test_the_second_round_is_one_forward_of_the_context_written_twice(kind: str) -> None:
    model, n = opened(kind), len(CONTEXT)
    cache: Any = DynamicCache()
    model.hf(
        input_ids=torch.tensor([CONTEXT * 2]), attention_mask=torch.ones(1, 2 * n, dtype=torch.long),
        position_ids=torch.arange(n).repeat(2).unsqueeze(0), past_key_values=cache, use_cache=True,
    )  # fmt: skip
    second = mt.explain.tuned_context(model, [CONTEXT], rounds=2, rate=1.0, momentum=0.0)[-1]
    for layer, keys, values in zip(cache.layers, second.keys, second.values, strict=True):
        torch.testing.assert_close(keys, layer.keys[..., n:, :], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, layer.values[..., n:, :], rtol=1e-4, atol=1e-5)


def test_stored_keys_and_values_move_with_momentum() -> None:
    model = opened("llama-gqa")
    rate, momentum = 0.5, 0.3
    stored = held(model, CONTEXT, 0, None)
    move = [torch.zeros_like(x) for x in stored]
    for _ in range(2):
        cache: Any = DynamicCache()
        for i in range(model.anatomy.n_layers):
            cache.update(stored[2 * i], stored[2 * i + 1], i)
        new = held(model, CONTEXT, 0, cache)
        move = [momentum * m + x - s for m, x, s in zip(move, new, stored, strict=True)]
        stored = [s + rate * m for s, m in zip(stored, move, strict=True)]
    made = mt.explain.tuned_context(model, [CONTEXT], rounds=3, rate=rate, momentum=momentum)[-1]
    found = [x for pair in zip(made.keys, made.values, strict=True) for x in pair]
    for x, expected in zip(found, stored, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_rounds_of_a_task_begin_with_its_ordinary_prompts() -> None:
    model = opened("llama-gqa")
    pairs = [([i], [100 - i]) for i in range(5, 50)]
    data = mt.explain.forward_tuning(model, pairs, shots=3, rounds=3, draws=2, tests=8)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    dealt = [pairs[i] for i in order]
    for number in (4, 5):  # of the first and of the second draw
        draw = torch.Generator().manual_seed(number % 2)
        own, other = (torch.randperm(len(pairs) - 8, generator=draw)[:3].tolist() for _ in range(2))
        for name, answers in (("log_probability", own), ("shuffled_log_probability", other)):
            shown = [t for i, j in zip(own, answers, strict=True) for t in (*dealt[8 + i][0], *dealt[8 + j][1])]
            chances = model.run([shown + dealt[number][0]]).logits[0, -1].log_softmax(-1)
            found = float(data[f"{name}_each"].sel(round=1)[number])
            assert found == pytest.approx(float(chances[dealt[number][1][0]]), abs=1e-4)
    assert (data["gain"].sel(round=1) == 0).all()
    each = data["log_probability_each"]
    np.testing.assert_allclose(data["gain_each"], each - each.sel(round=1), atol=1e-12)
    assert float(data["moved"].sel(round=1)) == 0.0
    assert (np.diff(data["moved"]) > 0).all()


def keep_fewer(model: mt.Model) -> None:
    """Read a context with a model whose last layer leaves nothing in the cache."""
    last = model.hf.get_submodule(model.anatomy.parts.layers[-1].block).self_attn
    index, last.layer_idx = last.layer_idx, 1
    try:
        mt.explain.tuned_context(model, [CONTEXT])
    finally:
        last.layer_idx = index


def test_what_cannot_be_read_in_rounds() -> None:
    model = opened("llama-gqa")
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (mt.errors.ArgumentError, "a context is read in rounds; got 0", {"rounds": 0}),
        (mt.errors.ArgumentError, "rate must be a number of 0 or more; got -1", {"rate": -1}),
        (mt.errors.ArgumentError, "momentum must be a number of 0 or more; got -2", {"momentum": -2}),
        (mt.errors.PromptError, "the context must be one prompt with tokens; got 2", {"context": [[5, 6], [7, 8]]}),
    ]
    for kind, text, given in wrong:
        with pytest.raises(kind, match=text) as refused:
            mt.explain.tuned_context(model, **({"context": [CONTEXT]} | given))
        assert "\n" not in str(refused.value)
    with pytest.raises(mt.errors.PromptError, match="the query must be one prompt"):
        mt.explain.tuned_context(model, [CONTEXT], rounds=1)[0].logits([[5], [6]])
    with pytest.raises(
        mt.errors.SiteError, match="not every layer of .* keeps keys and values of all tokens; got 1 of 3"
    ):
        keep_fewer(model)
