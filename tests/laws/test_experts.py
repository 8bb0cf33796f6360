"""Mixtures of experts: weights of the router, what slots add, and neurons, against plain hooks and plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor, nn

import microtome as mt
from microtome.anatomy import Site
from microtome.atlas._tables import tables

configs = script("tools/family_configs.py")
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
NAMES = ("mlp.router", "mlp.experts.post", "mlp.experts")

# What is added times the slots, and how the experts are called.
FORMS = {
    "mixtral": 1.0,
    "gpt_oss": 1.0,  # biases; gate and up in turn, gated in a way of its own
    "qwen2_moe": 1.0,  # a gated shared expert
    "cohere2_moe": 0.5,  # averaged with a shared expert
    "granitemoeshared": 1.0,  # an MLP for all tokens beside the mixture
    "axk1": 1.0,  # a norm behind the mixture
    "dbrx": 1.0,  # one matrix for all experts, hidden states of three axes, a router of logits alone
    "nemotron_h": 1.0,  # experts without gates
    "deepseek_v4": 1.0,  # a table that may choose an expert twice
    "llama4_text": 1.0,  # all experts on all tokens, which come weighted
}
STACKED = ("llama4_text",)
SLOTS = [name for name in FORMS if name not in STACKED]


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def opened(name: str) -> mt.Model:
    return mt.open(configs.build(name))


def layer_of(model: mt.Model) -> int:
    return next(s.layer for s in model.anatomy.hook_points if s.name == "mlp.experts" and s.layer is not None)


def experts_of(model: mt.Model, layer: int) -> Any:
    return model.hf.get_submodule(model.anatomy.parts.layers[layer].experts or "")


@contextmanager
def hooked(module: nn.Module, before: Callable[..., Any] | None = None, after: Any = None) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before)] if before else []
    handles += [module.register_forward_hook(after)] if after else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain(model: mt.Model) -> Tensor:
    with torch.no_grad():
        return model.hf(input_ids=ids()).logits


def called_with(model: mt.Model, layer: int) -> tuple[Any, ...]:
    """What the experts of a layer are called with, by a plain hook."""
    seen: list[tuple[Any, ...]] = []
    with hooked(experts_of(model, layer), before=lambda _, args: seen.append(args)):
        plain(model)
    return seen[0]


@pytest.mark.parametrize("name", [*FORMS, "lfm2_moe"])  # the class of whose convolutions has "Moe" in its name
def test_every_form_is_proven_and_watching_it_changes_nothing(name: str) -> None:
    model = opened(name)
    layer = layer_of(model)
    held = {c.where for c in model.proof if c.status == "holds"}
    assert {f"{layer}.mlp.experts", f"{layer}.mlp.experts.post"} <= held
    assert all(Site(site, layer) in model.anatomy.hook_points for site in NAMES)
    run = model.run(ids(), capture=[f"*.{site}" for site in NAMES])
    assert torch.equal(run.logits, plain(model))
    n = {site: run[f"{layer}.{site}"].shape[2:] for site in NAMES}
    for site, axes in (
        ("mlp.router", ("expert",)),
        ("mlp.experts.post", ("expert", "neuron")),
        ("mlp.experts", ("rank",)),
    ):
        sizes = tuple(model.anatomy.size(Site(site, layer), axis) for axis in axes)
        assert tuple(n[site][: len(sizes)]) == sizes
    assert model.anatomy.n_experts == 6


@pytest.mark.parametrize("name", SLOTS)
def test_the_router_holds_the_weights_that_the_experts_are_called_with(name: str) -> None:
    model = opened(name)
    layer = layer_of(model)
    _, chosen, weights = called_with(model, layer)
    expected = torch.zeros(16, 6).scatter_add(1, chosen, weights)
    assert torch.equal(model.run(ids(), capture=f"{layer}.mlp.router")[f"{layer}.mlp.router"].flatten(0, 1), expected)


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("axk1", "deepseek_v4")])
def test_slots_sum_to_what_the_experts_add_to_their_layer(name: str) -> None:
    model = opened(name)
    layer = layer_of(model)
    mlp = model.hf.get_submodule(model.anatomy.parts.layers[layer].mlp or "")
    seen: list[Any] = []
    with hooked(mlp, after=lambda _, args, out: seen.append((args, out))):
        plain(model)
    args, whole = seen[0]
    with torch.no_grad(), hooked(experts_of(model, layer), after=lambda _, args, out: torch.zeros_like(out)):
        without = mlp(*args)
    whole, without = (x[0] if isinstance(x, tuple) else x for x in (whole, without))
    slots = model.run(ids(), capture=f"{layer}.mlp.experts")[f"{layer}.mlp.experts"]
    torch.testing.assert_close(slots.sum(2).reshape(whole.shape), whole - without, **NEAR)
    assert model.anatomy.hook_points[Site("mlp.experts", layer)].scale == pytest.approx(FORMS[name], abs=1e-5)


@pytest.mark.parametrize("name", SLOTS)
def test_zeroing_a_slot_is_zeroing_its_weight(name: str) -> None:
    model = opened(name)
    layer = layer_of(model)

    def without(_: Any, args: tuple[Any, ...]) -> Any:
        hidden, chosen, weights = args
        return hidden, chosen, weights * torch.tensor([0.0, 1.0])

    with hooked(experts_of(model, layer), before=without):
        expected = plain(model)
    run = model.run(ids(), edits=mt.edit.Zero(f"{layer}.mlp.experts[0]"))
    torch.testing.assert_close(run.logits, expected, **NEAR)
    assert not torch.allclose(run.logits, plain(model), atol=1e-3)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v4"])  # the latter sends tokens to one expert twice
def test_a_router_is_scaled_as_the_weights_are(name: str) -> None:
    model = opened(name)
    layer = layer_of(model)
    with hooked(experts_of(model, layer), before=lambda _, args: (*args[:2], args[2] * 0.5)):
        expected = plain(model)
    run = model.run(ids(), edits=mt.edit.Scale(f"{layer}.mlp.router", 0.5))
    torch.testing.assert_close(run.logits, expected, **NEAR)
    assert not torch.allclose(run.logits, plain(model), atol=1e-3)


def test_zeroing_a_slot_of_experts_that_see_all_tokens_is_zeroing_their_best_score() -> None:
    model = opened("llama4_text")
    layer = layer_of(model)
    router = model.hf.get_submodule(model.anatomy.parts.layers[layer].router or "")
    chosen: list[Tensor] = []

    def without(_: Any, args: Any, out: tuple[Tensor, Tensor]) -> Any:
        chosen.append(out[0])
        return out[0].scatter(1, out[0].argmax(1, keepdim=True), 0.0), out[1]

    with hooked(router, after=without):
        expected = plain(model)
    run = model.run(ids(), edits=mt.edit.Zero(f"{layer}.mlp.experts[0]"), capture=f"{layer}.mlp.router")
    torch.testing.assert_close(run.logits, expected, **NEAR)
    assert torch.equal(run[f"{layer}.mlp.router"].flatten(0, 1), chosen[0])

    with hooked(router, after=lambda _, args, out: (out[0] * 0.5, out[1])):
        expected = plain(model)
    run = model.run(ids(), edits=mt.edit.Scale(f"{layer}.mlp.router", 0.5))
    torch.testing.assert_close(run.logits, expected, **NEAR)


@pytest.mark.parametrize("name", SLOTS)
def test_neurons_through_the_weights_of_their_expert_are_its_slot(name: str) -> None:
    """The weights are those of the module, read here by their own names."""
    model = opened(name)
    layer, experts = layer_of(model), experts_of(opened(name), layer_of(opened(name)))
    _, chosen, weights = called_with(model, layer)
    run = model.run(ids(), capture=[f"{layer}.mlp.experts.post", f"{layer}.mlp.experts"])
    post, slots = (run[f"{layer}.{site}"].flatten(0, 1) for site in ("mlp.experts.post", "mlp.experts"))
    down = experts.mlp.w2.view(6, -1, 32) if name == "dbrx" else experts.down_proj
    down = down if name in ("dbrx", "gpt_oss") else down.transpose(1, 2)
    bias = experts.down_proj_bias if name == "gpt_oss" else torch.zeros(6, 32)
    at = torch.arange(16)
    for slot in range(chosen.shape[1]):
        expert = chosen[:, slot]
        made = torch.einsum("tn,tnd->td", post[at, expert], down[expert]) + bias[expert]
        torch.testing.assert_close(slots[:, slot], made * weights[:, [slot]] * FORMS[name], **NEAR)
    unused = torch.ones(16, 6, dtype=torch.bool).scatter(1, chosen, value=False)
    assert not post[unused].any()
    assert post[~unused].abs().sum(-1).min() > 0


def test_neurons_of_experts_are_those_of_the_plain_formula() -> None:
    model = opened("mixtral")
    hidden, chosen, _ = called_with(model, 0)
    experts, layer = experts_of(model, 0), model.layers[0]
    post = model.run(ids(), capture="0.mlp.experts.post")["0.mlp.experts.post"].flatten(0, 1)
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    for token in range(16):
        for expert in chosen[token]:
            expected = nn.functional.silu(gate[expert] @ hidden[token]) * (up[expert] @ hidden[token])
            torch.testing.assert_close(post[token, expert], expected, **NEAR)
    assert torch.equal(layer.W_gate, gate.transpose(1, 2))
    assert torch.equal(layer.W_in, up.transpose(1, 2))


@pytest.mark.parametrize("name", FORMS)
def test_zeroing_the_neurons_of_an_expert_is_zeroing_its_output_weights(name: str) -> None:
    model = opened(name)
    layer = layer_of(model)
    site = f"{layer}.mlp.experts.post"
    post = model.run(ids(), capture=site)[site]
    expert = int(post.abs().sum((0, 1, 3)).argmax())
    hf = copy.deepcopy(model.hf)
    module = hf.get_submodule(model.anatomy.parts.layers[layer].experts or "")
    with torch.no_grad():
        (module.mlp.w2.view(6, -1, 32) if name == "dbrx" else module.down_proj)[expert] = 0.0
        expected = hf(input_ids=ids()).logits
    run = model.run(ids(), edits=mt.edit.Zero(f"{site}[{expert}]"), capture=[f"{layer}.mlp.experts", site])
    torch.testing.assert_close(run.logits, expected, **NEAR)
    assert not torch.allclose(run.logits, plain(model), atol=1e-3)
    assert not run[site][:, :, expert].any()
    if name in SLOTS and name != "gpt_oss":  # whose biases stay; what is seen after the edit is what is added then
        _, chosen, _ = called_with(model, layer)
        assert run[f"{layer}.mlp.experts"].flatten(0, 1)[chosen == expert].abs().max() < 1e-5


def test_an_expert_without_a_weight_is_not_reached_through_its_neurons() -> None:
    model = opened("qwen2_moe")
    site = f"{layer_of(model)}.mlp.experts.post"
    base = model.run(ids(), capture=site)
    unused = (base[site] == 0).all(-1, keepdim=True).expand_as(base[site])
    run = model.run(ids(), edits=mt.edit.Set(site, torch.where(unused, 5.0, base[site])))
    torch.testing.assert_close(run.logits, base.logits, **NEAR)


def test_neurons_of_experts_have_gradients() -> None:
    model = opened("mixtral")
    run = model.run(ids(), capture=["1.mlp.experts.post", "1.mlp.experts"], grad=True)
    gradients = run.grad(run.logits[:, -1].sum())
    post = gradients["1.mlp.experts.post"].flatten(0, 1)
    slots = gradients["1.mlp.experts"].flatten(0, 1)
    _, chosen, weights = called_with(model, 1)
    down = experts_of(model, 1).down_proj
    for token in range(16):
        for slot, expert in enumerate(chosen[token]):
            expected = slots[token, slot] @ down[expert] * weights[token, slot]
            torch.testing.assert_close(post[token, expert], expected, **NEAR)


# ----------------------------------------------------------------------------------- an MLP beside the mixture


def test_a_branch_is_the_mixture_and_the_mlp_beside_it() -> None:
    model = opened("granitemoeshared")
    block, by = model.hf.model.layers[1], model.hf.config.residual_multiplier
    seen: dict[str, Tensor] = {}
    with (
        hooked(block.block_sparse_moe, after=lambda _, args, out: seen.update(mixture=out)),
        hooked(block.shared_mlp, after=lambda _, args, out: seen.update(beside=out)),
    ):
        plain(model)
    run = model.run(ids(), capture=["1.mlp_out", "1.resid_mid", "1.resid_post"])
    torch.testing.assert_close(run["1.mlp_out"], (seen["mixture"] + seen["beside"]) * by, **NEAR)
    torch.testing.assert_close(run["1.mlp_out"], run["1.resid_post"] - run["1.resid_mid"], **NEAR)

    with (
        hooked(block.block_sparse_moe, after=lambda _, args, out: torch.zeros_like(out)),
        hooked(block.shared_mlp, after=lambda _, args, out: torch.zeros_like(out)),
    ):
        expected = plain(model)
    run = model.run(ids(), capture="1.mlp_out", edits=mt.edit.Zero("1.mlp_out"))
    torch.testing.assert_close(run.logits, expected, **NEAR)
    assert not run["1.mlp_out"].any()

    with hooked(block.post_attention_layernorm, after=lambda _, args, out: out * 0.5):
        expected = plain(model)
    torch.testing.assert_close(model.run(ids(), edits=mt.edit.Scale("1.mlp.in", 0.5)).logits, expected, **NEAR)


# -------------------------------------------------------------------------------------- what cannot be shown


class Rewired(nn.Module):
    """A mixture made of the parts of another."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gate, self.experts = inner.gate, inner.experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weights, chosen = self.gate(flat)
        return self.mixed(x, flat, chosen, weights)

    def mixed(self, x: Tensor, flat: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


class Gated(Rewired):
    """A mixture whose output is weighted by a gate that reads the tokens."""

    def mixed(self, x: Tensor, flat: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(flat, chosen, weights).view_as(x) * x.mean(-1, keepdim=True).sigmoid()


class ByName(Rewired):
    """A mixture that calls its experts with arguments by name, in another order."""

    def mixed(self, x: Tensor, flat: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(top_k_index=chosen, hidden_states=flat, top_k_weights=weights).view_as(x)


class Listed(nn.Module):
    """A mixture of modules in a list, each of which is called on the tokens that it got."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gate = inner.gate
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weights, chosen = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            at, slot = torch.where(chosen == number)
            out.index_add_(0, at, expert(flat[at]) * weights[at, slot, None])
        return out.view_as(x)


def test_a_mixture_that_is_gated_as_a_whole_is_left_out_with_its_numbers() -> None:
    hf = configs.build("mixtral")
    hf.model.layers[1].mlp = Gated(hf.model.layers[1].mlp)
    model = mt.open(hf)
    assert Site("mlp.experts", 0) in model.anatomy.hook_points
    with pytest.raises(
        mt.errors.SiteError, match=r'no site 1\.mlp\.experts .*fails "4 neurons" at 1\.mlp\.experts \(gap'
    ):
        model.run(ids(), capture="1.mlp.experts")
    assert Site("mlp_out", 1) in model.anatomy.hook_points


def test_arguments_by_name_are_found() -> None:
    hf = configs.build("mixtral")
    for block in hf.model.layers:
        block.mlp = ByName(block.mlp)
    model, usual = mt.open(hf), opened("mixtral")
    assert not [c for c in model.proof if c.status == "fails"]
    edits = [
        mt.edit.Scale("0.mlp.router", 0.5),
        mt.edit.Zero("1.mlp.experts[0]"),
        mt.edit.Scale("2.mlp.experts.post", 2.0),
    ]
    runs = [m.run(ids(), edits=edits, capture="*.mlp.experts.post") for m in (model, usual)]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert all(torch.equal(runs[0][site], runs[1][site]) for site in runs[0].captured)


def test_a_share_of_an_average_is_exact_in_bfloat16_too() -> None:
    model = mt.open(configs.build("cohere2_moe").to(torch.bfloat16))
    scales = {point.scale for site, point in model.anatomy.hook_points.items() if site.name == "mlp.experts"}
    assert scales == {0.5}


def test_experts_in_a_list_are_left_out_with_the_reason() -> None:
    hf = configs.build("mixtral")
    hf.model.layers[1].mlp = Listed(hf.model.layers[1].mlp)
    model = mt.open(hf)
    with pytest.raises(mt.errors.SiteError, match=r"no site 1\.mlp\.experts\.post .*modules in a list"):
        model.run(ids(), capture="1.mlp.experts.post")
    assert Site("mlp_out", 1) in model.anatomy.hook_points
    assert not [c for c in model.proof if c.status == "fails"]


def test_experts_that_lost_a_neuron_of_their_output_weights_are_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity sees a view of W_out that is off at one place."""
    from microtome.anatomy import Experts

    right: Any = Experts.W_out.fget

    def wrong(self: Any) -> Tensor:
        weight = right(self).clone()
        weight[:, 0] = 0.0
        return weight

    monkeypatch.setattr(Experts, "W_out", property(wrong))
    model = mt.open(configs.build("mixtral"))
    failed = {c.where for c in model.proof if c.status == "fails"}
    assert failed == {f"{layer}.mlp.experts.post" for layer in range(model.anatomy.n_layers)}
    assert Site("mlp.experts.post", 0) in model.anatomy.missing
    with pytest.raises(mt.errors.SiteError, match=r"no W_out in layer 0"):
        _ = model.layers[0].W_out


def test_biases_of_experts_are_views() -> None:
    layer: Any = opened("gpt_oss").layers[0]
    experts = experts_of(opened("gpt_oss"), 0)
    assert torch.equal(layer.b_gate, experts.gate_up_proj_bias[:, ::2])
    assert torch.equal(layer.b_in, experts.gate_up_proj_bias[:, 1::2])
    assert torch.equal(layer.b_out, experts.down_proj_bias)
    assert torch.equal(layer.W_out, experts.down_proj)
    bare = opened("nemotron_h")
    with pytest.raises(mt.errors.SiteError, match="no W_gate"):
        _ = bare.layers[layer_of(bare)].W_gate


# ------------------------------------------------------------------------------------------- the statistics of neurons


def test_statistics_of_an_experts_neurons_are_over_the_tokens_that_it_saw() -> None:
    model, tokens = opened("qwen2_moe"), ids(6, 12)
    data = mt.measure(model, "expert_neurons", text=tokens, rows=2)
    assert data["expert_mean"].dims == ("layer", "expert", "neuron")
    run = model.run(tokens, capture=["*.mlp.experts.post", "*.mlp.router"])
    counts: set[int] = set()
    for layer in range(model.anatomy.n_layers):
        post, weights = run[f"{layer}.mlp.experts.post"], run[f"{layer}.mlp.router"]
        for expert in range(6):
            own = post[weights[..., expert] != 0][:, expert].double().numpy()
            counts.add(len(own))
            at = {"layer": layer, "expert": expert}
            assert (data["expert_tokens"].sel(at) == len(own)).all()
            for name in ("mean", "std", "max", "min"):
                expected = getattr(own, name)(axis=0) if len(own) else np.full(own.shape[1], np.nan)
                np.testing.assert_allclose(data[f"expert_{name}"].sel(at), expected, rtol=1e-5, atol=1e-7)
    assert len(counts) > 3  # experts see different numbers of tokens


def test_the_atlas_has_a_table_of_the_neurons_of_experts() -> None:
    model = opened("qwen2_moe")
    data = mt.measure(model, "expert_neurons", text=ids(6, 12))
    table = tables(model, [(mt.measures()["expert_neurons"], data)])["expert_neurons"]
    assert table.column_names[:4] == ["layer", "expert", "neuron", "expert_tokens"]
    assert table.num_rows == data["expert_mean"].size
    row = table.slice(24 * 6 + 24 * 2 + 5, 1).to_pylist()[0]
    assert (row["layer"], row["expert"], row["neuron"]) == (1, 2, 5)
    assert row["expert_mean"] == pytest.approx(float(data["expert_mean"][1, 2, 5]), rel=1e-6)
    assert "expert_neurons" not in tables(model, [])


def test_a_model_without_experts_has_no_statistics_of_them() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.SiteError, match=r"needs mlp\.experts\.post.*the layer is not a mixture of experts"):
        mt.measure(model, "expert_neurons", text=ids())
