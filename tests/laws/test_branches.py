"""Branches and MLPs of unusual forms: what one forward shows of them, against plain hooks and plain modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor, nn

import microtome as mt

configs = script("tools/family_configs.py")
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@cache
def opened(family: str) -> mt.Model:
    return mt.open(configs.build(family))


def ids() -> Tensor:
    return configs.prompt(2, 20)


@contextmanager
def hooked(model: mt.Model, path: str, before: Any = None, after: Any = None) -> Iterator[None]:
    module = model.hf.get_submodule(path)
    handle = module.register_forward_pre_hook(before) if before else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def logits(model: mt.Model) -> Tensor:
    with torch.no_grad():
        return model.hf(input_ids=ids()).logits


# ------------------------------------------------------------------------------------------------------ parts of MLPs


@pytest.mark.parametrize(
    ("family", "down", "read"),
    [
        ("ctrl", "transformer.h.1.ffn.2", {"up": "transformer.h.1.ffn.0"}),
        (
            "xlstm",
            "backbone.blocks.1.ffn.proj_down",
            {"gate": "backbone.blocks.1.ffn.proj_up_gate", "up": "backbone.blocks.1.ffn.proj_up"},
        ),
        ("rwkv", "rwkv.blocks.1.feed_forward.value", {"up": "rwkv.blocks.1.feed_forward.key"}),
    ],
)
def test_the_parts_of_an_mlp_are_found_by_what_passed_between_them(
    family: str, down: str, read: dict[str, str]
) -> None:
    model = opened(family)
    layer = model.anatomy.parts.layers[1]
    assert layer.down == down
    assert {name: path for name in ("gate", "up") if (path := getattr(layer, name)) is not None} == read
    zeroed = model.run(ids(), edits=[mt.edit.Zero("1.mlp.post[3,5]")]).logits

    def silence(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., [3, 5]] = 0.0
        return (x,)

    with hooked(model, down, before=silence):
        expected = logits(model)
    torch.testing.assert_close(zeroed, expected, **NEAR)
    assert (expected - logits(model)).abs().max() > 1e-3


def test_a_gate_on_what_neurons_write_is_part_of_what_the_mlp_writes() -> None:
    model = opened("rwkv")
    got: list[Tensor] = []
    with hooked(model, "rwkv.blocks.1.feed_forward.receptance", after=lambda m, args, output: got.append(output)):
        run = model.run(ids(), ["1.mlp.pre", "1.mlp.post", "1.mlp_out"])
    torch.testing.assert_close(run["1.mlp.post"], run["1.mlp.pre"].relu().square(), **NEAR)
    written = run["1.mlp.post"] @ model.layers[1].W_out
    torch.testing.assert_close(run["1.mlp_out"], written * got[0].sigmoid(), **NEAR)
    assert "multiplied by a gate" in model.anatomy.unproven["1.sum"]
    with pytest.raises(mt.errors.SiteError, match="no W_in in layer 1"):  # what it reads is mixed with the token before
        _ = model.layers[1].W_in


def test_a_factor_inside_the_activation_is_measured() -> None:
    model = opened("falcon_h1")
    by = model.hf.config.mlp_multipliers[0]
    run = model.run(ids(), ["1.mlp.gate", "1.mlp.up", "1.mlp.post"])
    act = model.hf.get_submodule(model.anatomy.parts.layers[1].act or "")
    torch.testing.assert_close(run["1.mlp.post"], act(run["1.mlp.gate"] * by) * run["1.mlp.up"], **NEAR)
    check = next(c for c in model.proof if c.where == "1.mlp.post" and c.identity == "7 weights")
    assert check.status == "holds"
    assert f"of {by:.6g} times" in check.note


# ------------------------------------------------------------------------------------------------- what branches read


def test_a_norm_is_read_times_a_number() -> None:
    model = opened("falcon_h1")
    norm = model.layers[1].attn_norm
    assert norm is not None
    assert norm.norm.times == pytest.approx(model.hf.config.attention_in_multiplier, rel=1e-5)
    run = model.run(ids(), ["1.resid_pre", "1.attn.in", "1.attn.scale"])
    torch.testing.assert_close(norm.apply(run["1.resid_pre"]), run["1.attn.in"], **NEAR)
    doubled = model.run(ids(), ["1.attn.in"], edits=[mt.edit.Scale("1.attn.scale", 2.0)])
    torch.testing.assert_close(doubled["1.attn.in"] * 2, run["1.attn.in"], **NEAR)


def test_a_gate_around_a_norm_leaves_its_scale() -> None:
    model = opened("axk2")
    run = model.run(ids(), ["1.resid_pre", "1.resid_mid", "1.attn.scale", "1.mlp.scale", "1.attn.in"])
    for x, scale in (("1.resid_pre", "1.attn.scale"), ("1.resid_mid", "1.mlp.scale")):
        expected = (run[x].pow(2).mean(-1) + model.hf.config.rms_norm_eps).sqrt()
        torch.testing.assert_close(run[scale], expected, **NEAR)
    with torch.no_grad():
        read = model.hf.get_submodule("model.layers.1.input_layernorm")(run["1.resid_pre"])
    torch.testing.assert_close(run["1.attn.in"], read)
    with pytest.raises(mt.errors.SiteError, match="no attn_norm in layer 1 .*multiplied by a gate"):
        _ = model.layers[1].attn_norm


# ------------------------------------------------------------------------------------------- what branches are added to


def test_branches_are_added_to_the_norm_of_the_stream() -> None:
    model, config = opened("minimax"), opened("minimax").hf.config
    run = model.run(ids(), ["*.resid_pre", "*.resid_mid", "*.resid_post", "*.mlp_out", "0.mixer_out", "1.attn_out"])
    factors = {0: config.linear_attn_alpha_factor, 1: config.full_attn_alpha_factor}
    for i, name in ((0, "mixer_out"), (1, "attn_out")):
        block = model.hf.get_submodule(f"model.layers.{i}")
        with torch.no_grad():
            first = block.input_layernorm(run[f"{i}.resid_pre"]) * factors[i]
            second = block.post_attention_layernorm(run[f"{i}.resid_mid"]) * config.mlp_alpha_factor
        torch.testing.assert_close(run[f"{i}.resid_mid"], first + run[f"{i}.{name}"], **NEAR)
        torch.testing.assert_close(run[f"{i}.resid_post"], second + run[f"{i}.mlp_out"], **NEAR)
        assert run[f"{i}.{name}"].norm() > 0.01
    assert "the stream itself is" in model.anatomy.unproven["1.sum"]


def test_a_block_may_norm_the_stream_before_any_branch() -> None:
    model = opened("rwkv")
    run = model.run(ids(), ["0.resid_pre", "0.resid_mid", "0.mixer_out", "1.resid_pre", "1.resid_mid", "1.mixer_out"])
    first, second = model.anatomy.parts.layers[:2]
    assert (first.mid_base, second.mid_base) == ("rwkv.blocks.0.pre_ln", None)
    with torch.no_grad():
        base = model.hf.get_submodule("rwkv.blocks.0.pre_ln")(run["0.resid_pre"])
    torch.testing.assert_close(run["0.resid_mid"], base + run["0.mixer_out"], **NEAR)
    torch.testing.assert_close(run["1.resid_mid"], run["1.resid_pre"] + run["1.mixer_out"], **NEAR)


def test_what_is_added_behind_the_last_branch_is_something_else() -> None:
    model = opened("gemma4_text")
    got: list[Tensor] = []
    path = "model.layers.1.per_layer_input_gate"
    with hooked(model, path, before=lambda m, args: got.append(args[0].clone())):
        run = model.run(ids(), ["1.resid_mid", "1.mlp_out", "1.resid_post"])
    torch.testing.assert_close(got[0], run["1.resid_mid"] + run["1.mlp_out"], **NEAR)
    assert (run["1.resid_post"] - got[0]).abs().max() > 0.01
    assert model.anatomy.parts.layers[1].until == path
    with pytest.raises(mt.errors.SiteError, match="something else in layer 0: more is added behind its branches"):
        mt.explain.contributions(model, ids()[:1], answer=7, foil=8)


def test_the_sum_of_stream_and_branch_is_not_taken_for_what_a_branch_adds() -> None:
    model = opened("zaya")  # a module of its own scales the stream and the branch, and gives their sum
    run = model.run(ids(), ["*.resid_post"])
    assert "*.resid_post" in run
    for i, layer in enumerate(model.anatomy.parts.layers):
        assert layer.mlp_writes != f"model.layers.{i}.post_mlp_residual_scale"
        assert mt.anatomy.Site("mlp_out", i) not in model.anatomy.hook_points


def test_what_is_added_may_be_summed_with_a_mixture_before() -> None:
    model = opened("gemma4")
    layer = model.anatomy.parts.layers[1]
    assert layer.mlp_writes == "model.language_model.layers.1.post_feedforward_layernorm"
    assert layer.experts == "model.language_model.layers.1.experts"
    got: list[Tensor] = []
    with hooked(model, "model.language_model.layers.1.experts", after=lambda m, args, output: got.append(output)):
        run = model.run(ids(), ["1.mlp.experts", "1.resid_mid", "1.mlp_out"])
    torch.testing.assert_close(run["1.mlp.experts"].sum(2).reshape(got[0].shape), got[0], **NEAR)
    zeroed = model.run(ids(), edits=[mt.edit.Zero("1.mlp.experts")]).logits
    with hooked(model, layer.experts, after=lambda m, args, output: torch.zeros_like(output)):
        expected = logits(model)
    effect = float((expected - logits(model)).abs().max())
    assert effect > 1e-3
    assert (zeroed - expected).abs().max() < 1e-2 * effect  # a norm behind it enlarges what rounding leaves


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_attention_that_a_mixer_reads_adds_nothing_to_the_stream(family: str) -> None:
    model = opened(family)
    layer = model.anatomy.parts.layers[1]
    assert layer.mixer == "model.layers.1.mamba_decoder.mamba"
    sites = ["embed", "1.resid_pre", "1.resid_post", "1.mixer_out", "1.attn.in", "1.attn.scale", "1.attn.result"]
    run = model.run(ids(), sites)
    torch.testing.assert_close(run["1.resid_post"], run["1.resid_pre"] + run["1.mixer_out"], **NEAR)
    both = torch.cat([run["1.resid_pre"], run["embed"]], dim=-1)  # as wide as two streams
    torch.testing.assert_close(run["1.attn.scale"], (both.pow(2).mean(-1) + model.hf.config.rms_norm_eps).sqrt())
    norm = model.layers[1].attn_norm
    assert norm is not None
    torch.testing.assert_close(run["1.attn.in"], norm.apply(both), **NEAR)
    assert both.shape[-1] in run.dataset()["attn.in"].shape
    with pytest.raises(mt.errors.SiteError, match="no attention that adds to the stream: its mixer reads what it"):
        model.run(ids(), "1.attn_out")
    zeroed = model.run(ids(), edits=[mt.edit.Zero("1.attn.in@4")]).logits

    def silence(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = kwargs["hidden_states"].clone()
        x[:, 4] = 0.0
        return args, kwargs | {"hidden_states": x}

    handle = model.hf.get_submodule(layer.attn or "").register_forward_pre_hook(silence, with_kwargs=True)
    try:
        expected = logits(model)
    finally:
        handle.remove()
    torch.testing.assert_close(zeroed, expected, **NEAR)


def test_a_branch_may_pass_through_another_module_before_it_is_added() -> None:
    model = opened("inkling_text")
    run = model.run(ids(), ["1.resid_pre", "1.resid_mid", "1.attn_out", "1.attn.result", "1.mlp_out", "1.resid_post"])
    torch.testing.assert_close(run["1.resid_mid"], run["1.resid_pre"] + run["1.attn_out"], **NEAR)
    torch.testing.assert_close(run["1.resid_post"], run["1.resid_mid"] + run["1.mlp_out"], **NEAR)
    with torch.no_grad():
        behind = model.hf.get_submodule("model.layers.1.attn_sconv")(run["1.attn.result"].sum(2))
    torch.testing.assert_close(run["1.attn_out"], behind, **NEAR)
    assert model.anatomy.parts.layers[1].mixer is None  # it is no branch of its own
    assert "passes through model.layers.1.attn_sconv" in model.anatomy.unproven["1.sum"]
    assert "mixer_out" not in {site.name for site in model.anatomy.hook_points}


def test_a_bias_by_position_is_part_of_the_scores() -> None:
    model = opened("inkling_text")
    eager = configs.build("inkling_text", attention="eager")
    with torch.no_grad():
        expected = eager(input_ids=ids(), output_attentions=True).attentions
    run = model.run(ids(), ["*.attn.pattern"])
    for i, pattern in enumerate(expected):
        torch.testing.assert_close(run["*.attn.pattern"][i], pattern, **NEAR)


def test_a_constant_beside_a_branch_that_is_no_parameter_is_something_else() -> None:
    hf = families.build("llama-gqa")
    constant = torch.randn(families.D_MODEL, generator=torch.Generator().manual_seed(1))
    hf.model.layers[1].register_forward_hook(lambda module, args, output: output + constant)
    model = mt.open(hf)
    run = model.run(ids(), ["1.resid_mid", "1.resid_post", "1.mlp_out"])
    rest = run["1.resid_post"] - run["1.resid_mid"] - run["1.mlp_out"]
    torch.testing.assert_close(rest, constant.expand_as(rest), **NEAR)
    assert "a constant is added" in model.anatomy.unproven["1.sum"]
    assert "0.sum" not in model.anatomy.unproven


def test_a_further_branch_behind_a_normed_stream_is_something_else() -> None:
    model = opened("xmod")
    layer = model.anatomy.parts.layers[1]
    got: list[Tensor] = []
    assert (layer.post_base, layer.until) == (
        "roberta.encoder.layer.1.attention.output.LayerNorm",
        "roberta.encoder.layer.1.output.LayerNorm",  # which the block calls twice
    )
    with hooked(model, layer.until or "", before=lambda m, args: got.append(args[0].clone())):
        run = model.run(ids(), ["1.resid_mid", "1.mlp_out"])
    with torch.no_grad():
        base = model.hf.get_submodule(layer.post_base or "")(run["1.resid_mid"])
    assert len(got) == 2
    torch.testing.assert_close(got[0], base + run["1.mlp_out"], **NEAR)


def test_blocks_that_others_need_more_of_than_the_stream_are_not_skipped() -> None:
    model = opened("gemma4_text")  # the last layers use keys and values of earlier ones
    with pytest.raises(
        mt.errors.EditError, match="does not run with some of its blocks skipped or repeated; got KeyError"
    ):
        model.run(ids(), edits=[mt.edit.Skip("0-2")])


def test_a_mixer_of_one_lane_of_the_stream_is_still_a_mixer() -> None:
    model = opened("deepseek_v4")
    run = model.run(ids(), ["1.resid_pre", "1.mixer.in"])
    assert run["1.resid_pre"].shape[-1] > run["1.mixer.in"].shape[-1] == model.anatomy.d_model


@pytest.mark.parametrize("family", ["rwkv", "xlstm"])
def test_gradients_go_through_mixers_that_keep_states(family: str) -> None:
    model = opened(family)
    run = model.run(ids(), ["1.resid_pre"], grad=True)
    torch.testing.assert_close(run.logits.detach(), logits(model))
    of = run.logits[0, -1, 7]
    slope = run.grad(of)["1.resid_pre"]
    step = (
        torch.randn(slope.shape, generator=torch.Generator().manual_seed(1)) * 1e-3 * run["1.resid_pre"].std().detach()
    )
    ends = [
        model.run(ids(), edits=[mt.edit.Add("1.resid_pre", value=sign * step)]).logits[0, -1, 7] for sign in (1.0, -1.0)
    ]
    torch.testing.assert_close((slope * step).sum(), (ends[0] - ends[1]) / 2, rtol=2e-2, atol=1e-6)
    assert (slope * step).sum().abs() > 1e-5


def test_what_is_not_added_is_no_branch() -> None:
    hf = configs.build("gpt_neox")  # a parallel block, which is made to lose what its MLP writes
    block, got = hf.gpt_neox.layers[1], []
    block.mlp.register_forward_hook(lambda m, args, output: got.append(output))
    block.register_forward_hook(lambda m, args, output: output - got.pop())
    model = mt.open(hf)
    assert mt.anatomy.Site("mlp_out", 0) in model.anatomy.hook_points
    assert mt.anatomy.Site("mlp_out", 1) not in model.anatomy.hook_points
