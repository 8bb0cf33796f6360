"""A rank-one change of its weights does to an MLP what a context does: to rounding, in every family that has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.explain._context_update import Update

CONTEXT, QUERY = [9, 14, 71, 33, 25, 60, 18], [41, 7, 52]


def opened(name: str) -> mt.Model:
    return mt.open(families.build(name).double().requires_grad_(False), prove=False)


def test_the_plain_identity() -> None:
    """W (A - A0) A0^T / |A0|^2 on random matrices: nothing but rounding."""
    draw = torch.Generator().manual_seed(0)
    a, a0 = (torch.randn(64, generator=draw, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(64, 200, generator=draw, dtype=torch.float64) / 8
    update = Update.of(a0, a, weights)
    gap = (update.made - a @ weights).norm() / (a @ weights).norm()
    assert gap < 2e-15
    change = torch.outer(update.left, update.right)
    assert torch.linalg.matrix_rank(change) == 1
    torch.testing.assert_close(a0 @ (weights + change), update.made)


@pytest.mark.parametrize(
    "name", families.some(2, ["llama-gqa", "gpt2", "gemma2", "gpt_neox-parallel", "qwen3", "bloom"])
)
def test_without_the_context_the_updated_model_says_what_it_says_with_it(name: str) -> None:
    data = mt.explain.context_update(opened(name), CONTEXT, QUERY)
    assert float(data["error"].max()) < 1e-6, "norms in float32 leave their rounding"
    read = [i for i in range(3) if i or "parallel" not in name]  # there the first MLP reads the embedding alone
    assert float(data["unchanged_error"].isel(layer=read).min()) > 1e-3
    assert float(data["shuffled_error"].isel(layer=read).min()) > 1e-4
    assert float(data["kl"]) < 1e-9
    assert float(data["unchanged_kl"]) > 1e-5
    assert (data["norm_error"] > 10 * data["error"]).isel(layer=read).all()


def test_the_weights_themselves_can_be_changed() -> None:
    """The factors that are given, written into the weights of one layer: its own run without context is the other's."""
    model = opened("llama-gqa")
    data = mt.explain.context_update(model, CONTEXT, QUERY)
    told, alone = (model.run([x], ["1.resid_pre", "1.mlp_out"]) for x in (CONTEXT + QUERY, QUERY))
    left = torch.from_numpy(data["reads"].sel(layer=1).values)
    for site, matrix in (("mlp.gate", model.layers[1].W_gate), ("mlp.up", model.layers[1].W_in)):
        right = torch.from_numpy(data[site].sel(layer=1).values)
        with torch.no_grad():
            matrix += torch.outer(left, right)
    stream = alone["1.resid_pre"]
    run = model.run([QUERY], "1.mlp_out", start_at=1, given=stream, stop_at=2)
    np.testing.assert_allclose(run["1.mlp_out"][0, -1], told["1.mlp_out"][0, -1], rtol=1e-5, atol=1e-7)
    assert float((run["1.mlp_out"][0, -1] - alone["1.mlp_out"][0, -1]).abs().max()) > 1e-3


def test_the_error_that_the_norm_leaves_is_that_of_the_scale() -> None:
    """Where the stream has the same size with and without context there is none; else the MLP reads u s / s0."""
    model = opened("llama-gqa")
    data = mt.explain.context_update(model, CONTEXT, QUERY)
    told, alone = (model.run([x], ["*.mlp.in", "*.mlp.scale", "*.mlp_out"]) for x in (CONTEXT + QUERY, QUERY))
    for layer in range(model.anatomy.n_layers):
        ratio = told[f"{layer}.mlp.scale"][0, -1] / alone[f"{layer}.mlp.scale"][0, -1]
        reads: Tensor = told[f"{layer}.mlp.in"][0, -1] * ratio
        mlp = model.hf.model.layers[layer].mlp
        wanted = told[f"{layer}.mlp_out"][0, -1]
        by_hand = float((mlp(reads.double()) - wanted).norm() / wanted.norm())
        assert float(data["norm_error"].sel(layer=layer)) == pytest.approx(by_hand, rel=1e-4)


def test_what_has_no_weights_to_update_or_nothing_to_read_is_refused() -> None:
    model = opened("llama-gqa")
    with pytest.raises(mt.errors.PromptError, match=r"the context must be one prompt; got 2"):
        mt.explain.context_update(model, [[5, 6], [6, 7]], QUERY)
    with pytest.raises(mt.errors.SiteError, match="no MLP whose weights could be updated"):
        mt.explain.context_update(mt.open(families.build("mixtral"), prove=False), CONTEXT, QUERY)
