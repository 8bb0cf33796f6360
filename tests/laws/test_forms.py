"""Models of any form: what one forward shows of a block, what is left out and why, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tests import families
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.anatomy import Site, _anatomy
from microtome.anatomy._flow import multiples
from microtome.model._proof import probe

configs = script("tools/family_configs.py")


@cache
def opened(family: str) -> mt.Model:
    return mt.open(configs.build(family))


def ids(rows: int = 2, length: int = 40) -> Tensor:
    return configs.prompt(rows, length)


def sites(model: mt.Model, layer: int) -> set[str]:
    return {site.name for site in model.anatomy.hook_points if site.layer == layer}


def plain(hf: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits


# ------------------------------------------------------------------------------------------------- the form of a block


def test_norms_behind_the_sums_of_a_decoder_are_found_by_what_they_read() -> None:
    model = opened("bart")
    run = model.run(ids(), ["*.resid_mid", "*.attn_out", "*.resid_pre", "*.mlp_out", "*.resid_post"])
    assert model.anatomy.parts.form == "post_norm"
    for i, layer in enumerate(model.anatomy.parts.layers):
        first, second = (model.hf.get_submodule(path or "") for path in (layer.attn_post_norm, layer.mlp_post_norm))
        with torch.no_grad():
            mid = first(run[f"{i}.resid_pre"] + run[f"{i}.attn_out"])
            post = second(run[f"{i}.resid_mid"] + run[f"{i}.mlp_out"])
        torch.testing.assert_close(run[f"{i}.resid_mid"], mid, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run[f"{i}.resid_post"], post, rtol=1e-4, atol=1e-5)


def test_a_mixer_beside_attention_is_a_branch_of_its_own_with_its_own_factor() -> None:
    model = opened("falcon_h1")
    run = model.run(ids(), ["*.resid_mid", "*.attn_out", "*.mixer_out", "*.resid_pre"])
    mixed, attended = run["*.mixer_out"], run["*.attn_out"]
    torch.testing.assert_close(run["*.resid_mid"], run["*.resid_pre"] + attended + mixed, rtol=1e-4, atol=1e-5)
    assert mixed.norm() > 0.01
    assert attended.norm() > 0.01
    own = model.hf.config.attention_out_multiplier
    assert model.anatomy.parts.layers[0].attn_by == pytest.approx(own, rel=1e-4)


def test_blocks_without_attention_have_a_mixer() -> None:
    model = opened("mamba2")
    assert sites(model, 0) == {"resid_pre", "mixer.in", "mixer_out", "resid_post"}
    run = model.run(ids(), ["*.resid_pre", "*.mixer_out", "*.resid_post"])
    torch.testing.assert_close(run["*.resid_post"], run["*.resid_pre"] + run["*.mixer_out"])
    with pytest.raises(mt.errors.SiteError, match=r"no site 1.attn.q .*no attention: see mixer.in and mixer_out"):
        model.run(ids(), "1.attn.q")
    with pytest.raises(mt.errors.SiteError, match=r'cannot be asked "attention_knockout", which needs attn.scores'):
        mt.explain.attention_knockout(model, ids(1), keys=(0, 1))


def test_a_hybrid_has_attention_where_it_attends() -> None:
    model = opened("qwen3_5")
    kinds = model.hf.config.get_text_config().layer_types
    assert len(set(kinds)) == 2
    for i, kind in enumerate(kinds):
        assert ("attn.pattern" in sites(model, i)) == (kind == "full_attention")
        assert ("mixer_out" in sites(model, i)) == (kind != "full_attention")
    assert [check.where for check in model.proof if check.where.endswith(".attn.mix")]  # its heads are gated


def test_a_fused_projection_of_gates_and_neurons_is_split() -> None:
    model = opened("modernbert-decoder")
    run = model.run(ids(), ["1.mlp.gate", "1.mlp.up", "1.mlp.post"])
    act = model.hf.get_submodule(model.anatomy.parts.layers[1].act or "")
    torch.testing.assert_close(run["1.mlp.post"], act(run["1.mlp.gate"]) * run["1.mlp.up"])


def test_the_layout_of_a_fused_projection_is_tried() -> None:
    model = opened("gpt_neox_japanese")
    assert model.anatomy.parts.family.fused_qkv == "per_head"
    run = model.run(ids(), ["0.attn.in", "0.attn.v"])
    expected = torch.einsum("bpm,hmd->bphd", run["0.attn.in"], model.layers[0].W_V)
    torch.testing.assert_close(run["0.attn.v"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("factor", "why"), [(1.0, "passes the block by"), (2.0, "never seen in a forward")])
def test_a_block_is_passed_by_only_where_the_stream_stays_what_it_is(factor: float, why: str) -> None:
    hf = families.build("llama-gqa")
    block: Any = hf.model.layers[1]
    kind = type(block)
    block.__class__ = type("Past", (kind,), {"__call__": lambda self, x, *args, **kwargs: x * factor})
    model = mt.open(hf)
    assert not sites(model, 1)
    for name in ("resid_post", "attn.pattern", "mlp_out"):
        assert why in model.anatomy.missing[Site(name, 1)]
    run = model.run(ids(), ["0.resid_post", "2.resid_pre"])
    torch.testing.assert_close(run["2.resid_pre"], factor * run["0.resid_post"])


def with_a_vector_behind_the_mlp() -> Any:
    hf = families.build("llama-gqa")
    block = hf.model.layers[1]
    block.extra = torch.nn.Parameter(torch.randn(families.D_MODEL, generator=torch.Generator().manual_seed(1)))
    block.register_forward_hook(lambda module, args, output: output + module.extra)
    return hf


@pytest.mark.parametrize(("family", "layer", "branch"), [("gpt_neox_japanese", 2, "attn"), ("", 1, "mlp")])
def test_a_vector_that_is_added_besides_is_a_bias_of_the_branch(family: str, layer: int, branch: str) -> None:
    model = opened(family) if family else mt.open(with_a_vector_behind_the_mlp())
    vector = next(p for name, p in model.hf.named_parameters() if name.endswith(("dense_bias", "extra"))).detach()
    out, before, after = f"{layer}.{branch}_out", f"{layer}.resid_mid", f"{layer}.resid_post"
    if branch == "attn":
        before, after = f"{layer}.resid_pre", f"{layer}.resid_mid"
    run = model.run(ids(), [out, before, after])
    torch.testing.assert_close(run[out], run[after] - run[before], rtol=1e-4, atol=1e-5)
    weights = model.layers[layer]
    bias = weights.b_O if branch == "attn" else weights.b_out
    assert bias is not None
    torch.testing.assert_close(bias, vector)
    zeroed = model.run(ids(), [before, after], edits=mt.edit.Zero(out))
    torch.testing.assert_close(zeroed[after], zeroed[before], rtol=1e-4, atol=1e-5)
    found = mt.explain.contributions(model, ids(1)[0].tolist(), answer=11, foil=23)
    logits = run.logits[0, -1]
    parts = sum(float(found[name].sum()) for name in found.attrs["parts"])
    assert parts == pytest.approx(float(logits[11] - logits[23]), abs=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("name", ["attn.q", "attn.k", "attn.v"])
def test_attention_in_blocks_shows_no_part_of_its_products_as_the_whole(name: str) -> None:
    model = opened("big_bird")  # an edit of the keys of its first product leaves those of all others as they are
    with pytest.raises(mt.errors.SiteError, match=rf"no site 0.{name} .* where \[2, 64, 4, 8\] is expected"):
        model.run(ids(2, 64), edits=mt.edit.Zero(f"0.{name}"))
    assert "attn.z" in sites(model, 0)


def test_a_projection_is_what_is_inside_a_module_that_only_holds_it() -> None:
    hf = families.build("llama-gqa")
    expected = plain(hf, ids())

    class Holder(torch.nn.Module):
        def __init__(self, linear: torch.nn.Module) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    for block in hf.model.layers:
        for owner, names in ((block.self_attn, ("q_proj", "o_proj")), (block.mlp, ("up_proj", "down_proj"))):
            for name in names:
                setattr(owner, name, Holder(getattr(owner, name)))
    model, like = mt.open(hf), mt.open(families.build("llama-gqa"))
    assert set(model.anatomy.hook_points) == set(like.anatomy.hook_points)
    assert set(model.anatomy.unproven) == set(like.anatomy.unproven)
    assert torch.equal(model.run(ids(), "*.attn.result").logits, expected)
    assert torch.equal(model.layers[1].W_Q, like.layers[1].W_Q)


def test_a_soft_cap_is_found_whatever_its_name() -> None:
    model = opened("recurrent_gemma")
    assert model.anatomy.logit_softcap == model.hf.config.logits_soft_cap
    run = model.run(ids(), f"{model.anatomy.n_layers - 1}.resid_post")
    last = run[f"{model.anatomy.n_layers - 1}.resid_post"]
    torch.testing.assert_close(model.unembed(last), run.logits, rtol=1e-4, atol=1e-4)


def test_a_stream_of_lanes_is_seen_side_by_side() -> None:
    model, tokens = opened("gemma3n_text"), ids()
    lanes = model.hf.config.altup_num_inputs
    whole = model.run(tokens, "1.resid_post")
    assert whole["1.resid_post"].shape[-1] == lanes * model.anatomy.d_model
    assert whole.dataset()["resid_post"].sizes["d_model"] == lanes * model.anatomy.d_model
    zeroed = model.run(tokens, edits=[mt.edit.Zero("1.resid_post@5")]).logits

    def silence(module: Any, args: Any, output: Tensor) -> Tensor:
        output[:, :, 5] = 0.0
        return output

    handle = model.hf.get_submodule(model.anatomy.parts.layers[1].block).register_forward_hook(silence)
    try:
        expected = plain(model.hf, tokens)
    finally:
        handle.remove()
    torch.testing.assert_close(zeroed, expected, rtol=1e-5, atol=1e-5)
    assert (expected - whole.logits).abs().max() > 0.01
    with pytest.raises(mt.errors.SiteError, match="a stream of 128 is not the sum of branches of 32"):
        mt.explain.contributions(model, tokens[:1])


def test_heads_that_differ_between_layers_are_those_of_each_layer() -> None:
    model = opened("laguna")
    counts = [model.anatomy.size(Site("attn.z", i), "head") for i in range(model.anatomy.n_layers)]
    assert len(set(counts)) > 1
    run = model.run(ids(), "*.attn.z")
    assert [run[f"{i}.attn.z"].shape[2] for i in range(len(counts))] == counts
    with pytest.raises(mt.errors.SiteError, match=r'layers of "\*.attn.z" have other shapes than one another'):
        run["*.attn.z"]
    with pytest.raises(mt.errors.SiteError, match=r"one table of all layers, whose heads differ in number"):
        mt.measure(model, "induction")


# ----------------------------------------------------------------------------------------------- what the probe decides


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_only_where_they_stay_what_they_are(side: Any) -> None:
    model = opened("bart")  # it takes no positions, so that pads before a row move it
    tokens = ids()
    rows = [tokens[0], tokens[1, :9]]
    assert model.anatomy.padding == ("right",)
    if side == "left":
        with pytest.raises(mt.errors.PromptError, match=r'change where they are padded on the left.*padding="right"'):
            model.run(rows, padding=side)
    else:
        alone = model.run(rows[1]).logits
        torch.testing.assert_close(model.run(rows).logits[1:, :9], alone, rtol=1e-4, atol=1e-5)


def test_keys_of_equal_tokens_tie_in_the_probe() -> None:
    """A mask of the 8 best keys, of which equal ones are chosen from behind in rows of more than 20 tokens."""
    hf = families.build("llama-gqa")
    hf.config.keep_topk_keys = 8

    def best(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        worth, n = kwargs["hidden_states"][..., 0], kwargs["hidden_states"].shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if (mask := kwargs["attention_mask"]) is not None:
            seen = mask if mask.dtype == torch.bool else mask == 0
        worth = torch.where(seen, worth[:, None, None], -torch.inf)
        order = worth.sort(dim=-1, descending=True, stable=True).indices
        if n > 20:
            order = n - 1 - worth.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, order[..., :8], True) & seen
        return args, kwargs | {"attention_mask": torch.zeros_like(worth).masked_fill(~kept, -1e30)}

    hf.model.layers[0].self_attn.register_forward_pre_hook(best, with_kwargs=True)
    model = mt.open(hf)
    short = ids(1, 16).repeat_interleave(2, 1)[:, :20]
    assert (plain(hf, torch.cat([short, short], 1))[:, :20] - plain(hf, short)).abs().max() > 0.01
    assert model.anatomy.causal  # what follows changes nothing, but how much does
    assert model.anatomy.padding == ()
    assert [check.note[:40] for check in model.proof if check.where == "causal"] == [
        "how long a row is changes its logits (by"
    ]
    with pytest.raises(mt.errors.PromptError, match="change where they are padded"):
        model.run([short[0], short[0, :9]])


@pytest.mark.parametrize(("name", "looks_back"), [("llama-gqa", True), ("bert", False)])
def test_whether_a_model_looks_back_alone_is_tried(
    name: str, looks_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_anatomy, "_looks_back", lambda *args: not looks_back)
    assert mt.open(families.build(name)).anatomy.causal == looks_back


def test_the_probe_goes_beyond_short_windows_and_says_which_it_does_not() -> None:
    assert probe(families.build("mistral")).shape[1] > families.WINDOW
    config = transformers.MistralConfig(**families._CONFIGS["mistral"][1] | {"sliding_window": 4096})
    proof = mt.open(families.made(config)).proof
    assert [check.note for check in proof if check.where == "long prompts"] == [
        "the probe has 8 tokens, and sliding_window is 4,096"
    ]


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_model_that_answers_otherwise_each_time_is_refused() -> None:
    hf = families.build("llama-gqa")
    own = hf.model.layers[1].mlp.forward
    hf.model.layers[1].mlp.forward = lambda x: own(x) * (1 + 0.1 * torch.rand(1))
    with pytest.raises(mt.errors.ModelUnsupported, match="changes its answer between two equal runs"):
        mt.open(hf)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        (
            "cpmant",
            r"\[2, 12, 32\] where .* is expected, 12 positions for 8 tokens",
        ),  # four vectors before every prompt
        ("prophetnet", r"\[2, 24, 32\] where .* is expected, 24 positions for 8 tokens"),  # two more streams behind it
        ("xlnet", r"\[8, 2, 32\] where .* is expected, so that positions come before rows"),
    ],
)
def test_a_stream_of_other_positions_than_the_prompt_is_refused(family: str, why: str) -> None:
    with pytest.raises(mt.errors.ProofError, match=rf"stream of .* is not proven.*its shape is {why}"):
        mt.open(configs.build(family))


def test_a_stream_that_does_not_give_the_logits_is_refused() -> None:
    hf = families.build("llama-gqa")
    head = hf.lm_head.forward
    skip: dict[str, Tensor] = {}
    hf.model.embed_tokens.register_forward_hook(lambda module, args, output: skip.update(x=output))
    hf.lm_head.forward = lambda x: head(x + skip["x"])
    with pytest.raises(mt.errors.ProofError, match=r'stream of .* fails "6 unembed" at resid_post'):
        mt.open(hf)


def test_numbers_by_which_terms_sum() -> None:
    draw = torch.Generator().manual_seed(0)
    one, two, other = (torch.randn(4, 5, generator=draw) for _ in range(3))
    assert multiples(0.25 * one - two, one, two) == pytest.approx([0.25, -1.0])
    assert multiples(one + 1e-5 * other, one) == [1.0]
    assert multiples(one + 0.01 * other, one) is None
    assert multiples(one, two) is None


@pytest.mark.parametrize("family", ["minicpm3", "hyperclovax", "bart"])
def test_forms_are_learned_from_coarse_numbers_too(family: str) -> None:
    coarse = mt.open(configs.build(family).to(torch.bfloat16))
    assert set(coarse.anatomy.hook_points) == set(opened(family).anatomy.hook_points)
    assert (coarse.anatomy.why_no_sum is None) == (opened(family).anatomy.why_no_sum is None)


def test_experts_whose_sum_is_not_proven_are_not_shown() -> None:
    model = opened("longcat_flash")  # its mixture skips across a second attention and MLP
    for name in ("mlp.router", "mlp.experts", "mlp.experts.post", "resid_mid", "mlp_out"):
        assert Site(name, 1) not in model.anatomy.hook_points, name
    for name in ("mlp.router", "mlp.experts.post"):
        assert "mlp.experts is missing there" in model.anatomy.missing[Site(name, 1)]


def test_attention_of_no_known_form_is_not_said_to_be_none() -> None:
    assert opened("deepseek_v4").anatomy.missing[Site("attn.q", 0)].startswith("its attention has no known form")
    assert opened("mamba2").anatomy.missing[Site("attn.q", 0)].startswith("the block has no attention")
