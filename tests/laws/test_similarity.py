"""Laws of similarity: copies in another basis and another order of neurons, closed forms, and plain captures."""

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
from microtome.measurements import depth_stages, similarity
from microtome.measurements._cka import centred_gram, hsic
from microtome.measurements._similarity import svcca
from microtome.stream import Covariance, CrossCovariance, TokenBatch

LAYERS = script("tools/planted_cases/layers.py")


def ids(rows: int = 12, length: int = 20) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled_neurons(hf: Any) -> tuple[Any, Tensor]:
    """A copy with its neurons in another order, in every layer the same."""
    hf, order = copy.deepcopy(hf), torch.randperm(families.D_MLP, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in hf.model.layers:
            for name in ("gate_proj", "up_proj"):
                weight = layer.mlp.get_submodule(name).weight
                weight.copy_(weight[order].clone())
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
    return hf, order


@pytest.fixture(scope="module")
def copies() -> dict[str, mt.Model]:
    hf = twins.build("llama-gqa/folded").double()
    made = {"own": hf, "turned": twins.turned(hf), "shuffled": shuffled_neurons(hf)[0]}
    return {name: mt.open(model, prove=False) for name, model in made.items()}


def test_a_copy_in_another_basis_has_cka_1_and_other_units(copies: dict[str, mt.Model]) -> None:
    a, b = copies["own"], copies["turned"]
    layers = similarity(a, b, ids())
    assert np.allclose(np.diag(layers["cka"]), 1, atol=1e-6)
    assert np.allclose(layers["svcca"], 1, atol=1e-4)
    assert (np.diag(layers["cka_shuffled"]) < 0.3).all()
    same, other = (similarity(a, m, ids(), grain="neuron", site="resid_post") for m in (a, b))
    assert np.allclose(same["best_correlation"], 1)
    assert float(other["best_correlation"].mean()) < 0.8
    assert float(other["best_correlation"].mean()) > float(other["best_correlation_shuffled"].mean())


def test_a_copy_with_neurons_in_another_order_has_both_1(copies: dict[str, mt.Model]) -> None:
    a, b = copies["own"], copies["shuffled"]
    assert np.allclose(np.diag(similarity(a, b, ids())["cka"]), 1, atol=1e-6)
    assert np.allclose(np.diag(similarity(a, b, ids(), site="mlp.post")["cka"]), 1, atol=1e-6)
    units = similarity(a, b, ids(), grain="neuron")
    assert np.allclose(units["best_correlation"], 1, atol=1e-6)
    order = torch.randperm(families.D_MLP, generator=torch.Generator().manual_seed(0))
    assert all(row.tolist() == order.argsort().tolist() for row in units["best_unit"].values)
    heads = similarity(a, b, ids(), grain="attention")
    assert np.allclose(heads["overlap"].values.diagonal(axis1=1, axis2=2), 1, atol=1e-6)


def test_unrelated_models_are_less_alike_than_one_is_with_itself(copies: dict[str, mt.Model]) -> None:
    hf: Any = copy.deepcopy(copies["own"].hf)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.flatten()[torch.randperm(weight.numel())].reshape(weight.shape))
    other = mt.open(hf, prove=False)
    units = similarity(copies["own"], other, ids(), grain="neuron")
    assert float(units["best_correlation"].mean()) < 0.8
    assert float(similarity(copies["own"], other, ids(), grain="attention")["overlap"].max()) < 0.999
    assert units.attrs["fingerprint"] != units.attrs["other_fingerprint"]


def test_units_are_those_of_captures(copies: dict[str, mt.Model]) -> None:
    a, b = copies["own"], copies["turned"]
    data = similarity(a, b, ids(), grain="neuron", site="attn_out")
    x, y = (m.run(ids(), capture="1.attn_out")["1.attn_out"][:, 1:].flatten(0, 1).numpy() for m in (a, b))
    table = np.abs(np.corrcoef(x.T, y.T)[:40, 40:])
    np.testing.assert_allclose(data["best_correlation"][1], table.max(1), rtol=1e-6)
    assert data["best_unit"].values[1].tolist() == table.argmax(1).tolist()


def test_overlaps_are_those_of_captures(copies: dict[str, mt.Model]) -> None:
    a, b = copies["own"], mt.open(twins.build("llama-gqa/gains").double(), prove=False)
    data = similarity(a, b, ids(), grain="attention")
    p, q = (m.run(ids(), capture="2.attn.pattern")["2.attn.pattern"][:, :, 1:] for m in (a, b))
    for h, g in ((0, 0), (1, 3), (3, 2)):
        expected = float((p[:, h] * q[:, g]).sqrt().sum(-1).mean())
        assert float(data["overlap"][2, h, g]) == pytest.approx(expected, rel=1e-5)
    rows = torch.arange(2, 21, dtype=torch.float64)
    even = (p / rows[:, None]).sqrt().sum(-1).mean((0, 2))
    np.testing.assert_allclose(data["overlap_uniform"][2], even, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ linear CKA


def test_products_of_grams_are_unbiased_and_see_no_shift_or_rotation() -> None:
    """Of independent vectors the mean is 0; of the same, |cov|^2, which is d for normal numbers."""
    n, d, times = 12, 3, 3000
    x, y = drawn(times, n, d), drawn(times, n, d, seed=1)
    pairs = torch.tensor([[float(hsic(centred_gram(a)[None], centred_gram(b)[None])) for b in (a, c)]
                          for a, c in zip(x[:400], y[:400], strict=True)])  # fmt: skip
    error = pairs.std(0) / 20
    assert abs(float(pairs[:, 0].mean()) - d) < 4 * float(error[0])
    assert abs(float(pairs[:, 1].mean())) < 4 * float(error[1])
    basis = torch.linalg.qr(drawn(d, d, seed=2))[0]
    k = centred_gram(x[0])
    assert torch.allclose(centred_gram(x[0] @ basis + 5), k, atol=1e-12)
    assert float(k.sum(0).abs().max()) < 1e-12
    assert float(k.diagonal().abs().max()) == 0


def test_unbiased_cka_tends_to_the_biased_one() -> None:
    x = drawn(600, 8)
    y = x @ drawn(8, 8, seed=1) + drawn(600, 8, seed=2)
    a, b = (v - v.mean(0) for v in (x, y))
    plain = float((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))
    k, other = centred_gram(x)[None], centred_gram(y)[None]
    ours = float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())
    assert ours == pytest.approx(plain, abs=0.02)


