"""What a change costs: nothing where nothing changes, and what plain PyTorch says where something does."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests import families
from tests.laws.test_change import bits, drawn, opened, same

import microtome as mt
from microtome.change import assess
from microtome.change._scores import distinct, entropy, repeated
from microtome.errors import ArgumentError, EditError

TEXT = torch.randint(3, 101, (12, 32), generator=torch.Generator().manual_seed(7))
SMALL: dict[str, Any] = {"text": TEXT, "tokens": 384, "length": 32, "of": (), "sequences": 8, "prompts": 2, "new": 12}


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return opened()


def changes(data: Any) -> list[str]:
    return [str(v) for v in data.data_vars if str(v).endswith("_change")]


def test_a_model_beside_itself_changes_nothing(model: mt.Model) -> None:
    data = assess(model, model, **SMALL)
    for name in (*changes(data), "kl"):
        assert np.abs(data[name].values[np.isfinite(data[name].values)]).max() == 0, name
    assert (data["agreement"].values == 1).all()
    for name in ("loss", "repeated", "bytes", "parameters"):
        assert data[name].sel(state="before") == data[name].sel(state="after"), name


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gptj", "olmo2"])
def test_loss_divergence_and_agreement_are_those_of_plain_pytorch(name: str) -> None:
    model = opened(name)
    before = bits(model)
    change = mt.change.of(model, {"1.W_out": drawn(model, "1.W_out", size=0.5)})
    data = assess(model, change, **SMALL)
    assert same(model, before)
    with torch.no_grad():
        plain = model.hf(TEXT).logits[:, :-1].double().log_softmax(-1)
        with change.applied(model):
            after = model.hf(TEXT).logits[:, :-1].double().log_softmax(-1)
    losses = [-x.gather(-1, TEXT[:, 1:, None]).mean() for x in (plain, after)]
    kl = (plain.exp() * (plain - after)).sum(-1).mean()
    agreement = (plain.argmax(-1) == after.argmax(-1)).double().mean()
    assert data["loss"].values[:2] == pytest.approx([float(x) for x in losses], abs=1e-5)
    assert float(data["loss_change"].sel(changed="after")) == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)
    assert float(data["kl"].sel(changed="after")) == pytest.approx(float(kl), abs=1e-5)
    assert float(data["agreement"].sel(changed="after")) == pytest.approx(float(agreement), abs=1e-9)
    assert float(data["kl"].sel(changed="random")) > 0
    assert data.attrs["control"] == "a random change of equal norm and rank"


def test_edits_and_other_models_are_assessed_too(model: mt.Model) -> None:
    vector = torch.randn(40, generator=torch.Generator().manual_seed(1))
    edit = mt.edit.Add("1.resid_post", value=vector)
    baked = mt.change.with_biases(model)
    with mt.change.bake(baked, edit).applied(baked):
        of_model = assess(model, baked, **SMALL)
    of_edit = assess(model, edit, **SMALL)
    for name in ("loss", "kl", "agreement", "induction_loss"):
        which = {"state": "after"} if name in ("loss", "induction_loss") else {"changed": "after"}
        assert float(of_edit[name].sel(which)) == pytest.approx(float(of_model[name].sel(which)), abs=1e-4), name
    assert of_edit.attrs["control"] == "random vectors of equal norm"
    assert of_model.attrs["control"] == "none: the models have other parameters"
    assert np.isnan(of_model["loss"].sel(state="random"))
    zero = assess(model, mt.edit.Zero("1.mlp_out"), **SMALL)
    assert zero.attrs["control"].startswith("none")


def test_another_model_of_the_same_shape_has_a_random_control() -> None:
    model, other = opened(), opened()
    with torch.no_grad():
        other.layers[1].W_out.add_(0.1)
    data = assess(model, other, **SMALL)
    assert data.attrs["control"] == "a random change of equal norm"
    assert float(data["kl"].sel(changed="random")) > 0
    assert float(data["kl"].sel(changed="after")) > 0


def test_groups_keep_their_own_losses(model: mt.Model) -> None:
    text = {"one": TEXT[:6], "two": TEXT[6:]}
    change = mt.change.of(model, {"1.W_out": drawn(model, "1.W_out", size=0.5)})
    given: dict[str, Any] = {**SMALL, "text": text}
    data = assess(model, change, **given)
    for name, rows in text.items():
        given["text"] = rows
        alone = assess(model, change, **given)
        for state in ("before", "after"):
            own = float(data["group_loss"].sel(group=name, state=state))
            assert own == pytest.approx(float(alone["loss"].sel(state=state)), abs=1e-5)


def test_repetition_diversity_and_entropy() -> None:
    same_token, all_different = [5] * 12, list(range(12))
    assert (repeated(same_token), repeated(all_different)) == (1 - 1 / 9, 0.0)
    assert (distinct(same_token), distinct(all_different)) == (1 / 11, 1.0)
    assert entropy(same_token) == 0.0
    assert entropy(all_different) == pytest.approx(np.log2(11) / 3 + 2 * np.log2(10) / 3)


def test_what_is_refused(model: mt.Model) -> None:
    change = mt.change.of(opened("mistral"), {"1.W_out": torch.ones(56, 40)})
    with pytest.raises(EditError, match="another model"):
        assess(model, change, **SMALL)
    with pytest.raises(ArgumentError, match="cannot be assessed; got int"):
        assess(model, 3, **SMALL)
    with pytest.raises(ArgumentError, match="other tokens"):
        assess(model, _other(), **SMALL)


def _other() -> mt.Model:
    config: Any = copy.deepcopy(families.build("llama-gqa").config)
    config.vocab_size = 90
    return mt.open(transformers.LlamaForCausalLM(config).eval(), prove=False)
