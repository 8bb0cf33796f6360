"""Neurons of confidence: what the unembedding reads of them, and their effects with and without the final norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families, twins
from torch import Tensor

import microtome as mt
from microtome.edit import Set
from microtome.measurements import confidence_effects, token_loss
from microtome.measurements._confidence import CUTS, reading

LAST = 2


def ids(rows: int = 8, length: int = 10) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(twins.build("llama-gqa/gains"), prove=False)


def test_the_shares_of_random_directions_are_those_of_their_control(model: mt.Model) -> None:
    end, data = reading(model), mt.measure(model, "confidence_neurons")
    w = torch.randn(20_000, end.basis.shape[0], generator=torch.Generator().manual_seed(0)).double()
    w = w / w.norm(dim=1, keepdim=True)
    d = w.shape[1]
    for cut, k in enumerate(max(1, round(d / c)) for c in CUTS):
        share = (w @ end.basis[:, d - k :]).square().sum(1).mean().sqrt()
        assert float(data["null_share_random"][0, 0, cut]) == pytest.approx(float(share), rel=0.03)
    variance = (w @ end.units.double()).var(1, correction=0).mean()
    assert float(data["logit_var_random"][0, 0]) == pytest.approx(float(variance), rel=0.02)
    np.testing.assert_allclose(data["null_share_diff"], data["null_share"] - data["null_share_random"])


def test_the_basis_is_in_order_and_whole(model: mt.Model) -> None:
    end = reading(model)
    folded = model.final_norm.gain.detach().double()[:, None] * model.W_U.detach().double()  # type: ignore[union-attr]
    folded = folded - folded.mean(1, keepdim=True)
    read = (end.basis.T @ folded).norm(dim=1)
    assert bool((read.diff() <= 1e-9).all())
    np.testing.assert_allclose(end.basis.T @ end.basis, np.eye(len(end.basis)), atol=1e-12)


def test_gains_may_stand_in_the_weights() -> None:
    plain, folded = (
        mt.measure(mt.open(twins.build(f"llama-gqa/{kind}"), prove=False), "confidence_neurons")
        for kind in ("gains", "folded")
    )
    for name, x in plain.data_vars.items():
        np.testing.assert_allclose(x, folded[name], atol=2e-5, err_msg=str(name))


def test_a_model_that_was_changed_is_read_again() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    first = reading(model)
    assert reading(model) is first
    with torch.no_grad():
        model.W_U[:, 3] *= 5
    assert reading(model) is not first


def silent(neuron: int) -> Any:
    """A model in whose last MLP one neuron writes where nothing is read."""
    hf: Any = twins.build("llama-gqa/gains")
    with torch.no_grad():
        gain = hf.model.norm.weight
        v = torch.nn.functional.normalize(torch.randn(len(gain), generator=torch.Generator().manual_seed(1)), dim=0)
        read = gain * hf.lm_head.weight
        hf.lm_head.weight.copy_((read - (read @ v)[:, None] * v) / gain)
        hf.model.layers[LAST].mlp.down_proj.weight[:, neuron] = 4 * v
    return hf


def test_a_neuron_where_nothing_is_read_acts_through_the_norm_alone() -> None:
    model = mt.open(silent(7), prove=False)
    weights = mt.measure(model, "confidence_neurons").isel(layer=LAST)
    assert float(weights["null_share"][7].min()) == pytest.approx(1, abs=1e-6)
    assert float(weights["logit_var"][7]) == pytest.approx(0, abs=1e-9)
    assert float(weights["null_share"].isel(cut=0).drop_sel(neuron=7).max()) < 0.9
    data = confidence_effects(model, [7, 8], ids())
    assert float(data["direct"][0]) < 1e-5
    assert float(data["total"][0]) > 0.01
    assert float(data["entropy_direct"][0]) == pytest.approx(0, abs=1e-5)
    assert float(data["direct"][1]) > 0.2 * float(data["total"][1])
    assert float(data["direct_random"][0]) > 1e-3


@torch.no_grad()
def test_the_effects_are_those_of_plain_runs(model: mt.Model) -> None:
    tokens, neuron = ids(), 5
    data = confidence_effects(model, [neuron], tokens, controls=0)
    run = model.run(tokens, capture=[f"{LAST}.mlp.post", "final.scale"])
    mean = float(run[f"{LAST}.mlp.post"][..., neuron].mean())
    cut = model.run(tokens, edits=Set(f"{LAST}.mlp.post[{neuron}]", mean), capture=f"{LAST}.resid_post")
    x = cut[f"{LAST}.resid_post"]
    torch.testing.assert_close(model.unembed(x), cut.logits)  # the norm free: the direct effect is the total one
    held = x / run["final.scale"][..., None] * model.final_norm.gain @ model.W_U  # type: ignore[union-attr]
    base = token_loss(run.logits, tokens)
    for name, logits in (("total", cut.logits), ("direct", held)):
        expected = float((token_loss(logits, tokens) - base).abs().double().mean())
        assert float(data[name][0]) == pytest.approx(expected, abs=1e-5)
    entropies = [torch.distributions.Categorical(logits=x[:, :-1]).entropy().mean() for x in (run.logits, cut.logits)]
    assert float(data["entropy"][0]) == pytest.approx(float(entropies[1] - entropies[0]), abs=1e-5)
    assert float(data["mediated"][0]) == pytest.approx(float(data["total"][0] - data["direct"][0]), abs=1e-9)
    assert (data["total_lo"] <= data["total"]).all()
    assert "total_random" not in data


@pytest.mark.parametrize("neurons", [[56], [-1], []])
def test_neurons_of_no_last_mlp_are_refused(model: mt.Model, neurons: list[int]) -> None:
    with pytest.raises(mt.errors.ArgumentError, match=r"neurons must be of layer 2; .*allowed: 0 to 55"):
        confidence_effects(model, neurons, ids())


def test_a_stream_that_is_no_logits_is_refused() -> None:
    with pytest.raises(mt.errors.SiteError, match="cannot be read as logits"):
        mt.measure(mt.open(families.build("opt-postnorm"), prove=False), "confidence_neurons")
