"""Standing edits as weights: the logits are those of runs under the edits."""

from __future__ import annotations

import pytest
import torch
from tests import families
from tests.laws.test_change import ROWS, bits, opened, same

import microtome as mt
from microtome.errors import EditError, SiteError

FAMILIES = ["gpt2", "gptj", "phi3", "llama-gqa", "gpt_neox-parallel"]


def vector(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def edits_of(model: mt.Model) -> list[mt.edit.Edit]:
    d, head = model.anatomy.d_model, model.anatomy.d_head
    edit = mt.edit
    return [
        edit.Zero("1.mlp.post[3,9]"), edit.Set("1.mlp.post[4]", value=0.7), edit.Scale("0.mlp.post", factor=0.5),
        edit.Zero("1.attn.z[2]"), edit.Mean("0.attn.z[1]", mean=vector(head)), edit.Scale("2.attn.z[0,3]", factor=2.0),
        edit.Project("0.attn.z[2]", basis=vector(head, 1)), edit.Project("*.mlp_out", basis=vector(d, 2)),
        edit.Project("*.attn_out", basis=vector(d, 2)), edit.Add("1.mlp_out", value=vector(d, 3), strength=0.5),
        edit.Zero("2.mlp_out"), edit.Set("0.attn_out[3]", value=1.5), edit.Add("1.resid_post", value=vector(d, 4)),
    ]  # fmt: skip


def has_place(model: mt.Model, edit: mt.edit.Edit) -> bool:
    """Whether there is a bias, where an edit needs one."""
    if not isinstance(edit, mt.edit.Add | mt.edit.Set | mt.edit.Mean):
        return True
    layer = model.layers[0]
    return (layer.b_O if "attn" in edit.site or "mid" in edit.site else layer.b_out) is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_baked_edit_is_the_edit(name: str) -> None:
    model = opened(name)
    wide = mt.change.with_biases(model) if name == "llama-gqa" else model
    before, checked = bits(wide), 0
    assert (wide.run(ROWS).logits - model.run(ROWS).logits).abs().max() < 1e-5
    for edit in edits_of(wide):
        if not has_place(wide, edit):
            with pytest.raises(SiteError, match="has no"):
                mt.change.bake(wide, edit)
            continue
        change = mt.change.bake(wide, edit)
        checked += 1
        expected = wide.run(ROWS, edits=[edit]).logits
        with change.applied(wide):
            assert (wide.run(ROWS).logits - expected).abs().max() < 2e-4, edit
        assert (wide.run(ROWS).logits - expected).abs().max() > 1e-3, edit
    assert same(wide, before)
    assert checked >= 7


def test_edits_in_order_are_one_change() -> None:
    model = opened("gpt2")
    chosen = edits_of(model)[:10]
    with mt.change.bake(model, chosen).applied(model):
        logits = model.run(ROWS).logits
    assert (model.run(ROWS, edits=chosen).logits - logits).abs().max() < 5e-4


def test_an_addition_to_the_middle_of_a_layer_is_in_the_bias_of_attention() -> None:
    model = opened("gpt2")
    edit = mt.edit.Add("1.resid_mid", value=vector(40))
    change = mt.change.bake(model, edit)
    assert change.weights == ["1.b_O"]
    expected = model.run(ROWS, edits=[edit]).logits
    with change.applied(model):
        assert (model.run(ROWS).logits - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (mt.edit.Clamp("1.mlp_out", low=0.0), "no affine map"),
        (mt.edit.Apply("1.mlp_out", function=lambda x: x**2), "no affine map"),
        (mt.edit.Zero("1.mlp_out@2"), "some rows or positions"),
        (mt.edit.Zero("1.mlp_out", rows=(0,)), "some rows or positions"),
        (mt.edit.Zero("1.attn.q"), "no weight does"),
        (mt.edit.Scale("1.mlp_out", factor=1.0), "do nothing"),
        (mt.edit.Mean("1.mlp_out"), "no affine map"),
        (mt.edit.Project("1.resid_post", basis=torch.ones(40)), "several parts write"),
    ],
)
def test_what_cannot_be_baked(edit: mt.edit.Edit, text: str) -> None:
    with pytest.raises(EditError, match=text):
        mt.change.bake(opened("gpt2"), edit)


@pytest.mark.parametrize(("name", "text"), [("olmo2", "a norm between"), ("mixtral", "experts between")])
def test_a_family_without_a_place(name: str, text: str) -> None:
    with pytest.raises(SiteError, match=text):
        mt.change.bake(mt.open(families.build(name), prove=False), mt.edit.Zero("1.mlp_out"))


def test_a_family_without_a_bias() -> None:
    model = opened("mistral")
    with pytest.raises(SiteError, match=r"has no 1.b_out, where a constant would stand"):
        mt.change.bake(model, mt.edit.Add("1.mlp_out", value=torch.ones(40)))
    with pytest.raises(SiteError, match="cannot add biases"):
        mt.change.with_biases(model)
