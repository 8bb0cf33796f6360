"""Laws of what neurons read and write, from weights: classes, null bands, eigenvectors and the nearest tokens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests import families, twins
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.measurements import bilinear, neuron_directions
from microtome.measurements._neuron_classes import classes_of, null_band, null_probability, pair_cosines
from microtome.measurements._read_tokens import token_directions

LAYERS = script("tools/planted_cases/layers.py")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("d", "band"), [(576, 0.0816), (768, 0.0707), (2048, 0.0433)])
def test_bands_are_those_of_beta(d: int, band: float) -> None:
    assert null_band(d) == pytest.approx(band, abs=5e-5)
    edge = torch.tensor([null_band(d), -null_band(d), 0.0, 1.0], dtype=torch.float64)
    assert null_probability(edge, d).tolist() == pytest.approx([0.05, 0.05, 1, 0])


def test_one_in_twenty_unrelated_directions_lies_beyond_the_band() -> None:
    a, b = drawn(20_000, 30), drawn(20_000, 30, seed=1)
    p = null_probability(torch.cosine_similarity(a, b, dim=-1), 30)
    for level in (0.05, 0.5):
        assert float((p < level).double().mean()) == pytest.approx(level, abs=0.01)


def test_signs_keep_a_class_or_turn_it_round() -> None:
    """Input and output turned together keep it, and the gate; the input alone swaps strengthening and weakening."""
    w = {name: drawn(400, 4, seed=seed) for seed, name in enumerate(("w_in", "w_out", "w_gate"))}
    kind = classes_of(pair_cosines(w))
    assert len(kind.unique()) == 12

    def turn(*names: str) -> Tensor:
        return classes_of(pair_cosines({name: -x if name in names else x for name, x in w.items()}))

    swapped = torch.tensor([5, 4, 2, 3, 1, 0])
    assert torch.equal(turn("w_in", "w_out"), kind)
    assert torch.equal(turn("w_gate"), kind)
    assert torch.equal(turn("w_in"), swapped[kind % 6] + 6 * (kind // 6))
    assert torch.equal(turn("w_out"), swapped[kind % 6] + 6 * (kind // 6))


def test_shares_are_counts_and_sum_to_one() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    by_layer, by_neuron = mt.measure(model, "io_classes", aligned=0.1), mt.measure(model, "neuron_classes", aligned=0.1)
    for layer in range(3):
        counts = np.bincount(by_neuron["io_class"].values[layer].astype(int), minlength=12)
        np.testing.assert_allclose(by_layer["class_share"].values[layer], counts / 56)
        beyond = (by_neuron["null_gate_in"].values[layer] < 0.05).mean()
        assert float(by_layer["beyond_gate_in"][layer]) == pytest.approx(beyond)
    assert np.allclose(by_layer["class_share_mismatched"].sum("class"), 1)
    w = neuron_directions(model, 1)
    other = {"w_in": w["w_in"], "w_out": w["w_out"].roll(-1, 0), "w_gate": w["w_gate"].roll(-2, 0)}
    counts = torch.bincount(classes_of(pair_cosines(other), 0.1), minlength=12)
    np.testing.assert_allclose(by_layer["class_share_mismatched"][1], counts / 56)


def test_a_plain_mlp_strengthens_weakens_or_writes_something_else() -> None:
    kind = mt.measure(mt.open(families.build("gpt2"), prove=False), "neuron_classes", aligned=0.1)
    assert "null_gate_in" not in kind
    assert set(np.unique(kind["io_class"])) == {0, 3, 5}


def test_gains_are_folded() -> None:
    one, other = (mt.open(twins.build(f"llama-gqa/{how}"), prove=False) for how in ("gains", "folded"))
    for name in ("io_classes", "neuron_classes", "read_tokens"):
        first, second = (mt.measure(m, name) for m in (one, other))
        for column in first.data_vars:
            np.testing.assert_allclose(second[column], first[column], rtol=1e-4, atol=1e-6, err_msg=str(column))


def test_classes_that_are_planted_are_found() -> None:
    told = LAYERS.neuron_classes()
    assert (told["found"], told["false"]) == ("10 of 10", "0 of 46")


# ---------------------------------------------------------------------------------------------------------- read-out


def test_a_neuron_that_reads_a_token_is_said_to() -> None:
    model = mt.open(copy.deepcopy(families.build("llama-gqa")).requires_grad_(False), prove=False)
    unit = token_directions(model)
    assert torch.allclose(unit.norm(dim=0), torch.ones(families.VOCAB))
    gain: Any = model.layers[1].mlp_norm
    model.layers[1].W_in[:, 4] = unit[:, 17] / gain.gain
    model.layers[1].W_gate[:, 4] = -unit[:, 23] / gain.gain
    model.layers[1].W_out[4] = unit[:, 31]
    data = mt.measure(model, "read_tokens", top=3)
    assert data["in_tokens"].values[1, 4, 0] == 17
    assert data["gate_opposite"].values[1, 4, 0] == 23
    assert float(data["in_tokens_cos"][1, 4, 0]) == pytest.approx(1, abs=1e-5)
    assert float(data["gate_opposite_cos"][1, 4, 0]) == pytest.approx(-1, abs=1e-5)
    for column in ("in_peak", "out_peak"):
        others = np.delete(data[column].values[1], 4)
        assert data[column].values[1, 4] > others.max()


# ---------------------------------------------------------------------------------------------------------- bilinear


def bilinear_model(bias: bool = False, layers: int = 3) -> mt.Model:
    hf = families.build("llama-gqa")
    config = copy.deepcopy(hf.config)
    config.hidden_act, config.mlp_bias, config.num_hidden_layers = "linear", bias, layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(hf)(config).double().eval()
        for name, weight in made.named_parameters():
            if "mlp" in name and name.endswith("bias"):
                torch.nn.init.normal_(weight)
    return mt.open(made, prove=False)


@pytest.mark.parametrize("bias", [False, True])
def test_the_paths_of_one_layer_sum_to_the_logits(bias: bool) -> None:
    """Direct paths of the embedding and each head, and paths of each pair of these through the MLP; norms held."""
    model = bilinear_model(bias, layers=1)
    tokens = torch.arange(5, 17)
    run = model.run(tokens, capture=["0.resid_pre", "0.resid_mid", "0.resid_post", "0.attn.z"])
    weights, last = model.layers[0], model.final_norm
    assert last is not None
    assert weights.mlp_norm is not None
    heads = torch.einsum("bphd,hdm->hbpm", run["0.attn.z"], weights.W_O.detach())
    parts = torch.cat([run["0.resid_pre"].unsqueeze(0), heads]).detach()
    torch.testing.assert_close(parts.sum(0), run["0.resid_mid"].detach())
    scale = weights.mlp_norm.scale(run["0.resid_mid"])
    read = parts / scale.detach().unsqueeze(-1) * weights.mlp_norm.gain.detach()
    for token in (7, 33):
        u = (last.gain * model.W_U[:, token]).detach()
        paths = bilinear(model, 0, u).pairs(read)
        assert paths.shape == (6, 6, 1, 12)
        torch.testing.assert_close(paths, paths.transpose(0, 1))
        assert bool((paths[:, 5] == 0).all()) != bias
        b_out = 0.0 if weights.b_out is None else float(weights.b_out.detach() @ u)
        through, direct = paths.sum((0, 1)) + b_out, (parts @ u).sum(0)
        found = (direct + through) / last.scale(run["0.resid_post"]).detach()
        expected = run.logits[..., token].detach()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # the norms compute in float32
        assert float(paths[0, 1:5].abs().mean()) > 1e-6  # embedding and heads together


@pytest.mark.parametrize("bias", [False, True])
def test_a_sum_over_eigenvectors_is_the_layer_where_the_gate_is_linear(bias: bool) -> None:
    model = bilinear_model(bias)
    u = drawn(40)
    form = bilinear(model, 1, u)
    assert form.exact
    assert form.slope == 1
    run = model.run(torch.arange(5, 25), capture=["1.mlp.in", "1.mlp_out"])
    b_out = model.layers[1].b_out
    expected = run["1.mlp_out"] @ u - (0.0 if b_out is None else float(b_out.detach() @ u))
    assert float((form(run["1.mlp.in"]) - expected).abs().max()) < 2e-12 * float(expected.abs().max() + 1)
    few = (form(run["1.mlp.in"], 5) - expected).abs().mean()
    assert float(few) > 1e-6
    assert bool((form.values.abs().diff() <= 0).all())


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2"])
def test_other_gates_have_a_surrogate_that_is_called_one_and_right_near_zero(name: str) -> None:
    model = mt.open(copy.deepcopy(families.build(name)).double().requires_grad_(False), prove=False)
    u = drawn(40)
    form = bilinear(model, 0, u)
    assert not form.exact
    assert form.slope == pytest.approx(0.5, abs=1e-6)
    if name == "llama-gqa":
        weights = model.layers[0]
        x = drawn(6, 40) * 1e-4
        act = torch.nn.functional.silu(x @ weights.W_gate) * (x @ weights.W_in)
        assert torch.allclose(form(x), act @ (weights.W_out @ u), rtol=1e-2, atol=1e-12)


def test_layers_without_a_form_are_refused_by_name() -> None:
    plain, gated = (mt.open(families.build(n), prove=False) for n in ("gpt2", "llama-gqa"))
    for model, layer, u, kind in (
        (plain, 0, drawn(40), mt.errors.SiteError), (gated, 9, drawn(40), mt.errors.ArgumentError),
        (gated, 0, drawn(7), mt.errors.ArgumentError),
    ):  # fmt: skip
        with pytest.raises(kind) as refused:
            bilinear(model, layer, u)
        assert "\n" not in str(refused.value)
        assert "To do: " in str(refused.value)
