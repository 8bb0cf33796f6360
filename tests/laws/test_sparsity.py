"""Sparsity of MLPs and of the stream: identities of the error, and losses when neurons are left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.edit import Apply
from microtome.measurements import loss_at_deltas, loss_at_topk, sparsity_at_loss, token_loss
from microtome.measurements._deltas import held
from microtome.measurements._sparsity import BUDGETS, THRESHOLDS, at_budget, errors, largest


def ids(rows: int = 8, length: int = 12) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def test_the_error_rises_from_nothing_to_all_and_is_that_of_plain_sums() -> None:
    rng = torch.Generator().manual_seed(0)
    post, W = torch.randn(6, 30, generator=rng), torch.randn(30, 10, generator=rng)
    lost, random, kept = errors(post, W)
    assert float(lost[:, 0].max()) == 0
    assert torch.allclose(lost[:, -1], torch.ones(6).double())
    assert torch.allclose(random[:, [0, -1]], torch.tensor([0.0, 1.0]).double().expand(6, 2))
    assert bool((kept.diff(dim=1) <= 0).all())
    for at in (9, 12, 14):
        t = float(THRESHOLDS[at])
        small = post.abs() * W.norm(dim=1) <= t
        expected = (torch.where(small, post, 0.0) @ W).norm(dim=1) / (post @ W).norm(dim=1)
        torch.testing.assert_close(lost[:, at], expected.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept[:, at], 1 - small.double().mean(1))


def test_the_control_is_the_error_of_neurons_drawn_at_random() -> None:
    rng = torch.Generator().manual_seed(1)
    post, W = torch.randn(1, 40, generator=rng), torch.randn(40, 12, generator=rng)
    _, random, kept = errors(post, W)
    at = int((kept[0] - 0.5).abs().argmin())
    drop = torch.rand(40_000, 40, generator=rng) >= float(kept[0, at])
    lost = torch.where(drop, post, 0.0) @ W
    drawn = lost.double().square().sum(1).mean().sqrt() / (post @ W).norm().double()
    assert float(random[0, at]) == pytest.approx(float(drawn), rel=0.01)


def test_shares_at_budgets_lie_on_the_lines_between_thresholds() -> None:
    cett, active = torch.tensor([0.0, 0.1, 0.3, 1.0]).double(), torch.tensor([1.0, 0.8, 0.4, 0.0]).double()
    assert at_budget(cett, active).tolist() == pytest.approx([0.98, 0.9, 0.8, 0.6, 0.4 - 0.4 / 7])
    assert len(BUDGETS) == 5


def test_the_fewest_dimensions_hold_90_per_cent() -> None:
    x = torch.tensor([[10.0, -80, 5, 5], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert largest(x).tolist() == [[True, True, False, False], [True] * 4, [False] * 4]


def test_each_column_is_that_of_plain_captures(model: mt.Model) -> None:
    tokens = ids(2)
    data = mt.measure(model, "sparsity", text=tokens)
    run = model.run(tokens, capture=["*.mlp.post", "*.resid_post"])
    for layer in range(3):
        post = run["*.mlp.post"][layer].flatten(0, 1)
        lost, _, kept = errors(post, model.layers[layer].W_out.detach())
        np.testing.assert_allclose(data["cett"][layer], lost.mean(0), rtol=1e-9)
        np.testing.assert_allclose(data["active"][layer], kept.mean(0), rtol=1e-9)
        used = largest(run["*.resid_post"][layer])
        assert float(data["stream_dims"][layer]) == pytest.approx(float(used.double().mean()))
        pairs = [(row[i], row[i + 1]) for row in used for i in range(11)]
        overlap = np.mean([float((a & b).sum() / (a | b).sum()) for a, b in pairs])
        assert float(data["stream_overlap"][layer]) == pytest.approx(overlap)
    assert (np.diff(data["active_at"], axis=1) <= 0).all()
    assert (data["zeros"] == 0).all()


def test_activations_of_a_relu_that_are_zero_are_counted() -> None:
    hf: Any = families.build("opt-prenorm")
    with torch.no_grad():
        hf.model.decoder.layers[1].fc1.weight[:20] = 0
        hf.model.decoder.layers[1].fc1.bias[:20] = -1
    model = mt.open(hf, prove=False)
    data = mt.measure(model, "sparsity", text=ids(2))
    run = model.run(ids(2), capture="*.mlp.post")["*.mlp.post"]
    np.testing.assert_allclose(data["zeros"], (run == 0).double().mean((1, 2, 3)))
    assert float(data["zeros"][1]) >= 20 / run.shape[-1]
    assert (data["active"].isel(threshold=0) <= 1 - data["zeros"] + 1e-12).all()


@pytest.mark.parametrize("rise", [0.002, 0.05])
def test_the_rise_keeps_to_its_budget(model: mt.Model, rise: float) -> None:
    data = sparsity_at_loss(model, ids(), rise=rise, steps=8)
    assert 0 < float(data["rise"]) <= rise
    assert float(data["active"].mean()) < 1
    assert float(data["loss"]) == pytest.approx(float(token_loss(model.run(ids()).logits, ids()).double().mean()))
    assert float(data["rise_random"]) > float(data["rise"])


def test_a_larger_budget_needs_no_more_neurons(model: mt.Model) -> None:
    small, large = (sparsity_at_loss(model, ids(), rise=rise, steps=8) for rise in (0.002, 0.05))
    assert (large["active"] <= small["active"]).all()
    assert (large["threshold"] >= small["threshold"]).all()


def test_with_all_neurons_nothing_changes_and_with_few_the_loss_rises(model: mt.Model) -> None:
    data = loss_at_topk(model, ids(), shares=(0.02, 1.0))
    assert data["rise"].values[1] == 0
    post = model.run(ids(), capture="*.mlp.post")["*.mlp.post"]
    best = post.abs().argmax(-1, keepdim=True)  # 2 % of 56 neurons is one
    edits = [
        mt.edit.Set(f"{i}.mlp.post", torch.zeros_like(post[i]).scatter(-1, best[i], post[i].gather(-1, best[i])))
        for i in range(3)
    ]
    one = [model.run(ids(), edits=edits[:1]).logits, model.run(ids()).logits]
    assert not torch.equal(*one)
    assert abs(float(data["rise"][0])) > 1e-4
    logits = model.run(ids()).logits[:, :-1].softmax(-1)
    top, guess = logits.max(-1)
    bins = (top * 15).long().flatten()
    right = (guess == ids()[:, 1:]).double().flatten()
    gaps = [
        float((right[bins == b].mean() - top.flatten()[bins == b].double().mean()).abs() * (bins == b).sum())
        for b in bins.unique()
    ]
    assert float(data["calibration"][1]) == pytest.approx(sum(gaps) / len(right), abs=1e-6)


def test_what_is_no_budget_is_refused(model: mt.Model) -> None:
    with pytest.raises(mt.errors.ArgumentError, match="rise must be above 0; got 0"):
        sparsity_at_loss(model, ids(), rise=0)
    with pytest.raises(mt.errors.ArgumentError, match="shares must be above 0 and at most 1"):
        loss_at_topk(model, ids(), shares=(0.0, 0.5))
    mixture = mt.open(families.build("mixtral"), prove=False)
    with pytest.raises(mt.errors.SiteError):
        loss_at_topk(mixture, ids())


def test_only_steps_above_the_limit_are_taken() -> None:
    x = torch.tensor([[[0.0, 0], [0.5, 2], [0.9, 2.5], [1.2, 0]]])
    assert held(x, torch.ones(1, 1))[0].tolist() == [[0, 0], [0, 2], [0, 2], [pytest.approx(1.2), 0]]
    assert torch.equal(held(x, torch.zeros(1, 1)), x)


def test_what_is_repeated_stays_as_it_was() -> None:
    told = script("tools/planted_cases/layers.py").small_steps()
    assert (told["found"], told["false"]) == ("9 of 9", "0 of 9")


def test_small_steps_are_left_out_of_what_is_named_alone(model: mt.Model) -> None:
    data = loss_at_deltas(model, ids(), limits=(0.4,), sites=("mlp.post",))
    edits = [
        Apply(f"{i}.mlp.post", lambda x: held(x, 0.4 * x.square().mean((1, 2), keepdim=True).sqrt()[..., 0]))
        for i in range(3)
    ]
    one, other = (model.run(ids(), edits=some).logits.detach()[:, :-1].log_softmax(-1) for some in ([], edits))
    expected = (one.exp() * (one - other)).sum(-1).mean()
    assert float(data["kl"][0]) == pytest.approx(float(expected), rel=1e-4)
    runs = model.run(ids(), capture="*.mlp.post", edits=edits)
    for i in range(3):
        x = runs[f"{i}.mlp.post"]
        assert float(data["still_at"][0, i, 0]) == pytest.approx(float((x[:, 1:] == x[:, :-1]).double().mean()))


def test_without_a_limit_nothing_changes_and_with_a_wide_one_all_stays(model: mt.Model) -> None:
    data = loss_at_deltas(model, ids(), limits=(0.0, 0.3, 100.0))
    assert data["still"].values[[0, 2]].tolist() == [pytest.approx(0, abs=0.02), 1]  # equal tokens follow each other
    assert data["rise"].values[0] == 0
    assert 0 < float(data["still"][1]) < 1
    assert abs(float(data["rise"][2])) > 1e-3
    assert abs(float(data["rise_small"][2])) > 1e-3
    assert data["kl"].values[0] < 1e-9
    assert (data["kl"][1:] > 1e-4).all()
    assert (data["kl_small"][1:] > 1e-4).all()
    sizes = np.array([40, 4 * 10, 40, 56])  # dimensions of attn.in, attn.z, mlp.in, mlp.post
    share = (data["still_at"].mean("layer").values * sizes).sum(1) / sizes.sum()
    np.testing.assert_allclose(share, data["still"], atol=1e-9)
    with pytest.raises(mt.errors.ArgumentError, match="sites must be what weights read"):
        loss_at_deltas(model, ids(), sites=("resid_post",))
    with pytest.raises(mt.errors.ArgumentError, match="limits must be 0 or more"):
        loss_at_deltas(model, ids(), limits=(-1.0,))
