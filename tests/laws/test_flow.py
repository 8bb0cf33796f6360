"""Shares of a whole sum to one, and routes and tokens are what a literal walk over one run gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.explain._flow import FLOOR, kept, nearness, shares

PROMPT = [7, 20, 33, 41, 52, 60, 20]
WHOLE = [n for n in families.NAMES if n not in {"opt-postnorm", "opt-proj", "bert", "roberta"}]


def model(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name), prove=False)


def test_shares_of_a_whole() -> None:
    rng = torch.Generator().manual_seed(0)
    whole, parts = torch.randn(30, generator=rng).double(), torch.randn(7, 30, generator=rng).double() * 0.3
    parts[2] = whole
    c = shares(whole, parts, FLOOR)
    assert float(c.sum()) == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(c, shares(5 * whole, 5 * parts, 5 * FLOOR), atol=1e-12)  # the floor is a length too
    alone = shares(whole, torch.stack([whole, torch.zeros_like(whole), -whole]), FLOOR)
    assert float(alone[0]) > 1 - 1e-5 * 2
    assert nearness(whole, -whole[None]).item() == 0.0  # what takes away brings nothing nearer
    assert torch.allclose(shares(whole, -whole.expand(4, -1)), torch.full((4,), 0.25).double())
    assert kept(torch.tensor([0.5, 0.3, 0.2]), 0.2).tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert kept(torch.tensor([0.5, 0.5]), 0.9).sum() == 0


@pytest.mark.parametrize("name", families.some(4, WHOLE))
def test_shares_sum_to_one_and_terms_to_the_logit(name: str) -> None:
    it = model(name)
    for foil in (None, 13):
        data = mt.explain.flow(it, PROMPT, answer=11, foil=foil, position=-2, threshold=0.02, verify=0)
        assert abs(data["tokens"].sum("pos") - 1).max() < 1e-9
        assert abs(data["rollout"].sum("pos") - 1).max() < 1e-6
        assert abs(float(data["gap"])) < 1e-5 * max(1.0, abs(float(data["logit"])))
        assert (data["tokens"].values[:, -1] == 0).all()  # what comes behind the position
        assert float(data["stream"][0].sum()) + data.attrs["lost"] == pytest.approx(1.0, abs=1e-9)
        moved = float(data["heads"].sum())
        assert moved >= 0
    logits = it.run([PROMPT]).logits[0, -2]
    if it.anatomy.logit_softcap is None:
        assert float(data["logit"]) == pytest.approx(float(logits[11] - logits[13]), abs=1e-4)


@torch.no_grad()
def literal_tokens(it: mt.Model, prompt: list[int]) -> Tensor:
    """[layer, to, from] ALTI in plain loops, of a model of blocks with a root mean square before each branch."""
    run = it.run([prompt], capture=["*.attn.pattern", "*.attn.v", "*.resid_pre", "*.resid_mid"])
    n, length = it.anatomy.n_layers, len(prompt)
    rolled, found = torch.eye(length).double(), []
    for i in range(n):
        w, v, a = it.layers[i].W_O.double(), run[f"{i}.attn.v"][0].double(), run[f"{i}.attn.pattern"][0].double()
        x, y = run[f"{i}.resid_pre"][0].double(), run[f"{i}.resid_mid"][0].double()
        groups = it.anatomy.n_heads // it.anatomy.n_kv_heads
        c = torch.zeros(length, length).double()
        for q in range(length):
            for k in range(q + 1):
                part = sum(a[h, q, k] * (v[k, h // groups] @ w[h]) for h in range(it.anatomy.n_heads))
                part = part + (x[q] if k == q else 0)
                c[q, k] = max(float(y[q].abs().sum() - (y[q] - part).abs().sum()), 0.0)
            c[q] /= c[q].sum()
        rolled = c @ rolled
        found.append(rolled)
    return torch.stack(found)


def test_tokens_are_those_of_plain_loops() -> None:
    it = model()
    data = mt.explain.flow(it, PROMPT, answer=11, verify=0)
    rolled = literal_tokens(it, PROMPT)
    assert np.allclose(data["tokens"], rolled[:, -1], atol=1e-5)
    # What a layer reads at a position is of the tokens that have reached it before that layer.
    before = torch.cat([torch.eye(len(PROMPT)).double()[None], rolled[:-1]])
    read = mt.explain.contributions(it, PROMPT, answer=11, detail=("source",))["attn_source"].values[0].sum(1)
    assert np.allclose(data["token_logit"], np.einsum("lk,lkp->lp", read, before), atol=1e-4)


@torch.no_grad()
def literal_routes(it: mt.Model, prompt: list[int], threshold: float) -> dict[tuple[int, int, int, int], float]:
    """The routes by a walk over one node after the other, in plain loops."""
    run = it.run([prompt], capture=["*.attn.pattern", "*.attn.v", "*.resid_pre", "*.resid_mid", "*.mlp_out"])
    groups = it.anatomy.n_heads // it.anatomy.n_kv_heads
    routes: dict[tuple[int, int, int, int], float] = {}

    def split(whole: Tensor, parts: list[Tensor]) -> list[float]:
        size = whole.abs().sum()
        near = [max(float(size - (whole - p).abs().sum()), 1e-5) for p in parts]
        large = [c if c > threshold else 0.0 for c in (x / sum(near) for x in near)]
        return [c / sum(large) for c in large] if sum(large) else large

    def walk(layer: int, q: int, size: float) -> None:
        if layer < 0 or not size:
            return
        x, y, out = (run[f"{layer}.{s}"][0].double() for s in ("resid_pre", "resid_mid", "mlp_out"))
        size *= sum(split(y[q] + out[q], [y[q], out[q]]))
        v, a = run[f"{layer}.attn.v"][0].double(), run[f"{layer}.attn.pattern"][0].double()
        w = it.layers[layer].W_O.double()
        from_ = [(k, h) for k in range(len(prompt)) for h in range(it.anatomy.n_heads)]
        parts = [a[h, q, k] * (v[k, h // groups] @ w[h]) for k, h in from_]
        c = split(y[q], [x[q], *parts])
        walk(layer - 1, q, size * c[0])
        for (k, h), share in zip(from_, c[1:], strict=True):
            if share:
                routes[layer, h, k, q] = routes.get((layer, h, k, q), 0.0) + size * share
                walk(layer - 1, k, size * share)

    walk(it.anatomy.n_layers - 1, len(prompt) - 1, 1.0)
    return routes


def test_routes_are_those_of_a_literal_walk_and_their_effects_those_of_plain_runs() -> None:
    it, words = model(), [str(i) for i in PROMPT[:5]]
    data = mt.explain.flow(it, PROMPT[:5], answer=11, threshold=0.03, verify=6)
    routes = literal_routes(it, PROMPT[:5], 0.03)
    named = {f"{i}.attn.z[{h}] @{k}{words[k]} > @{q}{words[q]}": s for (i, h, k, q), s in routes.items()}
    assert data.attrs["routes"] == len(routes) > 6
    best = data.isel(component=slice(6))
    assert best["route"].values == pytest.approx(sorted(named.values())[::-1][:6], abs=1e-5)
    for name, share in zip(best["component"].values, best["route"].values, strict=True):
        assert named[str(name)] == pytest.approx(float(share), abs=1e-5)
    by_head = np.zeros((3, 4))
    for (i, h, _, _), share in routes.items():
        by_head[i, h] += share
    assert np.allclose(data["heads"], by_head, atol=1e-5)
    base = it.run([PROMPT[:5]], capture=["*.attn.pattern", "*.attn.v"])
    for n in (0, 8):  # one on a route, one of the others
        name = str(data["component"].values[n])
        i, h = int(name[0]), int(name.partition("[")[2][0])
        k, q = (int(part.partition("@")[2][0]) for part in name.split(" > "))
        v = base[f"{i}.attn.v"][0, k, h // 2]
        edit = mt.edit.Add(f"{i}.attn_out@{q}", -(base[f"{i}.attn.pattern"][0, h, q, k] * v @ it.layers[i].W_O[h]))
        runs = [it.run([PROMPT[:5]], edits=e).logits[0, -1].log_softmax(-1)[11] for e in ((), edit)]
        assert float(data["route_exact"][n]) == pytest.approx(float(runs[1] - runs[0]), abs=1e-5)
        assert (float(data["route"][n]) > 0) == (n == 0)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "granite"])
def test_neurons_split_what_goes_through_mlps(name: str) -> None:
    it = model(name)
    data = mt.explain.flow(it, PROMPT, threshold=0.0, neurons=True, verify=0)
    assert np.allclose(data["neurons"].sum("neuron"), data["through_mlp"].sum("pos"), atol=1e-9)
    assert float(data["neurons"].max()) > 1e-3


def test_a_parallel_block_lets_its_mlp_read_before_attention() -> None:
    """Then what goes through the MLP is in the stream before the layer at the same position, and in no head."""
    it = model("gpt_neox-parallel")
    data = mt.explain.flow(it, PROMPT, verify=0)
    assert "2.resid_mid" not in it.run([PROMPT], capture="*.resid_pre")
    last, mlp = data["stream"].values[2], float(data["through_mlp"][2, -1])
    assert last[-1] >= mlp > 0.01
    assert float(data["heads"][2].sum()) <= 1 - mlp + 1e-9


@pytest.mark.parametrize(
    ("given", "problem", "match"),
    [
        ({"prompt": [PROMPT, PROMPT]}, mt.errors.PromptError, "one prompt at a time; got 2"),
        ({"position": 9}, mt.errors.PromptError, "the prompt has no position 9"),
        ({"answer": [11, 12]}, mt.errors.PromptError, "one answer"),
        ({"answer": 11, "foil": 11}, mt.errors.PromptError, "the foil equals the answer"),
        ({"threshold": 2.0}, mt.errors.ArgumentError, "threshold must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: dict[str, object], problem: type[Exception], match: str) -> None:
    with pytest.raises(problem, match=match):
        mt.explain.flow(model(), **({"prompt": PROMPT} | given))  # type: ignore[arg-type]


def test_neurons_of_experts_are_refused() -> None:
    with pytest.raises(mt.errors.SiteError, match="cannot be split by neuron"):
        mt.explain.flow(model("mixtral"), PROMPT, neurons=True)
