"""Sharing ratios: they sum to 1 everywhere, follow plain weights, and a copied token gets what is its own."""

from __future__ import annotations

import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._sharing import ways

PROMPT = [7, 20, 33, 41, 52, 28]
FAMILIES = ["llama-gqa", "gpt2", "gptj", "gemma2", "qwen3", "falcon-gqa"]
NAMES = ("attn_out", "mlp_out", "attn.pattern", "attn.v", "attn.z", "resid_pre", "resid_mid", "resid_post")


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_sum_to_one(name: str) -> None:
    data = mt.explain.sharing(mt.open(families.build(name), prove=False), PROMPT)
    assert float(data["share"].sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(abs(data["by_layer"].sum("pos") - 1).max()) < 1e-6
    assert float(data["attention"].sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(abs(data["by_layer"][0] - data["share"]).max()) == 0.0


def test_a_layers_ways_are_projections_on_the_sum() -> None:
    """By plain weights, one source position at a time."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    run = model.run([PROMPT], capture=[f"*.{name}" for name in NAMES])
    found = ways(model, run, 1)
    pattern, v = run["1.attn.pattern"][0].double(), run["1.attn.v"][0].double()
    w = model.layers[1].W_O.detach().double()
    group = pattern.shape[0] // v.shape[1]
    middle, out = run["1.resid_mid"][0].double(), run["1.attn_out"][0].double()
    for t in range(len(PROMPT)):
        whole = float(out[t] @ middle[t] / (middle[t] @ middle[t]))
        for s in range(t):
            brought = sum(pattern[h, t, s] * (v[s, h // group] @ w[h]) for h in range(pattern.shape[0]))
            share = float(brought @ out[t] / (out[t] @ out[t]))
            assert float(found[t, s]) == pytest.approx(whole * share, abs=1e-6)
        assert float(found[t].sum()) == pytest.approx(1.0, abs=1e-9)
        assert not bool(found[t, t + 1 :].any())


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2"])
def test_what_heads_bring_adds_up_to_attention(name: str) -> None:
    """Without biases nothing is left over: with the own position's attention taken away, the rest is what it was."""
    from microtome.explain import _sharing as module

    model = mt.open(families.build(name), prove=False)
    run = model.run([PROMPT], capture=[f"*.{site}" for site in NAMES])
    out = run["0.attn_out"][0].double()
    given = module._brought(model, run, 0, out)
    torch.testing.assert_close(given.sum(-1), torch.ones(len(PROMPT), dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_copied_token_gets_the_share() -> None:
    """Induction on a planted model: what is predicted at the end was brought from the successor of the first A."""
    it = mt.planted.induction()
    rng = torch.Generator().manual_seed(4)
    row = torch.randperm(it.model.anatomy.d_vocab - 1, generator=rng)[:9] + 1
    prompt = torch.cat([row, row[4:5]])
    data = mt.explain.sharing(it.model, prompt, answer=int(row[5]))
    others = data["share"].values[:-1]
    assert int(abs(others).argmax()) == 5
    assert int(data["deletion"].values.argmax()) in (4, 5, 9)


def test_other_models_are_refused() -> None:
    with pytest.raises(mt.errors.MicrotomeError):
        mt.explain.sharing(mt.open(families.build("bert"), prove=False), PROMPT)
