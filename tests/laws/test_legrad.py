"""LeGrad: the gradient of each layer's own lens, and the key of a planted head."""

from __future__ import annotations

import pytest
import torch
from tests import families

import microtome as mt

PROMPT = [7, 20, 33, 41, 52, 28]


def test_it_is_the_gradient_of_each_layers_lens() -> None:
    """Of the last position's stream by its pattern, with plain weights: one head and key at a time."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.explain.legrad(model, PROMPT, answer=11, foil=13)
    a = model.anatomy
    run = model.run([PROMPT], capture=["*.attn.pattern", "*.attn.v", "*.resid_post"])
    for layer in range(a.n_layers):
        found = torch.zeros(len(PROMPT), dtype=torch.float64)
        base = run[f"{layer}.attn.pattern"]
        stop = None if layer == a.n_layers - 1 else layer + 1
        for head in range(a.n_heads):
            for key in range(len(PROMPT)):
                reads = []
                for step in (1e-2, -1e-2):
                    pattern = base.clone()
                    pattern[0, head, -1, key] += step
                    edit = mt.edit.Set(f"{layer}.attn.pattern", value=pattern.transpose(1, 2))
                    site = f"{layer}.resid_post"
                    changed = model.run([PROMPT], capture=site, edits=[edit], stop_at=stop, logits=stop is None)
                    logits = model.unembed(changed[site][0, -1]).detach().double()
                    reads.append(float(logits[11] - logits[13]))
                found[key] += max(0.0, (reads[0] - reads[1]) / 2e-2) / (a.n_heads * len(PROMPT))
        torch.testing.assert_close(torch.tensor(data["by_layer"].values[layer]), found, rtol=2e-2, atol=2e-5)
    total = data["by_layer"].sum("layer")
    assert float(abs(total - data["relevance"]).max()) < 1e-12
    assert data["cut"].attrs["unit"] == "logits"


def test_the_effect_of_cutting_is_exact() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.explain.legrad(model, PROMPT, answer=11, foil=13)
    logits = model.run([PROMPT]).logits[0, -1]
    for key in (0, 3):
        edit = mt.edit.KnockOut("*.attn.scores@-1", keys=str(key))
        cut = model.run([PROMPT], edits=[edit]).logits[0, -1]
        fall = float((logits[11] - logits[13]) - (cut[11] - cut[13]))
        assert float(data["cut"][key]) == pytest.approx(fall, abs=1e-5)


def test_the_key_of_a_planted_head_is_found() -> None:
    """Induction: A B ... A is continued with B, which only the first B can tell."""
    it = mt.planted.induction()
    rng = torch.Generator().manual_seed(4)
    hits = 0
    for _ in range(6):
        row = torch.randperm(it.model.anatomy.d_vocab - 1, generator=rng)[:9] + 1
        prompt = torch.cat([row, row[4:5]])  # the fifth token again: its successor stands at position 5
        data = mt.explain.legrad(it.model, prompt, answer=int(row[5]))
        hits += int(data["relevance"].values.argmax()) == 5
        assert int(data["cut"].values.argmax()) == 5  # the truth
    assert hits == 6


def test_one_token_and_several_prompts() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="one token has no others to attend to"):
        mt.explain.legrad(model, [7])
    with pytest.raises(mt.errors.PromptError, match="the foil equals the answer"):
        mt.explain.legrad(model, PROMPT, answer=11, foil=11)
