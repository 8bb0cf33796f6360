"""Tuning of single neurons and heads: all else stays to the bit, and the result is what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.tasks import Pair, Task
from microtome.training import _tune
from microtome.training._slices import OWN, others, units_of

KINDS = ("llama-gqa", "gpt2", "phi3", "gpt_neox-parallel", "falcon-mqa", "olmo2")
PARTS = ["1.mlp.post[2,5]", "2.attn.z[3]"]
TEXT = torch.randint(5, families.VOCAB, (8, 12), generator=torch.Generator().manual_seed(1))


def opened(kind: str) -> mt.Model:
    return mt.open(families.build(kind).requires_grad_(False), prove=False)


def task(count: int = 24) -> Task:
    pairs = tuple(
        Pair("", "", (7, i, 33, *([9] * (i % 2))), (7, i + 1, 33, *([9] * (i % 2))), "a", "b", (90, 91), (92,), {})
        for i in range(10, 10 + count)
    )
    return Task("own", "always the same answers", pairs, {})


def tuned(model: mt.Model, **given: Any) -> Any:
    return mt.training.tune(model, task(), PARTS, **({"steps": 4, "lr": 0.02, "sets": 1, "text": TEXT} | given))


def weights(model: mt.Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_parts_change_and_the_result_is_what_the_model_does(kind: str) -> None:
    model = opened(kind)
    start = weights(model)
    data = tuned(model)
    assert all(torch.equal(p, start[name]) for name, p in model.hf.named_parameters())
    assert float(data["gain"][0]) > 0.01
    again = tuned(model, keep=True)
    np.testing.assert_allclose(again["gain"], data["gain"], atol=1e-6)
    moved = {name for name, p in model.hf.named_parameters() if not torch.equal(p, start[name])}
    assert moved
    kept = {name: p.detach().clone() for name, p in model.hf.named_parameters() if name in moved}
    changed = sum(int((kept[name] != start[name]).sum()) for name in moved)
    assert 0.9 * int(data["parameters"]) < changed <= int(data["parameters"])
    losses, hits = [], []
    for pair in task().pairs[12:]:
        log_p = model.run([list(pair.clean_tokens)]).logits[0, -1].log_softmax(-1)
        losses.append(-float(log_p[[90, 91]].logsumexp(0)))
        hits.append(float(log_p[[90, 91]].max() >= log_p.max()))
    assert float(again["loss"][0]) == pytest.approx(np.mean(losses), abs=1e-4)
    assert float(again["accuracy"][0]) == pytest.approx(np.mean(hits))
    log_p = model.run(TEXT).logits[:, :-1].log_softmax(-1)
    text = -float(log_p.gather(-1, TEXT[:, 1:, None]).mean())
    assert float(again["text_loss"][0]) == pytest.approx(text, abs=1e-4)
    assert float(again["forgetting"][0]) == pytest.approx(text - float(again["text_loss_before"]), abs=1e-4)
    plain = opened(kind)
    for layer, site, n in units_of(model, PARTS):
        for matrix, own in OWN[site]:
            if matrix != "W_gate" or "0.mlp.gate" in map(str, model.anatomy.hook_points):
                mine, its = (own(getattr(m.layers[layer], matrix), n) for m in (model, plain))
                mine.copy_(its)  # the old weights of the parts, through their views: then all is as before
    assert all(torch.equal(p, start[name]) for name, p in model.hf.named_parameters())


def test_no_step_changes_nothing_and_a_tuned_part_differs_from_a_random_one() -> None:
    model = opened("llama-gqa")
    none = tuned(model, steps=0, sets=2)
    for name in ("gain", "forgetting", "gain_diff"):
        assert not none[name].values.any(), name
    assert list(none["set"].values) == ["tuned", "random 0", "random 1"]
    data = tuned(model)
    difference = float(data["gain"][0] - data["gain"][1])
    assert float(data["gain_diff"]) == pytest.approx(difference, abs=1e-9)
    assert data["gain_diff_lo"] < data["gain_diff"] < data["gain_diff_hi"]


def test_what_is_tuned_does_not_depend_on_the_number_of_random_sets() -> None:
    model = opened("llama-gqa")
    none, one, three = (tuned(model, sets=n, batch=3) for n in (0, 1, 3))
    for name in ("gain", "loss", "forgetting"):
        assert float(none[name][0]) == float(one[name][0]) == float(three[name][0]), name
    assert one.attrs["random_0"] == three.attrs["random_0"]
    assert float(one["gain"][1]) == float(three["gain"][1])


def test_random_parts_are_as_many_of_the_same_places() -> None:
    model = opened("llama-gqa")
    units = units_of(model, PARTS)
    drawn = others(model, units, torch.Generator().manual_seed(3))
    assert sorted((i, s) for i, s, _ in drawn) == sorted((i, s) for i, s, _ in units)
    assert not set(drawn) & set(units)
    assert len(set(drawn)) == 3


def test_a_tuning_that_is_stopped_leaves_the_weights_and_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    model = opened("llama-gqa")
    start, whole = weights(model), tuned(model, steps=6, sets=0)
    place, losses, calls = tmp_path / "state.safetensors", _tune._losses, [0]

    def stopped(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:  # the first reads the model before
            raise KeyboardInterrupt
        return losses(*given)

    monkeypatch.setattr(_tune, "_losses", stopped)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, steps=6, sets=0, checkpoint=place)
    assert all(torch.equal(p, start[name]) for name, p in model.hf.named_parameters())
    monkeypatch.setattr(_tune, "_losses", losses)
    assert float(tuned(model, steps=6, sets=0, checkpoint=place)["loss"][0]) == float(whole["loss"][0])


def test_weights_are_put_back_when_reading_fails(monkeypatch: Any) -> None:
    model, read = opened("llama-gqa"), _tune._Held.read
    start, calls = weights(model), [0]

    def failing(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise ValueError("no")
        return read(*given)

    monkeypatch.setattr(_tune._Held, "read", failing)
    with pytest.raises(ValueError, match="no"):
        tuned(model, keep=True)
    assert all(torch.equal(p, start[name]) for name, p in model.hf.named_parameters())


@pytest.mark.parametrize(
    ("parts", "given", "kind", "text"),
    [
        (["1.mlp_out"], {}, mt.errors.ArgumentError, "these are no parts that can be tuned; got 1.mlp_out"),
        (["1.mlp.post"], {}, mt.errors.ArgumentError, "these are no parts that can be tuned"),
        (["1.mlp.post[999]"], {}, mt.errors.SiteError, "999"),
        ([], {}, mt.errors.MicrotomeError, "no parts|names nothing|empty"),
        (["1.attn.z[0-2]"], {}, mt.errors.ArgumentError, "too many parts of one layer"),
        (PARTS, {"steps": -1}, mt.errors.ArgumentError, "steps must be an integer of 0 or more"),
        (PARTS, {"tests": 24}, mt.errors.DataError, "pairs to train on and others to test"),
        (PARTS, {"text": None}, mt.errors.DataError, "has no tokenizer to read a text with"),
    ],
)
def test_what_cannot_be_tuned(parts: list[str], given: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text) as refused:
        mt.training.tune(opened("llama-gqa"), task(), parts, **({"text": TEXT, "steps": 1} | given))
    assert "\n" not in str(refused.value)
