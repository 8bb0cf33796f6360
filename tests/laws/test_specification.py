"""A Llama written from its specification, in plain tensors, against every site; and the axes of every site.

    x_0 = E[token];                   n(x, g) = g x / sqrt(mean(x^2) + eps)
    q, k, v = W n(x, g_attn), each head by itself; pairs (j, j + d/2) of q and k turned by position * theta^(-2j/d)
    pattern = softmax over k <= q of (q . k) / sqrt(d);   z = sum_k pattern v_k;   x += sum over heads of z W_O
    x += W_down (silu(W_gate n(x, g_mlp)) * W_up n(x, g_mlp));   logits = W_U n(x, g)

Nothing here is of the package or of transformers but the numbers of the weights.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.anatomy import SITES, Site

TOKENS = torch.randint(3, families.VOCAB, (2, 10), generator=torch.Generator().manual_seed(7))
TOLERANCE = 1e-5


def specification(hf: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every activation of a Llama by its address, from its weights alone."""
    c, weight = hf.config, {name: x.detach() for name, x in hf.state_dict().items()}
    heads, groups, eps = c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps
    told: dict[str, Tensor] = {}
    x = weight["model.embed_tokens.weight"][tokens]
    told["embed"] = x

    def scale(x: Tensor) -> Tensor:
        return (x.pow(2).mean(-1) + eps).sqrt()

    for i in range(c.num_hidden_layers):
        at, own = f"{i}.", f"model.layers.{i}."
        told[f"{at}resid_pre"] = x
        told[f"{at}attn.scale"] = scale(x)
        read = x / scale(x).unsqueeze(-1) * weight[f"{own}input_layernorm.weight"]
        told[f"{at}attn.in"] = read
        made = {n: read @ weight[f"{own}self_attn.{n}_proj.weight"].T for n in "qkv"}
        q, k, v = (made[n].unflatten(-1, (size, -1)) for n, size in (("q", heads), ("k", groups), ("v", groups)))
        q, k = (turned(y, c.rope_parameters["rope_theta"]) for y in (q, k))
        told |= {f"{at}attn.q": q, f"{at}attn.k": k, f"{at}attn.v": v}
        every = torch.arange(heads) // (heads // groups)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, every]) / math.sqrt(q.shape[-1])
        told[f"{at}attn.scores"] = scores
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        pattern = scores.masked_fill(~seen, -math.inf).softmax(-1)
        told[f"{at}attn.pattern"] = pattern
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v[:, :, every])
        told[f"{at}attn.z"] = z
        out = weight[f"{own}self_attn.o_proj.weight"].T.unflatten(0, (heads, -1))
        told[f"{at}attn.result"] = torch.einsum("bqhd,hdm->bqhm", z, out)
        told[f"{at}attn_out"] = told[f"{at}attn.result"].sum(2)
        x = x + told[f"{at}attn_out"]
        told[f"{at}resid_mid"] = x
        told[f"{at}mlp.scale"] = scale(x)
        read = x / scale(x).unsqueeze(-1) * weight[f"{own}post_attention_layernorm.weight"]
        told[f"{at}mlp.in"] = read
        gate, up = (read @ weight[f"{own}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        told |= {f"{at}mlp.gate": gate, f"{at}mlp.up": up}
        told[f"{at}mlp.post"] = gate / (1 + (-gate).exp()) * up
        told[f"{at}mlp_out"] = told[f"{at}mlp.post"] @ weight[f"{own}mlp.down_proj.weight"].T
        x = x + told[f"{at}mlp_out"]
        told[f"{at}resid_post"] = x
    told["final.scale"] = scale(x)
    told["final"] = x / scale(x).unsqueeze(-1) * weight["model.norm.weight"]
    told["logits"] = told["final"] @ weight["lm_head.weight"].T
    return told


def turned(x: Tensor, theta: float) -> Tensor:
    """[batch, pos, head, d_head] with its pairs (j, j + d/2) turned by position * theta^(-2j/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).unsqueeze(1) * theta ** (-torch.arange(half) / half)
    cos, sin = (f(angle).unsqueeze(1) for f in (torch.cos, torch.sin))
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "llama-mha"])
def test_every_site_of_a_llama_is_what_its_specification_says(name: str) -> None:
    hf = families.build(name)
    model = mt.open(hf, prove=False)
    expected = specification(hf, TOKENS)
    points = {str(site) for site in model.anatomy.hook_points}
    assert points == expected.keys(), "the specification has every site, and no other"
    run = model.run(TOKENS, capture=[address for address in expected if address != "logits"])
    found = {address: run[address] for address in expected if address != "logits"} | {"logits": run.logits}
    for address, value in expected.items():
        if address.endswith("attn.scores"):  # what a mask forbids has no score of its own
            seen = torch.ones(value.shape[-2:], dtype=torch.bool).tril()
            assert (found[address] - value)[..., seen].abs().max() < TOLERANCE, address
            assert (found[address][..., ~seen] < -1e4).all(), address
            continue
        assert found[address].shape == value.shape, address
        assert (found[address] - value).abs().max() < TOLERANCE * max(1, float(value.abs().max())), address


def test_a_specification_that_is_wrong_is_noticed() -> None:
    """One head's values from the next group: a mistake that shapes do not show."""
    hf = families.build("llama-gqa")
    right = specification(hf, TOKENS)
    weight = hf.model.layers[1].self_attn.v_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(weight.shape[0] // 2, 0))
    wrong = specification(hf, TOKENS)
    assert (right["1.attn.q"] - wrong["1.attn.q"]).abs().max() == 0
    assert (right["1.attn.z"] - wrong["1.attn.z"]).abs().max() > 1e-2


def sizes(model: mt.Model, site: Site, rank: int) -> dict[str, int]:
    """The length that each axis of a site must have."""
    a = model.anatomy
    rows, length = TOKENS.shape
    known = {"batch": rows, "pos": length, "q_pos": length, "k_pos": length, "rank": rank, "vocab": a.d_vocab}
    return known | {dim: a.size(site, dim) for dim in site.spec.dims if dim not in known}


QUICK = ("llama-gqa", "gpt2", "mixtral", "gemma2", "deepseek_v3-qlora", "bert")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in families.NAMES])
def test_every_site_of_every_family_has_the_axes_that_it_declares(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    points = list(model.anatomy.hook_points)
    assert {site.name for site in points} <= set(SITES)
    run = model.run(TOKENS, capture=[str(site) for site in points if site.name != "logits"])
    data = run.dataset()
    for site in points:
        x = run.logits if site.name == "logits" else run[str(site)]
        dims = site.spec.dims
        assert x.dim() == len(dims), str(site)
        rank = x.shape[dims.index("rank")] if "rank" in dims else 0  # as many as the router chooses
        expected = sizes(model, site, rank)
        assert dict(zip(dims, x.shape, strict=True)) == {dim: expected[dim] for dim in dims}, str(site)
        if site.name in data:
            own = [
                str(d).rpartition("_")[0] if str(d).rpartition("_")[2].isdigit() else str(d)
                for d in data[site.name].dims
            ]
            assert own == [*(() if site.layer is None else ("layer",)), *dims], str(site)
