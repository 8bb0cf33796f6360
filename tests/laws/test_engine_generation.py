"""Edits of a generation follow its prompt, however many forwards read it, and are refused where that is unclear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor
from transformers import DynamicCache

import microtome as mt

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
RULES = ("@prompt", "@generated", "@last", "@-1", "@-2", "@1", "")
OTHERWISE: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 3},
    "chunks, static": {"prefill_chunk_size": 3, "cache_implementation": "static", "disable_compile": True},
    "own draft": {"assistant_early_exit": 1},
}
NEAR: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


def prompt(n: int = 9, seed: int = 0) -> Tensor:
    """A prompt that repeats itself, so that looking it up finds candidates."""
    half = torch.randint(5, families.VOCAB, (1, (n + 1) // 2), generator=torch.Generator().manual_seed(seed))
    return torch.cat([half, half], dim=1)[:, :n]


def opened(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name), prove=False)


def push(model: mt.Model, rule: str, strength: float = 3.0) -> mt.edit.Edit:
    direction = torch.randn(model.anatomy.d_model, generator=torch.Generator().manual_seed(2))
    return mt.edit.Add(f"1.resid_post{rule}", direction, strength=strength)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mistral", "bloom"])
def test_a_prompt_read_in_parts_is_edited_like_one_read_at_once(name: str) -> None:
    hf = families.build(name)
    model = mt.open(hf, prove=False)
    otherwise = {how: options for how, options in OTHERWISE.items() if "static" not in how or hf._can_compile_fullgraph}
    if name != "llama-gqa":
        del otherwise["own draft"]  # which leaves out layers as the configuration of Llama says
    plain = model.hf.generate(prompt(), **GREEDY).tolist()
    changed = 0
    cuts = [
        mt.edit.KnockOut("*.attn.scores@-1", keys="0-2"),
        mt.edit.KnockOut("1.attn.scores@generated", keys="4"),
        mt.edit.Scale("1.attn.k@-2", -3.0),
        mt.edit.Noise("0.resid_post@2-7", std=2.0),
    ]
    for edit in [*(push(model, rule) for rule in RULES), *cuts]:
        with model.editing(edit):
            expected = model.hf.generate(prompt(), **GREEDY).tolist()
            for how, options in otherwise.items():
                assert model.hf.generate(prompt(), **GREEDY, **options).tolist() == expected, (edit, how)
        changed += expected != plain
    assert changed >= 7  # of 11: the edits are large enough to be missed


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mistral"])
def test_chunks_of_padded_rows_are_edited_like_each_row(name: str) -> None:
    model = opened(name)
    rows = [prompt(n, seed=n)[0].tolist() for n in (9, 4, 7)]
    batch = model.to_batch(rows, "left")
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    edits: list[mt.edit.Edit] = [push(model, rule) for rule in RULES]
    edits += [mt.edit.KnockOut("*.attn.scores@-1,-2", keys="-3"), mt.edit.Scale("1.attn.v@-3", 4.0)]
    plain = torch.cat(model.hf.generate(torch.tensor([rows[-1]]), **options).logits)
    changed = 0
    for edit in edits:
        with model.editing(edit):
            together = model.hf.generate(
                batch.tokens, attention_mask=batch.mask.long(), prefill_chunk_size=2, **options
            ).logits
            for i, tokens in enumerate(rows):
                alone = torch.cat(model.hf.generate(torch.tensor([tokens]), **options).logits)
                torch.testing.assert_close(torch.stack(together, 1)[i], alone, **NEAR)
        changed += float((plain - alone).abs().max()) > 1000 * NEAR["atol"]
    assert changed >= 8  # of 9; a window hides position 1 of the last row


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize(
    "edit",
    [
        mt.edit.Mean("1.resid_post@prompt"),
        mt.edit.Set("1.resid_post@prompt", torch.ones(9, 40)),
        mt.edit.Scale("1.attn.z[0]", torch.ones(1, 9, 1, 1)),
        mt.edit.Apply("1.mlp_out", function=lambda x: x.cumsum(1)),
    ],
)
def test_edits_that_need_all_positions_at_once_are_refused_in_parts(how: dict[str, Any], edit: mt.edit.Edit) -> None:
    model = opened()
    with pytest.raises(mt.errors.EditError, match=r"in parts, or several new tokens at once"), model.editing(edit):
        model.hf.generate(prompt(), **GREEDY, **how)


def test_another_models_candidates_are_checked_under_edits() -> None:
    model, helper = opened(), families.build("llama-mha")
    for rule in RULES:
        with model.editing(push(model, rule)):
            expected = model.hf.generate(prompt(), **GREEDY).tolist()
            assert model.hf.generate(prompt(), **GREEDY, assistant_model=helper).tolist() == expected, rule


@torch.no_grad()
def test_a_prompt_that_follows_a_filled_cache_is_the_whole_prompt() -> None:
    model = opened()
    for rule in RULES:
        with model.editing(push(model, rule)):
            expected = model.hf.generate(prompt(), **GREEDY).tolist()[0][9:]
            cache = DynamicCache()
            model.hf(prompt()[:, :4], past_key_values=cache)
            if rule in ("@-1", "@-2", "@last"):
                continue  # the first forward was a prompt with a last token of its own
            for own in (cache, copy.deepcopy(cache)):
                kept = copy.deepcopy(own)
                assert model.hf.generate(prompt(), past_key_values=own, **GREEDY).tolist()[0][9:] == expected, rule
                mask = torch.ones(1, 9, dtype=torch.long)
                rest = model.hf.generate(prompt()[:, 4:], attention_mask=mask, past_key_values=kept, **GREEDY)
                assert rest.tolist()[0][5:] == expected, rule


@torch.no_grad()
def test_caches_of_two_prompts_keep_their_own() -> None:
    model = opened()
    one, other = prompt(9), prompt(5, seed=3)
    token = torch.tensor([[7]])
    for rule in RULES:
        with model.editing(push(model, rule)):
            alone = model.hf(one, use_cache=True).past_key_values
            expected = model.hf(token, past_key_values=alone).logits
            first = model.hf(one, use_cache=True).past_key_values
            second = model.hf(other, use_cache=True).past_key_values
            for cache in (copy.deepcopy(first), first):
                torch.testing.assert_close(model.hf(token, past_key_values=cache).logits, expected, **NEAR)
            assert int(second.get_seq_length()) == 5


def other_prompt(model: Any, input_ids: Tensor, **more: Any) -> Tensor:
    model(input_ids=input_ids.flip(1))
    return input_ids


def other_cache(model: Any, input_ids: Tensor, **more: Any) -> Tensor:
    for _ in range(2):
        out = model(input_ids=input_ids, past_key_values=DynamicCache())
    model(input_ids=input_ids[:, -1:], past_key_values=out.past_key_values)
    return input_ids


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale runs the model on another prompt"),
        ({"guidance_scale": 1.5, "negative_prompt_ids": prompt(4, seed=5)}, "guidance_scale runs the model on another"),
        ({"generation_config": "guidance"}, "guidance_scale runs the model on another prompt"),
        ({"token_healing": True}, "token_healing runs the model on another prompt"),
        ({"cache_implementation": "paged"}, "cache_implementation runs the model on another prompt"),
        ({"custom_generate": other_prompt}, "reads other tokens than its prompt"),
        ({"custom_generate": other_cache}, "reads other tokens than its prompt"),
    ],
)
def test_generations_over_other_prompts_are_refused(options: dict[str, Any], text: str) -> None:
    model = opened()
    if options.get("generation_config") == "guidance":
        config = copy.deepcopy(model.hf.generation_config)
        config.guidance_scale = 1.5
        options = {"generation_config": config}
    with pytest.raises(mt.errors.EditError, match=text), model.editing(push(model, "@last")):
        model.hf.generate(prompt(), **GREEDY, **options)


def test_pads_that_are_unclear_in_parts_are_refused() -> None:
    model = opened()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt()], dim=1)
    both = torch.cat([padded, prompt(12, seed=4)])
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    with model.editing(push(model, "@1")):
        inferred = torch.cat(model.hf.generate(both, **options).logits[:1])
        mask = (both != 0).long()
        given = torch.cat(model.hf.generate(both, attention_mask=mask, prefill_chunk_size=5, **options).logits[:1])
        torch.testing.assert_close(inferred, given, **NEAR)
        with pytest.raises(mt.errors.EditError, match=r"which tokens of this prompt are pads is unclear"):
            model.hf.generate(both, prefill_chunk_size=5, **options)


# ------------------------------------------------------------------------------------- masks of plain forwards


def masks(model: mt.Model, mask: Tensor, *, additive: bool) -> Any:
    """The masks of four axes that a family makes of one of two: one by kind of layer where there are several."""
    n, low = mask.shape[1], torch.finfo(torch.float32).min
    near = torch.ones(n, n, dtype=torch.bool).triu(1 - (getattr(model.hf.config, "sliding_window", None) or n))
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    found = [m if not additive else torch.zeros(m.shape).masked_fill(~m, low) for m in (allowed & near, allowed)]
    names = ("sliding_attention", "full_attention")
    return dict(zip(names, found, strict=True)) if getattr(model.hf.config, "layer_types", None) else found[1]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_four_axes_counts_positions_like_one_of_two(name: str, side: str) -> None:
    model = opened(name)
    batch = model.to_batch([prompt(n, seed=n)[0].tolist() for n in (8, 5)], side)  # pyright: ignore[reportArgumentType]
    mask, where = batch.mask.long(), {"position_ids": (batch.mask.long().cumsum(1) - 1).clamp(min=0)}
    for rule in ("@0", "@-1", "@last", "@1-3"):
        edit = push(model, rule)
        expected = model.run(batch, edits=edit).logits[batch.mask]
        assert float((model.run(batch).logits[batch.mask] - expected).abs().max()) > 0.1
        with model.editing(edit):
            forms = {
                "two axes": model.hf(batch.tokens, attention_mask=mask, **where),
                "boolean": model.hf(batch.tokens, attention_mask=masks(model, mask, additive=False), **where),
                "additive": model.hf(batch.tokens, attention_mask=masks(model, mask, additive=True), **where),
            }
            if name != "gpt2":
                forms["by position"] = model.hf(batch.tokens, mask, where["position_ids"])
        for form, out in forms.items():
            torch.testing.assert_close(out.logits[batch.mask], expected, **NEAR, msg=lambda m, f=form: f"{f}: {m}")


def prefix_sees_all(n: int) -> Tensor:
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    allowed[:3, :3] = True
    return allowed[None, None]


def pads_see_themselves(n: int) -> Tensor:
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    allowed[:, :3] = False
    return (allowed | torch.eye(n, dtype=torch.bool))[None, None]


def two_texts(n: int) -> Tensor:
    text = torch.arange(n) < n // 2
    return (torch.ones(n, n, dtype=torch.bool).tril() & (text[:, None] == text))[None, None]


UNCLEAR = {
    "prefix": prefix_sees_all(8),
    "hole": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]),
    "pads": pads_see_themselves(8),
    "packed": two_texts(8),
}


@pytest.mark.parametrize("mask", UNCLEAR.values(), ids=UNCLEAR)
def test_a_mask_that_leaves_positions_unclear_is_refused(mask: Tensor) -> None:
    model = opened()
    with (
        pytest.raises(mt.errors.EditError, match="leaves unclear which tokens are pads"),
        model.editing(push(model, "@1")),
    ):
        model.hf(prompt(8), attention_mask=mask)


def test_a_call_of_a_part_of_the_model_is_refused_while_it_is_edited() -> None:
    model = opened()
    with model.editing(push(model, "@-1")):
        model.hf(prompt(5))
        with pytest.raises(mt.errors.EditError, match="call of a part of the model.*call the model itself"):
            model.hf.model(prompt(9))
