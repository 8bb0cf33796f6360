"""The weights of a projection with an adapter are those it acts with, whatever was trained after opening."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor, nn

import microtome as mt

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "lm_head",
           "c_attn", "c_proj", "c_fc", "query_key_value", "dense")  # fmt: skip


class Adapter(nn.Module):
    """A projection plus two small ones in a row, of which the second begins at zero: LoRA, as peft builds it."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        n_in, n_out = base_layer.weight.shape[:: 1 if type(base_layer).__name__ == "Conv1D" else -1]
        self.lora_A, self.lora_B = nn.Linear(n_in, 3, bias=False), nn.Linear(3, n_out, bias=False)
        self.dropout = nn.Dropout(0.5)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(self.dropout(x)))


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def adapted(name: str) -> Any:
    hf = families.build(name)
    for path, module in list(hf.named_modules()):
        parent, _, own = path.rpartition(".")
        if own in TARGETS:
            setattr(hf.get_submodule(parent), own, Adapter(module))
    return hf


def train(hf: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for path, parameter in hf.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "falcon-gqa", "bloom"])
def test_weights_follow_an_adapter_that_is_trained_after_opening(name: str) -> None:
    hf = adapted(name)
    model = mt.open(hf)
    sites = ["1.attn.result", "1.attn_out"]
    before, own = model.run(ids(), capture=sites), model.layers[1].W_O.clone()
    train(hf.train())
    assert float((model.layers[1].W_O - own).abs().max()) > 0.01
    run = model.run(ids(), capture=sites)
    assert float((run["1.attn_out"] - before["1.attn_out"]).abs().max()) > 0.1
    bias = model.layers[1].b_O
    total = run["1.attn.result"].sum(2) + (0.0 if bias is None else bias)
    torch.testing.assert_close(total, run["1.attn_out"], rtol=1e-4, atol=1e-5)
    assert not [check for check in model.prove() if check.status == "fails"]
    assert all(module.training for module in hf.modules())


def test_sweeps_edges_and_the_lens_use_what_an_adapter_makes() -> None:
    hf = adapted("llama-gqa")
    model = mt.open(hf)
    train(hf)
    metric = mt.metric.LogitDifference(answer=7, foil=9)
    source = model.run(ids(1, seed=5), capture=["*.attn.z", "*.resid_pre"])
    cell = mt.edit.Patch("1.resid_pre@3", source)
    literal = model.run(ids(1), edits=cell).logits[:, -1]
    swept = model.sweep(ids(1), [cell], metric).run()
    assert math.isclose(float(swept.values[0]), float(literal[0, 7] - literal[0, 9]), rel_tol=1e-3, abs_tol=1e-4)
    assert abs(float(swept.effects[0])) > 1e-2
    # What a head of the last layer writes, read by the MLP of that layer alone.
    last = model.anatomy.n_layers - 1
    edge = model.sweep(ids(1), [mt.sweep.Edge(f"{last}.attn.z[1]", f"{last}.mlp.in", source)], metric).run()
    patched = model.run(ids(1), f"{last}.mlp_out", mt.edit.Patch(f"{last}.attn.z[1]", source))
    through = model.run(ids(1), edits=mt.edit.Patch(f"{last}.mlp_out", patched)).logits[0, -1]
    base = model.run(ids(1)).logits[0, -1]
    expected = float((through[7] - through[9]) - (base[7] - base[9]))
    assert abs(expected) > 1e-3
    assert math.isclose(float(edge.effects[0]), expected, rel_tol=1e-3, abs_tol=1e-5)
    final = model.run(ids(1), capture=f"{last}.resid_post")
    torch.testing.assert_close(model.unembed(final[f"{last}.resid_post"]), final.logits, rtol=1e-4, atol=1e-4)
