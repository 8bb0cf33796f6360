"""Checks of attributions: no layer untrained changes nothing, what ignores layers is kept, and ranks choose tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.explain._attribution_maps import MAPS, USUAL, map_of, usual
from microtome.explain._diff_roar import kept_of
from microtome.model import untrained_of

PROMPTS = [[7, 20, 33, 41, 52, 60, 11, 90], [9, 8, 30, 77, 64, 15]]


def opened(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name).requires_grad_(False), prove=False)


def rows(n: int = 16, length: int = 8) -> Tensor:
    return torch.randint(5, families.VOCAB, (n, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", families.some(2, ["llama-gqa", "gpt2", "gpt_neox-parallel"]))
def test_layers_are_untrained_from_the_last_one_down_in_a_copy(name: str) -> None:
    model = opened(name)
    before = {key: x.clone() for key, x in model.hf.state_dict().items()}
    blank = untrained_of(model)
    seen: list[int] = []
    for first, other in mt.explain.randomised(model, [3, 2, 0]):
        seen.append(first)
        for layer in range(3):
            path = model.anatomy.parts.layers[layer].block
            own, new, drawn = (m.hf.get_submodule(path).state_dict() for m in (model, other, blank))
            source = drawn if layer >= first else own
            assert all(torch.equal(new[key], source[key]) for key in new)
            assert not all(torch.equal(own[key], drawn[key]) for key in own)
    assert seen == [3, 2, 0]
    assert all(torch.equal(x, before[key]) for key, x in model.hf.state_dict().items())


def test_what_ignores_the_layers_is_kept_and_what_reads_them_is_not() -> None:
    data = mt.explain.attribution_check(
        opened(), PROMPTS, estimates=["gradient", "gradient_input", "embedding", "random"], every=1
    )
    assert data["layer"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(data["kept"].sel(layer=3), 1.0)
    np.testing.assert_allclose(data["kept"].sel(estimate="embedding"), 1.0)
    assert float(data["kept"].sel(layer=0, estimate="gradient")) < 0.9
    assert float(data["kept"].sel(layer=0, estimate="gradient_input")) < 0.9
    assert abs(float(data["shuffled"].mean())) < 0.5
    assert "null_share" not in data


def test_the_share_of_a_null_span_is_that_of_the_map() -> None:
    model = opened()
    data = mt.explain.attribution_check(model, PROMPTS, estimates=["gradient", "legrad"], null=(2, 5))
    for i, row in enumerate(PROMPTS):
        answer = int(model.run(row).logits[0, -1].argmax())
        for name in ("gradient", "legrad"):
            x = map_of(name, model, torch.tensor(row), answer)
            share = float(x[2:5].sum() / x.sum())
            assert float(data["null_share_each"].sel(estimate=name)[i]) == pytest.approx(share)
    assert float(data["null_even"]) == pytest.approx((3 / 8 + 3 / 6) / 2)


def test_maps_are_what_they_are_called() -> None:
    model, row = opened(), torch.tensor(PROMPTS[0])
    run = model.run(row.unsqueeze(0), capture="embed", grad=True)
    slope = run.grad(run.logits[0, -1, 11])["embed"][0]
    torch.testing.assert_close(map_of("gradient", model, row, 11), slope.norm(dim=-1).double(), rtol=1e-4, atol=1e-7)
    product = (slope * run["embed"].detach()[0]).sum(-1).abs().double()
    torch.testing.assert_close(map_of("gradient_input", model, row, 11), product, rtol=1e-3, atol=1e-6)
    assert float((map_of("relp", model, row, 11) - product).abs().max()) > 1e-3
    ig = mt.explain.integrated_gradients(model, row, answer=11, most=128)["score"].values
    np.testing.assert_allclose(map_of("ig", model, row, 11), np.abs(ig))


def test_what_is_kept_are_the_lowest_and_the_last() -> None:
    order = torch.tensor([[3.0, 1.0, 2.0, 0.0, -9.0], [0.0, 0.0, 5.0, 1.0, 7.0]])
    assert kept_of(order, 2).int().tolist() == [[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]]


def first_token_answers(n: int = 48) -> Tensor:
    """Prompts whose first token, one of two, is the answer."""
    tokens = rows(n)
    tokens[:, 0] = 5 + torch.randint(2, (n,), generator=torch.Generator().manual_seed(4))
    return tokens


def test_where_everything_is_kept_both_ends_are_the_whole() -> None:
    tokens = first_token_answers()
    data = mt.explain.diff_roar(
        opened(), tokens, answers=tokens[:, 0].tolist(), estimates=["random"], steps=60, rows=16, keep=1.0, lr=1e-2
    )
    np.testing.assert_allclose(data["top"], data["bottom"])
    assert float(data["whole"]) > 0.9
    assert float(data["top"][0]) > 0.9


def test_nothing_is_learned_where_the_answer_is_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that ranks the answer's place first and the others alike, so that the other end never has it."""
    tokens = first_token_answers(64)
    place = torch.zeros(tokens.shape[1], dtype=torch.float64)
    place[0] = 1.0
    monkeypatch.setitem(MAPS, "random", lambda model, row, answer: place)
    data = mt.explain.diff_roar(
        opened(), tokens, answers=tokens[:, 0].tolist(), estimates=["random"], steps=60, rows=16, lr=1e-2, keep=0.2,
        left_out=0.5,
    )  # fmt: skip
    assert data.attrs["kept"] == 1
    assert float(data["top"][0]) > 0.9
    assert float(data["bottom"][0]) < 0.75
    assert float(data["top_diff"][0]) > 0.25


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_of_a_mixture_the_default_leaves_out_what_holds_activations(name: str) -> None:
    model, row = opened(name), torch.tensor(PROMPTS[0])
    assert usual(model, row) == ("gradient", "gradient_input", "ig", "legrad")
    assert usual(opened(), row) == USUAL
    data = mt.explain.attribution_check(model, PROMPTS[:1], every=3)
    assert data["estimate"].values.tolist() == ["gradient", "gradient_input", "ig", "legrad"]
    with pytest.raises(mt.errors.EditError, match="cannot be frozen"):
        mt.explain.attribution_check(model, PROMPTS[:1], estimates=["relp"])


