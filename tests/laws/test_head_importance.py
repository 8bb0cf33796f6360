"""The importance of heads: gradients against finite differences and exact losses, and literal runs without heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements import head_inequality, leave_one_out, pruning_curve, token_loss
from microtome.measurements._head_importance import gate_gradients, gini, losses_without


def ids(rows: int = 3, length: int = 10) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def opened(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name), prove=False)


def losses(model: mt.Model, *edits: mt.edit.Edit) -> Tensor:
    return token_loss(model.run(ids(), edits=list(edits)).logits, ids()).double().mean(1)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox-parallel"])
def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(name: str) -> None:
    model, e = opened(name), 1e-2
    found = gate_gradients(model, ids(), [0, 1, 2])
    assert found.shape == (3, 3, 4)
    for layer, head in ((0, 1), (2, 3)):
        site = f"{layer}.attn.z[{head}]"
        up, down = (losses(model, mt.edit.Scale(site, 1 + x)) for x in (e, -e))
        assert torch.allclose(found[:, layer, head], (up - down) / (2 * e), rtol=2e-2, atol=2e-4)
    data = mt.measure(model, "head_importance", text=ids())
    assert np.allclose(data["gate_gradient"], found.abs().mean(0))
    assert np.allclose((data["importance"] ** 2).sum("head"), 1)
    assert np.allclose(data["importance_even"], 0.5)


def test_where_the_loss_is_linear_in_a_head_the_gradient_is_exact() -> None:
    """Heads that write a hundredth of what they did: what is left of the second order is a hundredth too."""
    hf = families.build("llama-gqa")
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "o_proj" in name:
                weight.mul_(0.01)
    model = mt.open(hf.double(), prove=False)
    slope, exact = gate_gradients(model, ids(), [0, 1, 2]), losses_without(model, ids(), [0, 1, 2])
    gap = (exact["loss_without_head"] + slope).abs().max()
    assert float(gap) < 0.03 * float(slope.abs().max())


@pytest.mark.parametrize("name", ["llama-gqa", "falcon-mqa", "gpt2"])
def test_losses_without_heads_are_those_of_literal_runs(name: str) -> None:
    model = opened(name)
    data = mt.measure(model, "head_ablation", text=ids())
    whole, size = losses(model), model.anatomy.n_heads // model.anatomy.n_kv_heads
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        alone = losses(model, mt.edit.Zero(f"{layer}.attn.z[{head}]")) - whole
        assert float(data["loss_without_head"][layer, head]) == pytest.approx(float(alone.mean()), abs=1e-5)
        first = head // size * size
        group = losses(model, mt.edit.Zero(f"{layer}.attn.z[{first}-{first + size - 1}]")) - whole
        assert float(data["loss_without_group"][layer, head]) == pytest.approx(float(group.mean()), abs=1e-5)
    if size == 1:
        assert np.array_equal(data["loss_without_group"], data["loss_without_head"])


def test_a_head_that_writes_nothing_matters_to_nobody() -> None:
    hf = families.build("llama-gqa")
    width = hf.config.hidden_size // hf.config.num_attention_heads
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0  # type: ignore[union-attr, index, operator]
    data = mt.measure(mt.open(hf, prove=False), "head_importance", "head_ablation", text=ids())
    assert float(data["gate_gradient"][1, 2]) == 0
    assert float(data["loss_without_head"][1, 2]) == pytest.approx(0, abs=1e-6)
    assert float(np.abs(data["loss_without_head"]).max()) > 1e-3


def test_inequality_is_the_gini_coefficient() -> None:
    assert gini(np.array([1.0, 1, 1, 1])) == 0
    assert gini(np.array([0.0, 0, 0, 5])) == pytest.approx(3 / 4)
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25)
    assert np.isnan(gini(np.zeros(3)))
    coords = {"layer": [4, 9], "head": [0, 1]}
    values = {"gate_gradient": [[1.0, 3.0], [2.0, 2.0]], "loss_without_head": [[0.1, 0.3], [-0.2, 0.2]]}
    data = xr.Dataset({name: (("layer", "head"), x) for name, x in values.items()}, coords=coords)
    found = head_inequality(data)
    assert found["layer"].values.tolist() == [4, 9]
    assert np.allclose(found["gini"], [0.25, 0])
    assert np.allclose(found["gini_exact"], [0.25, 0.5])
    assert float(found["rank_correlation"]) == pytest.approx(1.0)
    with pytest.raises(mt.errors.DataError, match="the inequality of heads needs two measures"):
        head_inequality(data[["gate_gradient"]])


def test_pruning_begins_at_the_whole_model_and_ends_without_heads() -> None:
    model = opened()
    order = [(layer, head) for layer in range(3) for head in range(4)]
    curve = pruning_curve(model, ids(), order, steps=3)
    assert curve["removed"].values.tolist() == [0, 4, 8, 12]
    assert curve["loss_random"].shape == (3, 4)
    assert float(curve["loss"][0]) == pytest.approx(float(losses(model).mean()))
    some = losses(model, mt.edit.Zero("0.attn.z")).mean()
    none = losses(model, mt.edit.Zero("*.attn.z")).mean()
    assert float(curve["loss"][1]) == pytest.approx(float(some), abs=1e-6)
    assert np.allclose(curve["loss_random"][:, 0], curve["loss"][0])
    assert np.allclose(curve["loss_random"][:, 3], float(none), atol=1e-6)
    assert float(curve["loss"][3]) == pytest.approx(float(none), abs=1e-6)
    assert len({float(x) for x in curve["loss_random"][:, 1]}) == 3  # orders of their own
    with pytest.raises(mt.errors.DataError, match="the order must name each head once"):
        pruning_curve(model, ids(), [(0, 1), (0, 1)])
    for layer, head in ((0, 4), (3, 0), (0, -1)):
        with pytest.raises(
            mt.errors.DataError, match=f"names a head that the model has not; got \\({layer}, {head}\\)"
        ):
            pruning_curve(model, ids(), [(0, 1), (layer, head)])


def test_greedy_pruning_ranks_again_on_what_is_left() -> None:
    """Heads that write nothing go first; each later step is that of the gradients of the model without those before."""
    hf = families.build("llama-gqa")
    width = hf.config.hidden_size // hf.config.num_attention_heads
    dead = [(0, 1), (1, 2), (2, 3)]
    with torch.no_grad():
        for layer, head in dead:
            hf.model.layers[layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0  # type: ignore[union-attr, index, operator]
    model = mt.open(hf, prove=False)
    curve = pruning_curve(model, ids(), steps=4, draws=1)
    order = list(zip(curve["layer"].values.tolist(), curve["head"].values.tolist(), strict=True))
    assert sorted(order[:3]) == dead
    assert float(curve["loss"][1]) == pytest.approx(float(curve["loss"][0]), abs=1e-6)
    assert sorted(order) == [(layer, head) for layer in range(3) for head in range(4)]
    cut = [mt.edit.Zero(f"{layer}.attn.z[{head}]") for layer, head in order[:6]]
    left = gate_gradients(model, ids(), [0, 1, 2], cut).abs().mean(0)
    left = left / left.norm(dim=1, keepdim=True)
    rest = sorted(order[6:], key=lambda head: float(left[head]))
    assert order[6:9] == rest[:3]
    with pytest.raises(mt.errors.ArgumentError, match="a curve needs steps and draws; got steps=0"):
        pruning_curve(model, ids(), steps=0)


def test_the_bound_of_leaving_one_out_is_the_best_head_of_each_row() -> None:
    model = opened()
    data = leave_one_out(model, ids(2))
    whole = token_loss(model.run(ids(2)).logits, ids(2)).double().mean(1)
    every = torch.stack([
        token_loss(model.run(ids(2), edits=[mt.edit.Zero(f"{i}.attn.z[{h}]")]).logits, ids(2)).double().mean(1)
        for i in range(3) for h in range(4)
    ])  # fmt: skip
    assert np.allclose(data["gain"], (whole - every.amin(0)).clamp(min=0), atol=1e-5)
    assert [4 * int(i) + int(h) for i, h in zip(data["layer"], data["head"], strict=True)] == every.argmin(0).tolist()
    assert float(data["gain_one"]) == pytest.approx(max(0.0, float((whole - every).mean(1).max())), abs=1e-5)
    assert float(data["gain"].mean()) >= float(data["gain_one"])


@pytest.mark.parametrize("name", ["head_importance", "head_ablation", "in_context"])
def test_a_model_without_a_next_token_has_no_importance(name: str) -> None:
    with pytest.raises(mt.errors.ModelUnsupported, match="attention in both directions; allowed: causal models"):
        mt.measure(opened("bert"), name, text=ids())
