"""Roles of MLPs are least squares, and they are found where they were planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._mlp_roles import held_out, solved

PROMPTS = torch.randint(5, families.VOCAB, (12, 6), generator=torch.Generator().manual_seed(1))


def test_planted_roles_and_their_task_vector_are_found() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 16, generator=rng).double()
    task = torch.randn(16, generator=rng).double()
    truth = torch.tensor([-0.7, 0.0, 1.3]).double()
    y = torch.einsum("h,nhm->nm", truth, x) + task + 0.01 * torch.randn(20, 16, generator=rng)
    c, b = solved(x, y)
    assert torch.allclose(c, truth, atol=0.01)
    assert torch.allclose(b, task, atol=0.02)
    fold = torch.arange(20) % 5
    assert float(held_out(x, y, fold)) > 0.99
    assert float(held_out(x.flip(0), y, fold)) < 0.2


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
def test_coefficients_are_least_squares_over_what_heads_and_mlps_write(name: str) -> None:
    it = mt.open(families.build(name), prove=False)
    data = mt.explain.mlp_roles(it, PROMPTS)
    run = it.run(PROMPTS, capture=["1.attn.result@-1", "1.mlp_out@-1"])
    x, y = run["1.attn.result@-1"][:, 0].double(), run["1.mlp_out@-1"][:, 0].double()
    flat = (x - x.mean(0)).transpose(1, 2).reshape(-1, x.shape[1])
    fit = torch.linalg.lstsq(flat, (y - y.mean(0)).reshape(-1, 1)).solution[:, 0]
    each = data["coefficient_each"].values[:, 1]
    left_out = torch.arange(12) != 4
    without = solved(x[left_out], y[left_out])[0]
    assert np.allclose(each[4], 12 * fit - 11 * without, atol=1e-4)
    assert np.allclose(data["coefficient"][1], each.mean(0))
    assert (data["coefficient_lo"] <= data["coefficient_hi"]).all()
    assert float(data["r2"].max()) <= 1


def test_an_mlp_that_copies_a_head_is_found_and_no_other() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    run = it.run(PROMPTS, capture=["2.attn.result@-1"])
    result = run["2.attn.result@-1"][:, :, 2]  # what head 2 of the last layer writes
    rows = iter(result)  # prompts are run one by one, in their order
    with it.editing(mt.edit.Apply("2.mlp_out@-1", function=lambda x: (-0.5 * next(rows)).expand_as(x))):
        data = mt.explain.mlp_roles(it, PROMPTS)
    found = data["coefficient"].values[2]
    assert found[2] == pytest.approx(-0.5, abs=1e-4)
    assert abs(np.delete(found, 2)).max() < 1e-3
    assert float(data["r2"][2]) > 0.999 > float(data["r2_shuffled"][2]) + 0.5


def test_a_head_that_hardly_varies_has_no_coefficient() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    with it.editing(mt.edit.Mean("1.attn.z[2]@-1", mean=torch.ones(10))):
        data = mt.explain.mlp_roles(it, PROMPTS)
    assert np.isnan(data["coefficient"].values[1]).tolist() == [False, False, True, False]
    assert np.isfinite(data["r2"]).all()


def test_too_few_prompts_are_refused() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="roles are fitted over prompts; got 2; allowed: 3 or more"):
        mt.explain.mlp_roles(it, PROMPTS[:2])


@pytest.mark.parametrize("name", ["gptj", "gpt_neox-parallel"])
def test_mlps_that_do_not_read_the_heads_are_refused(name: str) -> None:
    it = mt.open(families.build(name), prove=False)
    match = "the MLP does not read what the heads of its layer write; got parallel blocks in layer 0"
    with pytest.raises(mt.errors.ModelUnsupported, match=match):
        mt.explain.mlp_roles(it, PROMPTS)