def test_layers_of_one_model_are_those_of_two_that_are_one(copies: dict[str, mt.Model]) -> None:
    a = copies["own"]
    data = mt.measure(a, "layer_similarity", text=ids())
    np.testing.assert_allclose(data["cka"], similarity(a, a, ids())["cka"], rtol=1e-9)
    assert np.allclose(np.diag(data["cka"]), 1)
    assert float(abs(data["cka_shuffled"]).max()) < 0.3
    start = torch.arange(12) * 20
    parts = [TokenBatch.of(ids()[s], start[s]) for s in (slice(0, 5), slice(5, 12))]
    halves = mt.measure(a, "layer_similarity", text=parts)
    np.testing.assert_allclose(halves["cka"], data["cka"], rtol=1e-9)


def test_blocks_of_a_map_are_stages() -> None:
    blocks = torch.block_diag(*[torch.ones(n, n) for n in (2, 5, 3)]) * 0.6 + 0.4
    assert depth_stages(blocks, 3).tolist() == [0] * 2 + [1] * 5 + [2] * 3
    assert depth_stages(blocks, 1).tolist() == [0] * 10
    assert depth_stages(blocks, 10).tolist() == list(range(10))
    uneven = torch.block_diag(torch.ones(2, 2), torch.ones(8, 8)) * 0.2 + 0.5 + 0.3 * torch.eye(10)
    assert depth_stages(uneven, 2).tolist() == [0] * 2 + [1] * 8  # not halves, of which fewer pairs are in a run
    with pytest.raises(mt.errors.ArgumentError, match="stages must be from 1"):
        depth_stages(blocks, 11)


def test_what_is_planted_is_found_and_nothing_else() -> None:
    told = LAYERS.depth()
    assert (told["found"], told["false"]) == ("4 of 4", "0 of 25")


# -------------------------------------------------------------------------------------------------- SVCCA, and products


def test_svcca_is_1_for_a_linear_map_and_the_noise_ratio_else() -> None:
    x, noise = drawn(20_000, 4), drawn(20_000, 4, seed=1)
    for strength, expected in ((0.0, 1.0), (1.0, 0.5**0.5)):
        y = (x + strength * noise) @ torch.linalg.qr(drawn(4, 4, seed=2))[0]
        both = [Covariance(4), Covariance(4)]
        for accumulator, values in zip(both, (x, y), strict=True):
            accumulator.update(values)
        cross = CrossCovariance(4, 4)
        cross.update(x, y)
        parts = [one.result().covariance for one in (*both, cross)]
        assert svcca(*parts) == pytest.approx(expected, abs=0.01)


def test_cross_products_are_the_block_of_the_covariance_of_both() -> None:
    x, y = drawn(50, 3) + 1e6, drawn(50, 4, seed=1)
    mask = drawn(50, seed=2) > 0
    cross, both = CrossCovariance(3, 4), Covariance(7)
    cross.update(x[:20], y[:20], mask[:20])
    other = CrossCovariance(3, 4)
    other.update(x[20:], y[20:], mask[20:])
    both.update(torch.cat([x, y], 1), mask)
    found, whole = cross.merge(other).result(), both.result()
    assert torch.allclose(found.covariance, whole.covariance[:3, 3:], atol=1e-10)
    assert torch.allclose(found.variance_x, whole.covariance.diagonal()[:3], atol=1e-9)
    assert torch.allclose(found.correlation, whole.correlation[:3, 3:], atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_compared_is_refused_in_one_line(copies: dict[str, mt.Model]) -> None:
    a = copies["own"]

    class Words:
        bos_token_id, all_special_ids = None, ()

        def __init__(self, first: int) -> None:
            self.first = first

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [self.first + len(word) % 7 for word in text.split()]}

    models = [mt.open(families.build("llama-gqa"), tokenizer=Words(n), prove=False) for n in (5, 6)]
    calls: list[tuple[type[Exception], Any]] = [
        (mt.errors.DataError, lambda: similarity(*models, ids())),
        (mt.errors.ArgumentError, lambda: similarity(a, a, ids(), grain="head")),
        (mt.errors.ArgumentError, lambda: similarity(a, a, ids(), grain="layer", site="logits")),
        (mt.errors.ArgumentError, lambda: similarity(a, a, ids(), grain="attention", site="mlp.post")),
        (mt.errors.SiteError, lambda: similarity(a, a, ids(), grain="neuron", site="mlp.pre")),
        (mt.errors.DataError, lambda: similarity(a, a, ids()[:, :3])),
    ]
    for kind, call in calls:
        with pytest.raises(kind) as refused:
            call()
        assert "\n" not in str(refused.value)
        assert "To do: " in str(refused.value)
