"""Streams of several lanes: what branches hand to them, by the models' own formulas, and what proves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.anatomy import HookPoint, Site
from microtome.model._lanes import SHARE, left_over
from microtome.model._proof import prove

configs = script("tools/family_configs.py")
LANES = ("deepseek_v4", "hy_v4", "qwen4_exp_text", "gemma3n_text")
BRANCHES = ("attn_out", "mixer_out", "mlp_out")


@cache
def opened(family: str) -> mt.Model:
    return mt.open(configs.build(family))


def ids(rows: int = 2, length: int = 12) -> Tensor:
    return configs.prompt(rows, length)


def plain(hf: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits


def branches(model: mt.Model) -> list[Site]:
    return [site for site in model.anatomy.hook_points if site.name in BRANCHES]


def lanes_of(x: Tensor, model: mt.Model) -> Tensor:
    return x.unflatten(-1, (-1, model.anatomy.d_model))


# ------------------------------------------------------------------------------------------ what is there, and is right


@pytest.mark.parametrize("family", LANES)
def test_every_branch_is_there_and_the_stream_is_no_sum(family: str) -> None:
    model = opened(family)
    for layer in range(model.anatomy.n_layers):
        there = {site.name for site in model.anatomy.hook_points if site.layer == layer}
        assert "mlp_out" in there
        assert ("attn_out" in there) == ("attn.in" in there)
        assert ("mixer_out" in there) == ("mixer.in" in there)
        assert ("attn.result" in there) == ("attn.z" in there)
    assert model.anatomy.why_no_sum is not None
    assert model.anatomy.unproven["0.sum"] == "a stream of 128 is not the sum of branches of 32"


def test_hyper_connections_mix_in_what_branches_write() -> None:
    model = opened("hy_v4")
    run = model.run(ids(), ["*.resid_pre", "*.attn_out", "*.resid_mid", "*.mlp_out", "*.resid_post"])
    for i, block in enumerate(model.hf.model.layers):
        stretches = (
            ("resid_pre", block.attn_hc, "attn_out", "resid_mid"),
            ("resid_mid", block.ffn_hc, "mlp_out", "resid_post"),
        )
        for start, mixes, branch, end in stretches:
            before = lanes_of(run[f"{i}.{start}"], model)
            with torch.no_grad():
                weights, _ = mixes(before)
            expected = before + weights.unsqueeze(-1) * run[f"{i}.{branch}"].unsqueeze(-2)
            torch.testing.assert_close(lanes_of(run[f"{i}.{end}"], model), expected, rtol=1e-4, atol=1e-5)


def test_lanes_that_are_predicted_are_corrected_by_what_branches_write() -> None:
    model = opened("gemma3n_text")
    run = model.run(ids(), ["*.resid_pre", "*.attn.in", "*.attn_out", "*.resid_mid", "*.mlp_out", "*.resid_post"])
    for i, block in enumerate(model.hf.model.layers):
        with torch.no_grad():
            predicted = block.altup.predict(lanes_of(run[f"{i}.resid_pre"], model).movedim(-2, 0))
            active = predicted[block.config.altup_active_idx]
            mid = (active + run[f"{i}.attn_out"] + block.laurel(run[f"{i}.attn.in"])) / 2**0.5
            corrected = block.altup.correct(predicted, mid + run[f"{i}.mlp_out"])
        torch.testing.assert_close(run[f"{i}.resid_mid"], mid, rtol=1e-4, atol=1e-5)
        # The other lanes have per-layer inputs added to them.
        got = lanes_of(run[f"{i}.resid_post"], model)[..., 0, :]
        torch.testing.assert_close(got, corrected[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- edits and sweeps


@contextmanager
def scaled(module: Any, at: int, factor: float) -> Iterator[None]:
    """Scale what a module gives at one position, by a plain hook."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, at] *= factor
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", LANES)
def test_an_edit_of_a_branch_is_the_literal_hook_in_runs_and_sweeps(family: str) -> None:
    model, tokens, factor, at = opened(family), ids(1), -0.5, 5
    metric = mt.metric.LogitDifference(11, foil=23)
    base, literal, cells = plain(model.hf, tokens), [], []
    for site in branches(model):
        edit = mt.edit.Scale(f"{site}@{at}", factor)
        with scaled(model.hf.get_submodule(model.anatomy.hook_points[site].module), at, factor):
            expected = plain(model.hf, tokens)
        torch.testing.assert_close(model.run(tokens, edits=edit).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - base).abs().max() > 1e-3, site
        cells.append(edit)
        literal.append(expected[:, -1, 11] - expected[:, -1, 23])
    swept = model.sweep(tokens, cells, metric).run().values
    torch.testing.assert_close(swept.flatten(), torch.cat(literal).to(swept.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4", "qwen4_exp_text"])
def test_the_stream_between_the_branches_has_all_its_lanes(family: str) -> None:
    model, tokens = opened(family), ids(1)
    path = model.anatomy.parts.layers[1].mid
    assert path is not None

    def halve(module: Any, args: tuple[Tensor, ...]) -> None:
        args[0][:, 5] *= 0.5  # the block keeps this very tensor

    handle = model.hf.get_submodule(path).register_forward_pre_hook(halve)
    try:
        expected = plain(model.hf, tokens)
    finally:
        handle.remove()
    edited = model.run(tokens, "1.resid_mid", edits=mt.edit.Scale("1.resid_mid@5", 0.5))
    torch.testing.assert_close(edited.logits, expected, rtol=1e-4, atol=1e-5)
    assert edited["1.resid_mid"].shape[-1] == 4 * model.anatomy.d_model
    assert (expected - plain(model.hf, tokens)).abs().max() > 1e-3


def test_methods_that_need_a_sum_or_one_lane_say_so() -> None:
    model = opened("hy_v4")
    with pytest.raises(mt.errors.SiteError, match=r'"component_effects", which needs a stream that is the sum.*of 128'):
        mt.explain.component_effects(model, ids(1)[0].tolist(), answer=11)
    with pytest.raises(mt.errors.SiteError, match="cannot be read as logits"):
        model.unembed(torch.zeros(32))


def test_blocks_that_keep_what_others_use_cannot_be_skipped() -> None:
    model = opened("gemma3n_text")
    with pytest.raises(mt.errors.EditError, match=r"with some of its blocks skipped.*got KeyError: 'full_attention'"):
        model.run(ids(), edits=mt.edit.Skip("1"))  # the last that makes keys of its own
    model.run(ids(), edits=mt.edit.Skip("4"))


def test_statistics_of_the_stream_see_all_lanes() -> None:
    model, tokens = opened("hy_v4"), ids(4, 24)
    found = mt.measure(model, "massive", "effective_rank", "stream", text=tokens)
    assert not {"attn_cos", "mlp_share"} & set(found)  # lanes have no angle with what is as wide as one
    run = model.run(tokens, ["*.resid_pre", "*.resid_post"])
    for i in range(model.anatomy.n_layers):
        x = run[f"{i}.resid_post"]
        assert float(found["max_abs"][i]) == pytest.approx(float(x.abs().max()), rel=1e-5)
        pre, post = run[f"{i}.resid_pre"][:, 1:], x[:, 1:]
        turned = torch.nn.functional.cosine_similarity(pre, post, dim=-1).mean()
        assert float(found["block_cos"][i]) == pytest.approx(float(turned), rel=1e-4)
        spread = torch.linalg.eigvalsh(x[:, 1:].flatten(0, 1).double().T.cov()).clamp(min=0)
        expected = torch.special.entr(spread / spread.sum()).sum().exp()
        assert float(found["effective_rank"][i]) == pytest.approx(float(expected), rel=1e-4)


# ------------------------------------------------------------------------------------------------ what breaks the proof


def proven(model: mt.Model, changed: dict[Site, HookPoint]) -> set[str]:
    """What a map lacks after the proof that it had before, with some hook points at other places."""
    before = model.anatomy
    try:
        points = dict(before.hook_points) | changed
        model.remap(replace(before, hook_points=points, padding=("left", "right")))  # which the proof tries
        _, after = prove(model)
    finally:
        model.remap(before)
    return {str(site) for site in before.hook_points if site not in after.hook_points}


@pytest.mark.parametrize(
    ("family", "name", "module"),
    [
        ("hy_v4", "attn_out", "input_layernorm"),  # what attention reads
        ("hy_v4", "mlp_out", "self_attn.o_proj"),  # what another branch writes
        ("deepseek_v4", "mixer_out", "post_attention_layernorm"),
        ("gemma3n_text", "attn_out", "self_attn.o_proj"),  # before the norm behind it
        ("gemma3n_text", "mlp_out", "per_layer_projection"),  # before another norm, which is added beside it
        ("qwen4_exp_text", "mlp_out", "mlp.experts"),  # without the shared expert
    ],
)
def test_the_output_of_another_module_is_no_branch(family: str, name: str, module: str) -> None:
    model = opened(family)
    layer = next(i for i in range(1, model.anatomy.n_layers) if Site(name, i) in model.anatomy.hook_points)
    block = model.anatomy.parts.layers[layer].block
    assert proven(model, {}) == set()
    lost = proven(model, {Site(name, layer): HookPoint(f"{block}.{module}", "output")})
    assert f"{layer}.{name}" in lost
    assert {site for site in lost if not site.startswith(f"{layer}.")} == set()


def rewired(family: str, change: Any) -> mt.Model:
    """A model of which what the second block gives is changed."""
    hf = configs.build(family)

    def hook(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    hf.model.layers[1].register_forward_hook(hook)
    return mt.open(hf)


def test_lanes_of_another_position_are_not_mixed_in() -> None:
    model = rewired("hy_v4", lambda x: torch.cat([x[:, :1], x[:, :-1]], dim=1))
    lost = {str(site) for site in opened("hy_v4").anatomy.hook_points if site not in model.anatomy.hook_points}
    assert {"1.mlp_out"} <= lost
    assert "1.attn_out" not in lost
    assert 'fails "2 residual" at 1.resid_post' in model.anatomy.missing[Site("mlp_out", 1)]


def test_a_nonlinearity_behind_a_block_is_no_mixture_of_lanes() -> None:
    model = rewired("hy_v4", lambda x: x + 0.05 * x.tanh())
    assert 'fails "2 residual" at 1.resid_post' in model.anatomy.missing[Site("mlp_out", 1)]
    assert Site("mlp_out", 0) in model.anatomy.hook_points


def test_a_branch_that_is_mixed_in_with_nothing_is_not_proven() -> None:
    hf = configs.build("hy_v4")

    def silence(_: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(output[0]), output[1]

    hf.model.layers[1].ffn_hc.register_forward_hook(silence)
    missing = mt.open(hf).anatomy.missing
    assert 'fails "2 residual" at 1.mlp_out (gap 1, allowed 0.1)' in missing[Site("mlp_out", 1)]


def test_what_is_left_over() -> None:
    draw = torch.Generator().manual_seed(0)
    before, branch, other = (torch.randn(2, 3, *n, 16, generator=draw) for n in ((4,), (), ()))
    a, b = torch.randn(2, 3, 4, 4, generator=draw), torch.randn(2, 3, 4, generator=draw)
    after = torch.einsum("bpjk,bpkd->bpjd", a, before) + b.unsqueeze(-1) * branch.unsqueeze(-2)
    terms = list(before.unbind(-2))
    assert left_over(after, [*terms, branch]) < 1e-6
    assert left_over(after, terms) > 0.1
    assert left_over(after, [*terms, other]) > SHARE * left_over(after, terms)
    assert left_over(after, [*terms, branch.roll(1, dims=1)]) > 0.1
    assert left_over(after, [*terms, branch, *[other] * 4]) == 1.0  # nine unknown numbers in sixteen equations


# ------------------------------------------------------------------------------------------ gates that are cut off


def cut_off(cut: Any) -> mt.Model:
    """A model whose second MLP cuts off its gate before the activation."""
    hf = families.build("llama-gqa")
    mlp = hf.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(cut(mlp.gate_proj(x))) * mlp.up_proj(x))
    return mt.open(hf)


def test_a_gate_that_is_cut_off_at_one_number_a_position_is_shown() -> None:
    model = cut_off(lambda x: (x - x.mean(-1, keepdim=True) - 0.3 * x.std(-1, keepdim=True)).clamp(min=0))
    assert {Site("mlp.gate", 1), Site("mlp.up", 1)} <= set(model.anatomy.hook_points)
    run = model.run(ids(), ["1.mlp.gate", "1.mlp.post"])
    assert (run["1.mlp.post"] == 0).float().mean() > 0.4
    with torch.no_grad():
        read = model.run(ids(), "1.mlp.in")["1.mlp.in"]
        torch.testing.assert_close(run["1.mlp.gate"], model.hf.model.layers[1].mlp.gate_proj(read))


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: (x - 0.1 * torch.arange(x.shape[-1])).clamp(min=0),  # a number of each neuron
        lambda x: (x - x.mean(-1, keepdim=True)).roll(1, dims=-1).clamp(min=0),
        lambda x: (2 * x).clamp(min=0),
    ],
)
def test_a_gate_that_is_changed_otherwise_is_left_out(cut: Any) -> None:
    missing = cut_off(cut).anatomy.missing
    assert 'fails "7 weights" at 1.mlp.post' in missing[Site("mlp.gate", 1)]
