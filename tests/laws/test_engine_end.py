"""A run without logits ends where the last thing that was named is, and what it kept is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt

NAMES = ["gpt2", "llama-gqa", "gpt_neo", "falcon-gqa", "bloom", "gemma2", "mixtral", "bert", "deepseek_v3-noqlora"]


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def counted(model: mt.Model) -> Iterator[list[str]]:
    """The parts that began to run: blocks by number, branches, the unembedding."""
    begun: list[str] = []
    parts = model.anatomy.parts
    paths = {layer.block: f"{i}" for i, layer in enumerate(parts.layers)}
    paths |= {layer.mlp: f"{i}.mlp" for i, layer in enumerate(parts.layers) if layer.mlp}
    paths |= {parts.unembedding: "unembedding"}

    def keep(name: str) -> Any:
        return lambda module, args: begun.append(name)

    handles = [model.hf.get_submodule(p).register_forward_pre_hook(keep(name)) for p, name in paths.items()]
    try:
        yield begun
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_every_site_alone_ends_the_run_behind_it(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    sites = [site for site in model.anatomy.hook_points if site.layer in (None, 1) and site.name != "logits"]
    whole = model.run(ids(), capture=[str(site) for site in sites])
    for site in sites:
        with counted(model) as begun:
            run = model.run(ids(), capture=str(site), logits=False)
        assert torch.equal(run[str(site)], whole[str(site)]), site
        assert list(run.captured) == [mt.anatomy.parse(str(site))]
        with pytest.raises(mt.errors.SiteError, match="this run has no logits"):
            _ = run.logits
        if site.layer == 1:
            assert "2" not in begun or site.name == "resid_post", site
            assert "unembedding" not in begun
        if site.name in ("resid_pre", "attn.in", "attn.z") and model.anatomy.parts.form == "sequential":
            assert "1.mlp" not in begun


def test_edits_and_observers_are_reached_before_the_end() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    seen: list[str] = []
    observe = {"1.attn_out": lambda site, x: seen.append(str(site))}
    edit = mt.edit.Apply("2.attn.z[0]", lambda x: (seen.append("edit"), x)[1])
    with counted(model) as begun:
        model.run(ids(), capture="0.mlp_out", edits=edit, observe=observe, logits=False)
    assert seen == ["1.attn_out", "edit"]
    assert "2" in begun
    assert "2.mlp" not in begun


def test_the_last_run_of_a_repeated_block_counts() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    repeat = mt.edit.Repeat(1, 3)
    expected = model.run(ids(), capture="1.mlp_out", edits=repeat)["1.mlp_out"]
    assert not torch.allclose(expected, model.run(ids(), capture="1.mlp_out")["1.mlp_out"], atol=1e-2)
    assert torch.equal(model.run(ids(), capture="1.mlp_out", edits=repeat, logits=False)["1.mlp_out"], expected)
    with model.editing(repeat):
        assert torch.equal(model.run(ids(), capture="1.mlp_out", logits=False)["1.mlp_out"], expected)


def test_gradients_of_a_run_that_ended_early() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    grads: list[Tensor] = []
    for logits in (True, False):
        run = model.run(ids(), capture=["0.mlp_out", "1.attn.z"], grad=True, logits=logits)
        grads.append(run.grad(run["1.attn.z"].pow(2).sum())["0.mlp_out"])
    assert float(grads[0].abs().max()) > 1e-2
    assert torch.equal(*grads)


def test_the_plan_of_a_run_that_ends_early_is_a_share() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    flops = [model.plan(ids(), site, logits=False).flops for site in ("0.mlp_out", "1.resid_pre", "2.mlp_out", "final")]
    assert [round(3 * x / flops[-1], 6) for x in flops] == [1, 2, 3, 3]
    assert model.plan(ids(), "0.mlp_out").flops > flops[-1]
