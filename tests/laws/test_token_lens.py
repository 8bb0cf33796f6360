"""What the token lens reads of a span, of the rest and of biases sums to what attention adds; cuts are real cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt

PROMPT = [7, 20, 33, 41, 52, 60]
NAMES = ["llama-gqa", "gpt2", "gemma2", "granite", "gpt_neox-parallel", "falcon-mqa"]


def model(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name), prove=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_attention_sum_to_its_logit(name: str) -> None:
    it = model(name)
    data = mt.explain.token_lens(it, PROMPT, span=(1, 3), answers=[11, 13, 17])
    total = data["span"] + data["others"] + data["bias"]
    assert abs(total - data["attn"]).max() < 1e-5
    whole = mt.explain.contributions(it, PROMPT, answer=11, detail=("source",)).isel(batch=0)
    assert np.allclose(data["span"].sel(answer="11"), whole["attn_source"][..., 1:3].sum(("head", "k_pos")), atol=1e-4)
    assert np.allclose(data["mlp"].sel(answer="11"), whole["mlp"], atol=1e-4)
    everything = mt.explain.token_lens(it, PROMPT, span=(0, 6), answers=[11])
    assert abs(everything["others"]).max() < 1e-5
    assert np.allclose(everything["span"], (everything["attn"] - everything["bias"]), atol=1e-5)


def test_the_cut_is_a_run_in_which_the_span_cannot_be_read() -> None:
    it = model()
    data = mt.explain.token_lens(it, PROMPT, span=(1, 3), answers=[11])

    def mask(scores: torch.Tensor) -> torch.Tensor:
        scores[..., [1, 2]] = float("-inf")
        return scores

    clean = it.run([PROMPT], capture=["final.scale@-1"])
    run = it.run([PROMPT], ["*.mlp_out@-1"], [mt.edit.Apply("*.attn.scores@-1", function=mask)])
    norm = it.final_norm
    assert norm is not None
    u = it.W_U[:, 11] * norm.gain / clean["final.scale@-1"][0, 0]
    expected = (run["*.mlp_out@-1"][:, 0, 0] @ u).detach()
    assert np.allclose(data["mlp_cut"][:, 0], expected, atol=1e-5)
    assert abs(data["mlp_diff"]).max() > 1e-3
    assert abs(data["mlp_diff"] - (data["mlp"] - data["mlp_cut"])).max() < 1e-9


def test_words_are_the_ends_of_all_logits() -> None:
    it = model()
    data = mt.explain.token_lens(it, PROMPT, span=2, top=2)
    every = mt.explain.token_lens(it, PROMPT, span=2, answers=list(range(it.anatomy.d_vocab)))["span"].values
    for layer in range(3):
        order = every[layer].argsort()
        assert data["promoted"].values[layer].tolist() == [str(i) for i in order[::-1][:2]]
        assert data["suppressed"].values[layer].tolist() == [str(i) for i in order[:2]]
    own = it.run([PROMPT]).logits[0, -1].topk(5).indices.tolist()
    assert data["answer"].values.tolist() == [str(i) for i in own]


def test_a_span_behind_the_position_is_refused() -> None:
    with pytest.raises(mt.errors.PromptError, match="the position cannot attend to the span; got position 2"):
        mt.explain.token_lens(model(), PROMPT, span=(3, 5), position=2)