def test_a_map_of_nothing_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAPS, "random", lambda model, row, answer: torch.zeros(len(row), dtype=torch.float64))
    data = mt.explain.attribution_check(opened(), PROMPTS[:1], estimates=["random"], null=(2, 5), every=3)
    assert np.isnan(data["null_share"]).all()


def test_what_cannot_be_is_refused_in_a_line() -> None:
    model = opened()
    wrong: list[tuple[type[Exception], str, Any]] = [
        (mt.errors.PromptError, "prompt 0 is too short for ranks; got 2 tokens",
         lambda: mt.explain.attribution_check(model, [[5, 6]])),
        (mt.errors.PromptError, "no such null span", lambda: mt.explain.attribution_check(
            model, PROMPTS, null=(7, 9), estimates=["gradient"])),
        (mt.errors.PromptError, "a training needs prompts of one length; got 2 prompts of 2 lengths; allowed: 8",
         lambda: mt.explain.diff_roar(model, PROMPTS, answers=[5, 6])),
        (mt.errors.PromptError, "one answer per prompt; got 2; allowed: 16",
         lambda: mt.explain.diff_roar(model, rows(), answers=[5, 6])),
        (mt.errors.DataError, "some prompts must be left out, and some not; got 0 of 16",
         lambda: mt.explain.diff_roar(model, rows(), answers=[5] * 16, left_out=0.0)),
        (mt.errors.ArgumentError, "no token would be kept beside the last; got 0.0 of 7; allowed: 0.14 to 1",
         lambda: mt.explain.diff_roar(model, rows(), answers=[5] * 16, keep=0.0)),
        (mt.errors.PromptError, "token id 999 is not in",
         lambda: mt.explain.diff_roar(model, rows(), answers=[5] * 16, blank=999)),
    ]  # fmt: skip
    for kind, text, call in wrong:
        with pytest.raises(kind, match=text) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_the_model_is_as_before_after_a_training_that_was_stopped() -> None:
    model = opened()
    before = model.fingerprint

    def stop(stage: str, done: int, everything: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), mt.settings(progress=stop):
        mt.explain.diff_roar(model, rows(), answers=[5] * 16, estimates=["random"], steps=2)
    assert model.fingerprint == before
    assert not any(p.requires_grad for p in model.hf.parameters())
