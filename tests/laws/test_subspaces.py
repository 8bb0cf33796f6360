"""Interchanges are patches: what a subspace swaps is what an edit swaps, in any family and at any site."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests import families

import microtome as mt
from microtome import subspaces
from microtome.errors import ArgumentError, DataError
from microtome.subspaces import Subspace, Swap, Swaps
from microtome.subspaces._exchange import Exchange, Runs
from microtome.subspaces._score import projection

FAMILIES = ("llama-gqa", "gemma2", "gptj")
SITES = (
    "1.resid_post",
    "1.resid_pre",
    "0.resid_mid",
    "1.mlp.post",
    "1.attn_out",
    "1.attn.z[1]",
    "-1.resid_post",
    "embed",
)


def rows(model: mt.Model, n: int = 6) -> list[tuple[int, ...]]:
    rng = torch.Generator().manual_seed(0)
    vocab = model.anatomy.d_vocab
    return [tuple(torch.randint(3, vocab, (5 + i % 3,), generator=rng).tolist()) for i in range(n)]


def swaps_of(model: mt.Model) -> list[Swap]:
    made = rows(model)
    return [Swap(a, b, 2 + i % 2, 1 + i % 3, 4, "cause", 5) for i, (a, b) in enumerate(pairwise(made))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_swap_is_a_patch_of_its_subspace(name: str) -> None:
    model = mt.open(families.build(name))
    swaps = swaps_of(model)
    for site in SITES:
        if name == "gptj" and site == "0.resid_mid":
            continue  # parallel branches have no stream between them
        ready = Exchange(model, site, swaps)
        basis = torch.linalg.qr(torch.randn(ready.width, 3, generator=torch.Generator().manual_seed(1)).double()).Q.T
        found = Subspace.of(model, site, basis)
        delta = projection(found.basis)(ready.source - ready.base)
        own = ready.logits(range(len(swaps)), ready.base + delta)
        for i, swap in enumerate(swaps):
            (where,) = model.anatomy.sites(mt.anatomy.parse(site))
            held = model.run([list(swap.source)], capture=str(where))[str(where)]
            moved = held.new_zeros(1, len(swap.base), *held.shape[2:])
            moved[0, swap.base_at] = held[0, swap.source_at]
            edit = found.patch({str(where): moved}, f"@{swap.base_at}")
            expected = model.run([list(swap.base)], edits=edit).logits[0, -1]
            torch.testing.assert_close(own[i], expected, atol=2e-4, rtol=1e-3)


def test_runs_that_are_kept_are_not_run_again_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"))
    swaps = swaps_of(model)
    pairs = [replace(s, pair=True, label=4 + i % 2, own=5 - i % 2) for i, s in enumerate(swaps)]
    runs = Runs(model, SITES)
    kept = {(site, pair): Exchange(model, site, own, runs) for site in SITES for pair, own in enumerate((swaps, pairs))}
    assert len(runs) == len(rows(model))
    literal = [model.run([list(s.base)]).logits[0, -1] for s in pairs]
    wanted = [bool(z[s.own] > z[s.label]) for s, z in zip(pairs, literal, strict=True)]
    assert set(wanted) == {False, True}
    ran: list[int] = []
    own_run = mt.Model.run
    monkeypatch.setattr(mt.Model, "run", lambda self, prompt, *a, **k: ran.append(1) or own_run(self, prompt, *a, **k))
    runs.run([s.base for s in swaps], [s.base for s in pairs])
    assert not ran
    for (site, pair), one in kept.items():
        alone = Exchange(model, site, pairs if pair else swaps)
        assert (one.said, one.known) == (alone.said, alone.known)
        assert one.known == wanted or not pair
        assert one._start is not None or site == "embed"  # a wrong stream would make it run whole
        torch.testing.assert_close((one.base, one.source), (alone.base, alone.source), atol=1e-5, rtol=1e-5)
        which = list(range(len(swaps)))
        torch.testing.assert_close(one.logits(which, one.source), alone.logits(which, alone.source))


def test_gradients_reach_what_is_swapped_in_and_no_weight() -> None:
    model = mt.open(families.build("llama-gqa"))
    ready = Exchange(model, "1.mlp.post", swaps_of(model))
    new = ready.source.clone().requires_grad_()
    ready.logits(range(len(new)), new, grad=True).logsumexp(-1).sum().backward()
    assert new.grad is not None
    assert (new.grad.abs().sum(1) > 0).all()
    model.hf.zero_grad()
    own = {name: (p.requires_grad, p.clone()) for name, p in model.hf.named_parameters()}
    swaps = Swaps(tuple(replace(s, own=t) for s, t in zip(ready.swaps, ready.said, strict=True)))
    subspaces.find(model, swaps, "1.mlp.post", 2, steps=2)
    for name, p in model.hf.named_parameters():
        assert p.grad is None
        assert p.requires_grad == own[name][0]
        assert torch.equal(p, own[name][1])


def test_a_basis_is_orthonormal_and_projects() -> None:
    model = mt.open(families.build("llama-gqa"))
    vectors = torch.randn(5, model.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    vectors[3] = vectors[0] + vectors[1]
    found = Subspace.of(model, "1.resid_post", vectors)
    assert found.rank == 4
    assert float((found.basis @ found.basis.T - torch.eye(4)).abs().max()) < 1e-12
    torch.testing.assert_close(found.part(vectors), vectors)
    torch.testing.assert_close(found.part(found.part(vectors + 1)), found.part(vectors + 1))
    assert found.overlap(found) == pytest.approx(1.0)


def test_a_subspace_is_saved_and_refuses_other_models_and_widths(tmp_path: Path) -> None:
    model, other = (mt.open(families.build("llama-gqa")) for _ in range(2))
    with torch.no_grad():
        other.layers[0].W_out[0, 0] += 1.0
    found = Subspace.of(model, "1.resid_post", torch.eye(model.anatomy.d_model)[:3], "given", note="mine")
    found.save(tmp_path / "s.safetensors")
    again = Subspace.load(tmp_path / "s.safetensors", model)
    assert torch.equal(again.basis, found.basis)
    assert (again.site, again.method, again.fingerprint, dict(again.attrs)) == (
        found.site, found.method, found.fingerprint, {"note": "mine"},
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="of another model"):
        Subspace.load(tmp_path / "s.safetensors", other)
    with pytest.raises(ArgumentError, match="a run of another model"):
        found.patch(other.run([5, 6, 7], capture="1.resid_post"))
    with pytest.raises(ArgumentError, match="not as wide as 1.mlp.post"):
        Subspace.of(model, "1.mlp.post", torch.ones(3))
    with pytest.raises(ArgumentError, match="not orthonormal"):
        Subspace("1.resid_post", torch.ones(2, 4), "given", "", "")
    (tmp_path / "s.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot read a subspace"):
        Subspace.load(tmp_path / "s.safetensors")
