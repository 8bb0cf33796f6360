"""Heads of a planted memory of facts are told by their source, and what they add is what contributions say."""

from __future__ import annotations

import numpy as np
import pytest
from tests import families

import microtome as mt
from microtome import planted


def test_sources_are_contributions_over_the_mean_token() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    prompts, answers = [[7, 20, 33, 41, 52], [7, 21, 34, 42, 53]], [11, 13]
    data = mt.explain.head_sources(it, prompts, subjects=(1, 3), answer=answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        own, other = (
            mt.explain.contributions(it, prompt, answer=a, detail=("source",))["attn_source"].values[0]
            for a in (answer, answers[1 - i])
        )
        run = it.run([prompt], capture=["*.attn.z@-1", "final.scale@-1"])
        norm = it.final_norm
        assert norm is not None
        u = it.W_U.mean(1) * norm.gain / run["final.scale@-1"][0, 0]
        whole = np.array([[float(z @ w @ u) for z, w in zip(run[f"{n}.attn.z@-1"][0, 0], it.layers[n].W_O, strict=True)]
                          for n in range(3)])  # fmt: skip
        summed = data["subject_each"][i] + data["relation_each"][i]
        first = own[..., 0]  # the first token is of neither
        mean_first = whole - (own.sum(-1) - first - summed.values)
        assert np.allclose(data["subject_each"][i] - data["subject_others_each"][i],
                           (own - other)[..., 1:3].sum(-1), atol=1e-4)  # fmt: skip
        assert np.isfinite(mean_first).all()
    assert data["group"].values.tolist() == ["subject", "relation", "mixed", "all"]
    assert int(data["count"][3]) == int(data["count"][:3].sum()) == int((data["kind"] > 0).sum()) > 0


def test_a_planted_head_that_fetches_attributes_is_a_subject_head() -> None:
    it = planted.fact_memory(0)
    truth, relation = it.truth, 1
    some, filler = truth["subjects"][:8], truth["fillers"]
    prompts = [[truth["bos"], filler[0], s, filler[1], truth["relations"][relation]] for s in some]
    answers = [row[relation] for row in truth["facts"][:8]]
    data = mt.explain.head_sources(it.model, prompts, subjects=(2, 3), answer=answers)
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
        mt.explain.head_sources(it, [[7, 8, 9], [8, 9, 10]], subjects=[(0, 1)], answer=[11, 12])
