"""Exits: the last is the model, shares are sums of softmaxes, and controls are as frequent as the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.explain._exits import _like

PROMPTS = [[7, 20, 33, 41, 52, 60], [9, 8, 30], [50, 40, 30, 20]]
SET = [11, 23, 45]


def ids(rows: int = 6, length: int = 10) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def opened(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name).requires_grad_(False), prove=False)


def asked(model: mt.Model, prompts: Any = None, **more: Any) -> Any:
    return mt.explain.exits(model, prompts or PROMPTS, **{"tokens": SET, "text": ids(), "size": 60} | more)


@pytest.mark.parametrize("name", families.some(2, ["llama-gqa", "gpt2", "gemma2", "cohere"]))
def test_the_last_exit_is_the_model_and_shares_are_sums_of_softmaxes(name: str) -> None:
    model = opened(name)
    data = asked(model)
    p = torch.stack([model.run([row]).logits[0, -1].softmax(-1) for row in PROMPTS])
    np.testing.assert_allclose(data["share_each"].sel(layer=2), p[:, SET].sum(-1), rtol=1e-4)
    best = p[:, SET].amax(-1, keepdim=True)
    np.testing.assert_array_equal(data["rank_each"].sel(layer=2), (p > best).sum(-1))
    assert float(data["kl"].sel(layer=2)) < 1e-6 < 1e-3 < float(data["kl"].sel(layer=0))
    for layer, site in ((-1, "0.resid_pre"), (1, "1.resid_post")):
        q = torch.stack([model.unembed(model.run([row], site)[site][0, -1]).softmax(-1) for row in PROMPTS])
        np.testing.assert_allclose(data["share_each"].sel(layer=layer), q[:, SET].sum(-1), rtol=1e-4)
        rank = (q > q[:, SET].amax(-1, keepdim=True)).sum(-1)
        np.testing.assert_array_equal(data["rank_each"].sel(layer=layer), rank)


def test_the_loss_of_an_exit_is_that_of_its_lens_on_the_text() -> None:
    model, rows = opened(), ids()
    data = asked(model)
    logits = model.run(rows).logits[:, :-1].log_softmax(-1)
    loss = -logits.gather(-1, rows[:, 1:].unsqueeze(-1)).mean()
    assert float(data["loss"].sel(layer=2)) == pytest.approx(float(loss), rel=1e-5)
    assert float(data["perplexity"].sel(layer=2)) == pytest.approx(float(loss.exp()), rel=1e-4)
    early = model.unembed(model.run(rows, "0.resid_post")["0.resid_post"])[:, :-1].log_softmax(-1)
    loss = -early.gather(-1, rows[:, 1:].unsqueeze(-1)).mean()
    assert float(data["loss"].sel(layer=0)) == pytest.approx(float(loss), rel=1e-5)


def test_prompts_may_have_sets_of_their_own_and_stand_beside_those_without_context() -> None:
    model = opened()
    own = [[11], [23], [45]]
    data = asked(model, tokens=own, without=[row[1:] for row in PROMPTS])
    for i, row in enumerate(PROMPTS):
        p = model.run([row]).logits[0, -1].softmax(-1)
        assert float(data["share_each"].sel(layer=2)[i]) == pytest.approx(float(p[own[i][0]]), rel=1e-4)
        bare = model.run([row[1:]]).logits[0, -1].softmax(-1)
        assert float(data["share_without_each"].sel(layer=2)[i]) == pytest.approx(float(bare[own[i][0]]), rel=1e-4)
    assert "share_without" not in asked(model)


def test_a_control_is_as_frequent_and_none_of_the_set() -> None:
    frequency = torch.arange(1, 1001).double().flip(0)
    rng = torch.Generator().manual_seed(0)
    for tokens in ([500], [3, 4, 5], [999, 998]):
        found = [_like(tokens, frequency, rng) for _ in range(30)]
        assert all(len(s) == len(tokens) and not set(s) & set(tokens) for s in found)
        gaps = [abs(a - b) for s in found for a, b in zip(s, tokens, strict=True)]
        assert max(gaps) <= 13
        assert len({tuple(s) for s in found}) > 3


def test_tokens_that_a_layer_raises_appear_there_and_controls_do_not() -> None:
    """Planted: the bias of the last layer's MLP is the unembedding of two tokens."""
    hf: Any = families.build("gpt2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.mlp.c_proj.bias.zero_()
        rows = hf.lm_head.weight[[11, 23]]
        hf.transformer.h[1].mlp.c_proj.bias.copy_(60 * (rows / rows.norm(dim=1, keepdim=True)).sum(0))
    model = mt.open(hf.requires_grad_(False), prove=False)
    data = asked(model, tokens=[11, 23])
    share, other = data["share"], data["share_other"]
    assert float(share.sel(layer=0)) < 0.2
    assert float(share.sel(layer=1)) > 0.8
    assert float(other.max()) < 0.2
    assert float(data["rank"].sel(layer=1)) == 0


def test_what_cannot_be_is_refused_in_a_line() -> None:
    model = opened()
    heads = mt.explain.fit_lens(model, ids(20, 8), tokens=64, kind="heads", held_out=64, length=8, rows=4)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (mt.errors.PromptError, "one set of tokens for all prompts, or one each; got 2 sets", {"tokens": [[5], [6]]}),
        (mt.errors.PromptError, "one set of tokens for all prompts, or one each; got an empty set", {"tokens": []}),
        (mt.errors.PromptError, "as many prompts without context as with it; got 1; allowed: 3", {"without": [[5]]}),
        (mt.errors.PromptError, "token id 999 is not in", {"tokens": [999]}),
        (mt.errors.PromptError, 'cannot read " Paris": this model was opened without', {"tokens": [" Paris"]}),
        (mt.errors.PromptError, "too many tokens to compare with as many others", {"tokens": list(range(70))}),
        (mt.errors.ArgumentError, "a lens of the stream and of the next token is needed", {"lens": heads}),
    ]
    for kind, text, given in wrong:
        with pytest.raises(kind, match=text) as refused:
            asked(model, **given)
        assert "\n" not in str(refused.value)
