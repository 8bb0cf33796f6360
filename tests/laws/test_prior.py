"""The stream ends at the model's own prediction, and a planted memory of the context turns it away from the prior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome import planted
from microtome.explain._divergence import jensen_shannon

PROMPTS = torch.randint(5, families.VOCAB, (12, 7), generator=torch.Generator().manual_seed(1)).tolist()


def test_the_divergence_is_that_of_jensen_and_shannon() -> None:
    p, q = (torch.rand(2, 9, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    m = (p + q) / 2
    expected = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    other = 0.5 * (m * (m / p).log()).sum(-1) + 0.5 * (m * (m / q).log()).sum(-1)
    found = jensen_shannon(p.log(), q.log())
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found, jensen_shannon(q.log(), p.log()))
    assert float((found - other).abs().min()) > 1e-4  # the divergence with its arguments exchanged is another
    ends = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]).double()
    assert float(jensen_shannon(ends[0], ends[1])) == pytest.approx(math.log(2))
    assert float(jensen_shannon(ends[0], ends[0])) == 0.0


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
def test_the_last_layer_is_the_model(name: str) -> None:
    it = mt.open(families.build(name), prove=False)
    data = mt.explain.prior_and_context(it, PROMPTS)
    assert abs(float(data["to_context"][-1])) < 1e-6
    assert float(data["to_prior"][-1]) > 1e-3
    logits = it.run(PROMPTS).logits[:, -1]
    prior = it.run([row[-1:] for row in PROMPTS]).logits[:, -1]
    differ = logits.argmax(-1) != prior.argmax(-1)
    assert data.attrs["differ"] == int(differ.sum()) > 0
    best = logits.softmax(-1).max(-1).values[differ]
    assert np.allclose(data["context_each"][:, -1], best, atol=1e-5)
    own = logits.softmax(-1).gather(1, prior.argmax(-1, keepdim=True))[differ, 0]
    assert np.allclose(data["prior_each"][:, -1], own, atol=1e-5)


def test_an_induction_head_turns_the_stream_from_the_prior_to_the_context() -> None:
    it = planted.induction(0)
    half = [torch.randperm(1000, generator=torch.Generator().manual_seed(s))[:12] for s in range(8)]
    prompts = torch.stack([torch.cat([row, row[:5]]) for row in half])
    data = mt.explain.prior_and_context(it.model, prompts)
    assert data.attrs["turns_at"] == 1
    assert float(data["context"][1]) > 0.9 > 0.1 > float(data["context"][0])
    assert float(data["context_other"][1]) < 0.01
    assert data.attrs["context_tokens"] == [str(int(row[5])) for row in half]


def test_prompts_that_the_context_does_not_change_are_refused() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="in no prompt does the context change"):
        mt.explain.prior_and_context(it, [[7]])
