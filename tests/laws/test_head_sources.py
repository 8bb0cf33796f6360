"""Heads of a planted memory of facts are told by their source, and what they add is what contributions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome import planted


@torch.no_grad()
def test_sources_are_contributions_over_the_mean_token() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    prompts, answers = [[7, 20, 33, 41, 52], [7, 21, 34, 42, 53]], [11, 13]
    data = mt.explain.head_sources(it, prompts, subject=(1, 3), answer=answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        own, other = (
            mt.explain.contributions(it, prompt, answer=a, detail=("source",))["attn_source"].values[0]
            for a in (answer, answers[1 - i])
        )
        assert np.allclose(data["subject_each"][i] - data["subject_others_each"][i],
                           (own - other)[..., 1:3].sum(-1), atol=1e-4)  # fmt: skip
        run = it.run([prompt], capture=["*.attn.pattern@-1", "*.attn.v", "final.scale@-1"])
        norm = it.final_norm
        assert norm is not None
        u = (it.W_U[:, answer] - it.W_U.mean(1)) * norm.gain / run["final.scale@-1"][0, 0]
        a, v = run["1.attn.pattern@-1"][0, 3, 0], run["1.attn.v"][0, :, 1]  # head 3 reads the second group
        parts = a * (v @ it.layers[1].W_O[3] @ u)
        assert float(data["subject_each"][i, 1, 3]) == pytest.approx(float(parts[1:3].sum()), abs=1e-5)
        assert float(data["relation_each"][i, 1, 3]) == pytest.approx(float(parts[3:].sum()), abs=1e-5)
    assert data["group"].values.tolist() == ["subject", "relation", "mixed", "all"]
    assert int(data["count"][3]) == int(data["count"][:3].sum()) == int((data["kind"] > 0).sum()) > 0


def test_a_planted_head_that_fetches_attributes_is_a_subject_head() -> None:
    it = planted.fact_memory(0)
    truth, relation = it.truth, 1
    some, filler = truth["subjects"][:8], truth["fillers"]
    prompts = [[truth["bos"], filler[0], s, filler[1], truth["relations"][relation]] for s in some]
    answers = [row[relation] for row in truth["facts"][:8]]
    data = mt.explain.head_sources(it.model, prompts, subject=(2, 3), answer=answers)
    layer, head = truth["heads"][relation]
    assert int(data["kind"][layer, head]) == 1
    assert int((data["kind"] > 0).sum()) == 1
    assert float(data["subject_diff"][layer, head]) > 5  # of this subject, not of any
    assert float(data["loss"].sel(group="subject")) > 1
    assert abs(float(data["loss_random"].sel(group="subject"))) < 0.1
    assert float(data["loss"].sel(group="relation")) == 0


def test_there_must_be_one_subject_per_prompt() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="one subject per prompt; got 1; allowed: 2"):
        mt.explain.head_sources(it, [[7, 8, 9], [8, 9, 10]], subject=[(0, 1)], answer=[11, 12])
