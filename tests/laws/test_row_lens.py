"""Rows read as tokens: the neuron that reads and says one token is found, and setting it says that token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families

import microtome as mt

TOKEN, LAYER, NEURON = 33, 1, 17


def planted() -> mt.Model:
    """A Llama one of whose neurons reads along the unembedding of a token, and writes along it."""
    hf: Any = families.build("llama-gqa")
    with torch.no_grad():
        mlp, direction = hf.model.layers[LAYER].mlp, hf.lm_head.weight[TOKEN] / hf.lm_head.weight[TOKEN].norm()
        mlp.up_proj.weight[NEURON] = 3 * direction / hf.model.layers[LAYER].post_attention_layernorm.weight
        mlp.down_proj.weight[:, NEURON] = 3 * direction / hf.model.norm.weight
    return mt.open(hf.requires_grad_(False), prove=False)


@pytest.mark.parametrize("rows", ["W_in", "W_out"])
def test_the_neuron_of_a_token_is_found_and_says_it(rows: Any) -> None:
    model = planted()
    data = mt.explain.row_lens(model, [7, 20, 33, 41, 52], rows=rows, neurons=3, strength=1.0)
    first = data.isel(component=0)
    assert str(data["component"].values[0]) == f"L{LAYER}N{NEURON} {TOKEN}"
    assert int(first["token"]) == TOKEN
    assert float(first["peak"]) > 1.2 * float(data["shuffled_peak"].max())
    assert float(first["rise"]) > float(first["random_rise"]) + 0.5


def test_a_rise_is_that_of_one_run() -> None:
    model = planted()
    prompt = [7, 20, 33, 41, 52]
    data = mt.explain.row_lens(model, prompt, neurons=2, strength=0.7)
    run = model.run([prompt], f"{LAYER}.resid_post@-1")
    value = 0.7 * float(run[f"{LAYER}.resid_post@-1"].norm()) / float(model.layers[LAYER].W_out[NEURON].norm())
    edited = model.run([prompt], edits=mt.edit.Set(f"{LAYER}.mlp.post[{NEURON}]@-1", value))
    after, before = (x.logits[0, -1].log_softmax(-1)[TOKEN] for x in (edited, run))
    assert float(data["rise"][0]) == pytest.approx(float(after - before), abs=1e-5)


def test_several_prompts_are_refused() -> None:
    with pytest.raises(mt.errors.PromptError, match="neurons are set in one prompt; got 2"):
        mt.explain.row_lens(planted(), [[5, 6], [6, 7]])
