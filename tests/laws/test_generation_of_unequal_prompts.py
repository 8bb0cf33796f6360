"""Prompts of different lengths are generated as each alone under its own edits, also where none can be padded."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tests import tokenizers
from tests.scripts import script

import microtome as mt

PROMPTS = ["ABCD", "5678<=>", "Za"]
FAMILIES = {"llama": ("left", "right"), "llama4_text": ("right",), "doge": ()}
"""The sides on which a short row can be padded: both, one, none."""
MORE: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4}


@cache
def opened(family: str) -> mt.Model:
    model = mt.open(script("tools/family_configs.py").build(family), tokenizer=tokenizers.build("characters"))
    assert model.anatomy.padding == FAMILIES[family]
    return model


def generated(model: mt.Model, prompt: Any, *edits: mt.edit.Edit, **options: Any) -> list[str]:
    with model.editing(*edits):
        return list(model.generate(prompt, **MORE, **options))


def alone(model: mt.Model, number: int, *edits: mt.edit.Edit, **options: Any) -> list[str]:
    return generated(model, [PROMPTS[number]], *edits, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["", "@last", "@-2"])
def test_rows_of_edits_are_numbers_of_prompts(family: str, rule: str) -> None:
    model, site = opened(family), f"1.mlp_out{rule}"
    plain = [alone(model, number)[0] for number in range(3)]
    assert generated(model, PROMPTS) == plain
    every = [alone(model, number, mt.edit.Scale(site, -9.0))[0] for number in range(3)]
    assert any(a != b for a, b in zip(every, plain, strict=True))
    for rows in ((0,), (1,), (2,), (0, 2)):
        expected = [every[i] if i in rows else plain[i] for i in range(3)]
        assert generated(model, PROMPTS, mt.edit.Scale(site, -9.0, rows=rows)) == expected, rows
    two = [mt.edit.Scale(site, -9.0, rows=(1,)), mt.edit.Scale("0.resid_post@last", -2.0, rows=(2,))]
    expected = [plain[0], every[1], alone(model, 2, mt.edit.Scale("0.resid_post@last", -2.0))[0]]
    assert generated(model, PROMPTS, *two) == expected
    with pytest.raises(mt.errors.EditError, match=r"no rows \(1, 3\) in this batch.*0 to 2"):
        generated(model, PROMPTS, mt.edit.Scale(site, -9.0, rows=(1, 3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sequences_of_each_prompt_are_returned(family: str) -> None:
    model, edit = opened(family), mt.edit.Scale("1.mlp_out", -9.0, rows=(1,))
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    expected = [*alone(model, 0, **beams), *alone(model, 1, mt.edit.Scale("1.mlp_out", -9.0), **beams)]
    expected += alone(model, 2, **beams)
    assert len(expected) == 6
    assert generated(model, PROMPTS, edit, **beams) == expected
    assert len(generated(model, PROMPTS, do_sample=True, num_return_sequences=3)) == 9


@pytest.mark.parametrize("family", ["llama4_text", "doge"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_patch_takes_each_prompts_own_row(family: str, options: dict[str, Any]) -> None:
    model = opened(family)
    others = ["DCBA", "=>56789", "aZ"]
    runs = [model.run([other], capture="1.mlp_out") for other in others]
    patches = [mt.edit.Patch("1.mlp_out@0,1", source=run) for run in runs]
    expected = [alone(model, number, patches[number], **options)[0] for number in range(3)]
    if "right" in model.anatomy.padding:
        sources: Any = model.run(others, capture="1.mlp_out")
    else:
        held = [run["1.mlp_out"][:, :2] for run in runs]
        sources = {"1.mlp_out": torch.cat(held)}
    assert generated(model, PROMPTS, mt.edit.Patch("1.mlp_out@0,1", source=sources), **options) == expected
    plain = generated(model, PROMPTS, **options)
    own = mt.edit.Patch("1.mlp_out@0,1", source=sources, rows=(1,))
    assert generated(model, PROMPTS, own, **options) == [plain[0], expected[1], plain[2]]
    assert plain != expected
    fewer: Any = {"1.mlp_out": runs[0]["1.mlp_out"].repeat(2, 1, 1)}
    with pytest.raises(mt.errors.EditError, match=r"other rows than there are prompts; got 2 rows; allowed: 1 or 3"):
        generated(model, PROMPTS, mt.edit.Patch("1.mlp_out@0,1", source=fewer), **options)


@pytest.mark.parametrize(
    "edit",
    [
        mt.edit.Mean("1.mlp_out"),
        mt.edit.Apply("1.mlp_out", function=lambda x: x.roll(1, 0)),
        mt.edit.Scale("1.mlp_out", torch.ones(3, 1, 1)),
        mt.edit.Mean("1.mlp_out", rows=(0, 2)),
    ],
)
def test_an_edit_that_needs_all_rows_at_once_is_refused(edit: mt.edit.Edit) -> None:
    model = opened("llama4_text")
    with pytest.raises(mt.errors.EditError, match="generated one after the other"):
        generated(model, PROMPTS, edit)
    assert generated(model, [PROMPTS[0]] * 3, edit)  # of one length, all are rows of one batch


def test_an_edit_of_one_row_needs_no_other() -> None:
    model = opened("doge")
    for made in (lambda **more: mt.edit.Mean("1.mlp_out", **more),
                 lambda **more: mt.edit.Apply("1.mlp_out", function=lambda x: -9 * x.cumsum(1), **more)):  # fmt: skip
        plain = generated(model, PROMPTS)
        expected = [plain[0], alone(model, 1, made())[0], plain[2]]
        assert generated(model, PROMPTS, made(rows=(1,))) == expected


def test_no_prompt_is_generated_where_one_leaves_no_room() -> None:
    model = opened("doge")
    with pytest.raises(mt.errors.PromptError, match="too little room"):
        model.generate(["AB", "A" * (model.anatomy.n_ctx - 3)], max_new_tokens=4)
