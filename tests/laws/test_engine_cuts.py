"""Every site is where it says: put another prompt's values there, and what only reads that site becomes the other's.

A cut is a set of sites that together decide another site of the same layer. Swapping a cut from another run must give
exactly the other run's values behind it, and leave alone what lies before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt

CUTS: list[tuple[tuple[str, ...], str]] = [
    (("resid_pre",), "resid_post"),
    (("resid_mid",), "resid_post"),
    (("attn.in",), "attn_out"),
    (("attn.q", "attn.k", "attn.v"), "attn.z"),
    (("attn.q", "attn.k"), "attn.pattern"),
    (("attn.scores",), "attn.pattern"),
    (("attn.scores", "attn.v"), "attn.z"),
    (("attn.pattern", "attn.v"), "attn.z"),
    (("attn.z",), "attn_out"),
    (("attn.result",), "attn_out"),
    (("mlp.in",), "mlp_out"),
    (("mlp.gate", "mlp.up"), "mlp.post"),
    (("mlp.pre",), "mlp.post"),
    (("mlp.post",), "mlp_out"),
    (("mlp.experts", "mlp.in"), "mlp_out"),
]
NEAR = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def watched(model: mt.Model) -> list[str]:
    last = f"{model.anatomy.n_layers - 1}.resid_post"
    return ["0.resid_post", last, *(str(site) for site in model.anatomy.hook_points if site.layer in (None, 1))]


@pytest.mark.parametrize("name", families.some(3))
def test_what_lies_behind_a_cut_becomes_the_others(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    base, other = (model.run(ids(seed=seed), capture=watched(model)) for seed in (3, 9))
    check_branches_and_scales(model, base, other)
    tried = 0
    for cut, behind in CUTS:
        if any(mt.anatomy.Site(site, 1) not in model.anatomy.hook_points for site in (*cut, behind)):
            continue
        tried += 1
        edits = [mt.edit.Patch(f"1.{site}", other) for site in cut]
        run = model.run(ids(), capture=["0.resid_post", f"1.{behind}"], edits=edits)
        torch.testing.assert_close(run[f"1.{behind}"], other[f"1.{behind}"], **NEAR, msg=f"{cut} to {behind}")
        assert not torch.allclose(base[f"1.{behind}"], other[f"1.{behind}"], atol=1e-3)
        assert torch.equal(run["0.resid_post"], base["0.resid_post"])
    assert tried >= 11
    run = model.run(ids(), edits=[mt.edit.Patch("final", other)])
    torch.testing.assert_close(run.logits, other.logits, **NEAR)
    assert torch.equal(model.run(ids(), edits=[mt.edit.Patch("logits", other)]).logits, other.logits)


def check_branches_and_scales(model: mt.Model, base: mt.Run, other: mt.Run) -> None:
    """Branches add to the stream, and scales divide it."""
    a, layer = model.anatomy, model.layers[1]
    stream = "1.resid_post" if a.parts.form == "parallel" else "1.resid_mid"
    if a.parts.form != "post_norm":
        run = model.run(ids(), capture=stream, edits=[mt.edit.Patch("1.attn_out", other)])
        expected = base[stream] - base["1.attn_out"] + other["1.attn_out"]
        torch.testing.assert_close(run[stream], expected, **NEAR)
        run = model.run(ids(), capture="1.resid_post", edits=[mt.edit.Patch("1.mlp_out", other)])
        expected = base["1.resid_post"] - base["1.mlp_out"] + other["1.mlp_out"]
        torch.testing.assert_close(run["1.resid_post"], expected, **NEAR)
    reads = "1.resid_pre" if a.parts.form == "parallel" else "1.resid_mid"
    for site, norm, read, out in (
        ("1.attn.scale", layer.attn_norm, "1.resid_pre", "1.attn.in"),
        ("1.mlp.scale", layer.mlp_norm, reads, "1.mlp.in"),
        ("final.scale", model.final_norm, f"{a.n_layers - 1}.resid_post", "final"),
    ):
        # Heads with a projection of their own have no `final` right behind the norm.
        if norm is not None and base[out].shape == base[read].shape:
            run = model.run(ids(), capture=out, edits=[mt.edit.Patch(site, other)])
            torch.testing.assert_close(run[out], norm.apply(base[read], other[site]), **NEAR)
            assert not torch.allclose(run[out], base[out], atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3-qlora"])
def test_a_router_can_be_sent_to_experts_that_it_did_not_choose(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    layer = next(i for i in (2, 1) if mt.anatomy.Site("mlp.router", i) in model.anatomy.hook_points)
    router, reads, out = f"{layer}.mlp.router", f"{layer}.mlp.in", f"{layer}.mlp.experts"
    base = model.run(ids(), capture=[router, reads])
    experts = model.hf.get_submodule(model.anatomy.parts.layers[layer].experts or "")
    unused = (base[router] == 0).float().argmax(-1)
    assert base[router].gather(-1, unused.unsqueeze(-1)).abs().max() == 0

    put = torch.zeros_like(base[router]).scatter(-1, unused.unsqueeze(-1), 0.7)
    run = model.run(ids(), capture=[out, router], edits=[mt.edit.Set(router, put)])
    with torch.no_grad():
        expected = experts(base[reads].flatten(0, 1), unused.flatten().unsqueeze(1), torch.full((16, 1), 0.7))
    torch.testing.assert_close(run[out].sum(2).flatten(0, 1), expected, **NEAR)
    assert torch.equal(run[router], put)

    everyone = torch.full_like(base[router], 0.2)
    run = model.run(ids(), capture=out, edits=[mt.edit.Set(router, everyone)])
    with torch.no_grad():
        each = [experts(base[reads].flatten(0, 1), torch.full((16, 1), e), torch.full((16, 1), 0.2)) for e in range(6)]
    torch.testing.assert_close(run[out].sum(2).flatten(0, 1), torch.stack(each).sum(0), **NEAR)


@pytest.mark.parametrize("name", ["falcon-gqa", "falcon-onenorm", "llama-gqa", "phi3", "gemma2"])
def test_one_key_or_value_head_serves_its_group_of_queries(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    capture = ["1.attn.k", "1.attn.v", "1.attn.z", "1.attn.pattern"]
    base = model.run(ids(), capture=capture)
    assert base["1.attn.k"].shape[2] == base["1.attn.v"].shape[2] == 2
    for site, reads in (("1.attn.v[1]", "1.attn.z"), ("1.attn.k[1]", "1.attn.pattern")):
        run = model.run(ids(), capture=capture, edits=[mt.edit.Scale(site, 3.0)])
        axis = 2 if reads == "1.attn.z" else 1
        mine, others = torch.tensor([2, 3]), torch.tensor([0, 1])
        kept = (run[reads] - base[reads]).index_select(axis, others).abs().max()
        assert kept < 1e-6
        changed = (run[reads] - base[reads]).index_select(axis, mine).abs().amax(dim=(0, 3))
        assert (changed.amax(dim=0 if axis == 2 else 1) > 1e-4).all()
    run = model.run(ids(), capture="1.attn.z", edits=[mt.edit.Zero("1.attn.v[0]")])
    assert run["1.attn.z"][:, :, :2].abs().max() == 0


@pytest.mark.parametrize("name", families.some(3))
def test_no_head_writing_leaves_the_bias(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    tap, bias = model.anatomy.hook_points[mt.anatomy.Site("attn_out", 1)], model.layers[1].b_O
    left = torch.zeros(model.anatomy.d_model) if bias is None else bias.detach()
    if tap.module != model.anatomy.parts.layers[1].o:  # a norm stands after the projection
        left = model.hf.get_submodule(tap.module)(left).detach()
    for site in ("1.attn.z", "1.attn.result"):
        run = model.run(ids(), capture="1.attn_out", edits=[mt.edit.Zero(site)])
        # A norm behind the projection blows up what rounding leaves of a sum that is zero.
        near = NEAR if tap.module == model.anatomy.parts.layers[1].o else {"rtol": 0.0, "atol": 5e-3}
        torch.testing.assert_close(run["1.attn_out"], (left * tap.scale).expand_as(run["1.attn_out"]), **near)
