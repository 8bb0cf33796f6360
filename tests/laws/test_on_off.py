"""Gates on or off: nothing changes where they are two-valued, and the edits do what the formula says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import nn

import microtome as mt

TEXT = torch.randint(2, 90, (1, 24), generator=torch.Generator().manual_seed(6))


class Step(nn.Module):
    """An activation of two values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, 0.7, -0.1).to(x)


def test_nothing_changes_where_gates_are_two_valued() -> None:
    hf: Any = families.build("llama-gqa")
    for layer in hf.model.layers:
        layer.mlp.act_fn = Step()
    data = mt.explain.on_off(mt.open(hf, prove=False), TEXT)
    assert float(data["loss"]) == pytest.approx(float(data["loss_whole"]), abs=1e-5)
    assert float(data["agreement"]) == 1.0
    assert float(abs(data["rise"]).max()) < 1e-5
    assert float(abs(data["rise_shuffled"]).max()) > 1e-4  # the control does change


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
def test_a_layer_is_what_the_formula_says(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    data = mt.explain.on_off(model, TEXT)
    site = "mlp.gate" if model.anatomy.gated else "mlp.pre"
    run = model.run(TEXT, capture=[f"1.{site}", "1.mlp.post", *(["1.mlp.up"] if model.anatomy.gated else [])])
    act: Any = model.hf.get_submodule(str(model.anatomy.parts.layers[1].act))
    a = act(run[f"1.{site}"])[0].numpy().astype(float)
    new = np.empty_like(a)
    for neuron in range(a.shape[1]):
        on = a[:, neuron] > 0
        for which in (on, ~on):
            new[which, neuron] = a[which, neuron].mean() if which.any() else 0.0
    post = torch.tensor(new).to(run["1.mlp.post"])
    post = post * run["1.mlp.up"][0] if model.anatomy.gated else post
    logits = model.run(TEXT, edits=[mt.edit.Set("1.mlp.post", value=post.unsqueeze(0))]).logits[0, :-1].double()
    loss = float(nn.functional.cross_entropy(logits, TEXT[0, 1:]))
    assert float(data["rise"][1]) == pytest.approx(loss - float(data["loss_whole"]), abs=1e-5)
    assert data["rise"].sizes == {"layer": model.anatomy.n_layers}


def test_short_texts_and_models_without_gates() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="means need one text of 8 tokens or more; got 1 rows of 3"):
        mt.explain.on_off(model, [1, 2, 3])
    with pytest.raises(mt.errors.SiteError, match="has no gates that are seen"):
        mt.explain.on_off(mt.open(families.build("mixtral"), prove=False), TEXT)
