"""Generation of models that keep states instead of keys and values, against plain hooks on forwards over all tokens."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from tests.scripts import script
from torch import Tensor
from transformers import DynamicCache

import microtome as mt

configs = script("tools/family_configs.py")
NEW, WIDTH = 5, 7
COLUMNS = {
    "": slice(None),
    "@1": slice(1, 2),
    "@-2": slice(WIDTH - 2, WIDTH - 1),
    "@prompt": slice(WIDTH),
    "@generated": slice(WIDTH, None),
    "@last": slice(WIDTH - 1, None),
}
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
KEEPS = ["mamba", "mamba2", "falcon_mamba", "xlstm"]


@cache
def opened(family: str, *, prove: bool = False) -> mt.Model:
    return mt.open(configs.build(family), prove=prove)


def prompt() -> Tensor:
    return configs.prompt(2, WIDTH)


def generate(model: mt.Model, ids: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    mask = more.pop("attention_mask", torch.ones_like(ids))
    out = model.hf.generate(ids, attention_mask=mask, **OPTIONS, **more)
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
def hooked(model: mt.Model, tokens: Tensor, columns: slice, factor: float, call: Any = None) -> Any:
    """Logits of a forward over all tokens, or what a call gives, as a plain hook scales columns of a block's output."""

    def scale(module: Any, args: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[:, columns] *= factor
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = model.hf.get_submodule(model.anatomy.parts.layers[1].block).register_forward_hook(scale)
    try:
        return model.hf(tokens, use_cache=False).logits if call is None else call()
    finally:
        handle.remove()


@pytest.mark.parametrize("family", KEEPS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_edits_follow_states_through_a_generation(family: str, use_cache: bool) -> None:
    model = opened(family)
    _, plain = generate(model, prompt())
    for rule, columns in COLUMNS.items():
        with model.editing(mt.edit.Scale(f"1.resid_post{rule}", -3.0)):
            sequences, logits = generate(model, prompt(), use_cache=use_cache)
        expected = hooked(model, sequences, columns, -3.0)[:, WIDTH - 1 : -1]
        torch.testing.assert_close(logits, expected, **NEAR, msg=lambda m, rule=rule: f"{rule}: {m}")
        assert torch.equal(sequences[:, WIDTH:], expected.argmax(-1)), rule
        assert float((logits - plain).abs().max()) > 1000 * NEAR["atol"], rule


def test_edits_follow_a_list_of_states() -> None:
    """What RWKV keeps is a list; with it the model itself is not what it is without, so both are compared apart."""
    model = opened("rwkv")
    for rule, columns in COLUMNS.items():
        with model.editing(mt.edit.Scale(f"1.resid_post{rule}", -3.0)):
            sequences, logits = generate(model, prompt(), use_cache=False)
        expected = hooked(model, sequences, columns, -3.0)[:, WIDTH - 1 : -1]
        torch.testing.assert_close(logits, expected, **NEAR, msg=lambda m, rule=rule: f"{rule}: {m}")
    expected = hooked(model, prompt(), slice(None), -3.0, lambda: generate(model, prompt()))
    with model.editing(mt.edit.Scale("1.resid_post", -3.0)):
        assert torch.equal(generate(model, prompt())[0], expected[0])
    with model.editing(mt.edit.Scale("1.resid_post@prompt", -3.0), mt.edit.Scale("1.resid_post@generated", -3.0)):
        assert torch.equal(generate(model, prompt())[0], expected[0])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_padded_rows_with_states_are_edited_like_each_row(family: str) -> None:
    model = opened(family)
    rows = [prompt()[0].tolist(), prompt()[1, :4].tolist()]
    batch = model.to_batch(rows, "left")
    for edit in (mt.edit.Scale("1.resid_post@1", -3.0), mt.edit.Scale("1.resid_post@last", -3.0)):
        with model.editing(edit):
            _, together = generate(model, batch.tokens, attention_mask=batch.mask.long())
            for row, tokens in enumerate(rows):
                _, alone = generate(model, torch.tensor([tokens]))
                torch.testing.assert_close(together[row : row + 1], alone, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "xlstm"])
def test_states_are_followed_from_forward_to_forward(family: str) -> None:
    model, token = opened(family), torch.tensor([[9], [11]])
    whole = torch.cat([prompt(), token], 1)
    for rule, columns in {"@prompt": slice(WIDTH), "@generated": slice(WIDTH, None), "@1": slice(1, 2)}.items():
        with model.editing(mt.edit.Scale(f"1.resid_post{rule}", -3.0)):
            first = model.hf(prompt(), use_cache=True).cache_params
            model.hf(prompt()[:, :3], use_cache=True)  # another text, with a cache of its own
            found = [model.hf(token, cache_params=c, use_cache=True).logits for c in (copy.deepcopy(first), first)]
        for logits in found:
            torch.testing.assert_close(logits, hooked(model, whole, columns, -3.0)[:, -1:], **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "xlstm", "rwkv"])
def test_states_of_an_unknown_number_of_tokens_are_refused(family: str) -> None:
    model = opened(family)
    name = "state" if family == "rwkv" else "cache_params"
    before = model.hf(prompt(), use_cache=True)[name]
    text = "does not count tokens, and was filled where no edit was active.*read the whole prompt inside the block"
    with pytest.raises(mt.errors.EditError, match=text), model.editing(mt.edit.Scale("1.resid_post@1", -3.0)):
        model.hf(prompt()[:, :1], **{name: before})
    if family == "mamba":
        empty: Any = DynamicCache(config=model.hf.config)
        with model.editing(mt.edit.Scale("1.resid_post@1", -3.0)):
            logits = model.hf(prompt(), cache_params=empty).logits
        torch.testing.assert_close(logits, hooked(model, prompt(), slice(1, 2), -3.0), **NEAR)


@pytest.mark.parametrize("family", ["mamba", "xlstm", "rwkv", "llama"])
def test_a_block_is_repeated_only_without_a_cache(family: str) -> None:
    model = opened(family)
    for layer in range(model.anatomy.n_layers):
        edit = mt.edit.Repeat(str(layer))
        with model.editing(edit):
            with pytest.raises(mt.errors.EditError, match=r"cannot be repeated while.*pass use_cache=False"):
                generate(model, prompt())
            sequences, logits = generate(model, prompt(), use_cache=False)
        torch.testing.assert_close(logits, model.run(sequences, edits=edit).logits[:, WIDTH - 1 : -1], **NEAR)


COUNTS_BY = {"llama": 0, "qwen3_next": 3, "lfm2": 1, "bamba": 1, "mamba": None}
"""The layer by which the cache of a family counts positions; none where all keep states."""


@pytest.mark.parametrize("family", COUNTS_BY)
def test_any_block_is_skipped_but_the_one_that_counts(family: str) -> None:
    model, counting = opened(family, prove=True), COUNTS_BY[family]  # the proof finds what a block returns
    for layer in range(model.anatomy.n_layers):
        edit = mt.edit.Skip(str(layer))
        with model.editing(edit):
            if layer == counting:
                text = rf"counts positions by layer {layer}, which cannot be skipped.*0 of 7.*pass use_cache=False"
                with pytest.raises(mt.errors.EditError, match=text):
                    generate(model, prompt())
            sequences, logits = generate(model, prompt(), use_cache=layer != counting)
        torch.testing.assert_close(logits, model.run(sequences, edits=edit).logits[:, WIDTH - 1 : -1], **NEAR)


@pytest.mark.parametrize(("family", "layer"), [("gemma4_text", 1), ("gemma3n_text", 2), ("rwkv", 0), ("xlstm", 1)])
def test_a_block_that_others_need_is_refused_by_name(family: str, layer: int) -> None:
    model, text = opened(family), "does not run with some of its blocks skipped or repeated"
    with pytest.raises(mt.errors.EditError, match=text), model.editing(mt.edit.Skip(str(layer))):
        generate(model, prompt())


def test_a_block_that_keeps_the_states_of_all_is_skipped_without_them() -> None:
    model = opened("rwkv", prove=True)
    text = "kept nothing of the tokens that it has read.*pass use_cache=False"
    with pytest.raises(mt.errors.EditError, match=text), model.editing(mt.edit.Skip("2")):
        generate(model, prompt())
    with model.editing(mt.edit.Skip("2")):
        sequences, logits = generate(model, prompt(), use_cache=False)
    torch.testing.assert_close(logits, model.run(sequences, edits=mt.edit.Skip("2")).logits[:, WIDTH - 1 : -1], **NEAR)


def test_an_exception_of_a_users_function_passes_as_it_is() -> None:
    model = opened("llama")

    def fail(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), model.editing(mt.edit.Skip("1"), mt.edit.Apply("2.mlp_out", fail)):
        generate(model, prompt())
