"""A planted model opens from standard arrays, computes what they say, comes back the same; broken ones are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.activations import ACT2FN

import microtome as mt
from microtome import planted

SIZES = {
    "n_layers": 2,
    "d_model": 12,
    "n_heads": 3,
    "d_head": 5,
    "d_mlp": 9,
    "d_vocab": 7,
    "d_vocab_out": 4,
    "n_ctx": 10,
}
FORMS = list(itertools.product(("none", "rms", "layer"), ("causal", "bidirectional")))


def arrays(normalization: str, seed: int = 0) -> dict[str, Tensor]:
    """Random arrays, shapes written out once more, as a folder made elsewhere would have them."""
    s, generator = SIZES, torch.Generator().manual_seed(seed)
    heads = [s["n_heads"], s["d_model"], s["d_head"]]
    shapes: dict[str, list[int]] = {
        "embed.W_E": [s["d_vocab"], s["d_model"]],
        "pos_embed.W_pos": [s["n_ctx"], s["d_model"]],
        "unembed.W_U": [s["d_model"], s["d_vocab_out"]],
        "unembed.b_U": [s["d_vocab_out"]],
    }
    norms = ["ln_final"]
    for i in range(s["n_layers"]):
        at = f"blocks.{i}"
        shapes |= {f"{at}.attn.W_{x}": heads for x in "QKV"} | {f"{at}.attn.b_{x}": heads[::2] for x in "QKV"}
        shapes |= {f"{at}.attn.W_O": [heads[0], heads[2], heads[1]], f"{at}.attn.b_O": [s["d_model"]]}
        shapes |= {f"{at}.mlp.W_in": [s["d_model"], s["d_mlp"]], f"{at}.mlp.b_in": [s["d_mlp"]]}
        shapes |= {f"{at}.mlp.W_out": [s["d_mlp"], s["d_model"]], f"{at}.mlp.b_out": [s["d_model"]]}
        norms += [f"{at}.ln1", f"{at}.ln2"]
    for norm in norms:
        shapes |= {} if normalization == "none" else {f"{norm}.w": [s["d_model"]]}
        shapes |= {f"{norm}.b": [s["d_model"]]} if normalization == "layer" else {}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path: Path, norm: str, direction: str, **changes: Any) -> Path:
    path.mkdir()
    config = SIZES | {"act_fn": "gelu", "normalization": norm, "attention_dir": direction} | changes
    (path / "config.json").write_text(json.dumps(config))
    save_file(arrays(norm), path / "model.safetensors")
    return path


def by_hand(w: dict[str, Tensor], tokens: Tensor, form: tuple[str, str], divisor: float, places: Tensor) -> Tensor:
    """The forward, written with einsum over the standard arrays."""
    normalization, direction = form

    def norm(x: Tensor, name: str) -> Tensor:
        if normalization == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if normalization == "layer" else x
        y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.w"]
        return y + w[f"{name}.b"] if normalization == "layer" else y

    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][places]
    for i in range(SIZES["n_layers"]):
        a, m = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        read = norm(x, f"blocks.{i}.ln1")
        q, k, v = (torch.einsum("bpd,hdk->bhpk", read, w[f"{a}.W_{n}"]) + w[f"{a}.b_{n}"][None, :, None] for n in "QKV")
        scores = q @ k.transpose(-1, -2) / divisor
        if direction == "causal":
            ahead = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
            scores = scores.masked_fill(ahead, -torch.inf)
        z = scores.softmax(-1) @ v
        x = x + torch.einsum("bhpk,hkd->bpd", z, w[f"{a}.W_O"]) + w[f"{a}.b_O"]
        read = norm(x, f"blocks.{i}.ln2")
        x = x + ACT2FN["gelu"](read @ w[f"{m}.W_in"] + w[f"{m}.b_in"]) @ w[f"{m}.W_out"] + w[f"{m}.b_out"]
    return norm(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("divisor", [None, 1.7])
def test_it_computes_what_the_arrays_say(tmp_path: Path, form: tuple[str, str], divisor: float | None) -> None:
    changes = {} if divisor is None else {"attn_scale": divisor}
    model = planted.load(folder(tmp_path / "it", *form, **changes)).model
    assert "fails" not in {check.status for check in model.proof}
    assert model.anatomy.attention == "interface"
    assert model.anatomy.causal == (form[1] == "causal")
    tokens = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(1))
    places = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(s))[:6] for s in range(3)])
    for positions in (None, places):
        got = model.hf(input_ids=tokens, position_ids=positions).logits
        at = torch.arange(6).expand(3, 6) if positions is None else positions
        expected = by_hand(arrays(form[0]), tokens, form, divisor or 5**0.5, at)
        assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_a_round_trip_changes_nothing(tmp_path: Path, form: tuple[str, str]) -> None:
    first = planted.load(folder(tmp_path / "first", *form, attn_scale=3.0))
    truth = {"nodes": ["embed", "L1.head.2", "output"], "edges": [["embed", "L1.head.2", "v"]], "why": "for a test"}
    second = planted.load(planted.save(first.model, tmp_path / "second", truth=truth))
    assert second.truth == truth
    assert first.truth == {}
    before, after = (
        load_file(tmp_path / "first" / "model.safetensors"),
        load_file(tmp_path / "second" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = [[1, 2, 3, 4], [4, 3, 2, 1]]
    assert torch.equal(first.model.run(tokens).logits, second.model.run(tokens).logits)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_sweeps_and_padding_hold(tmp_path: Path, form: tuple[str, str]) -> None:
    """Sharing of positions needs the cache, and padding the mask: both are the planted model's own code."""
    model = planted.load(folder(tmp_path / "it", *form)).model
    cells = [mt.edit.Zero(f"{i}.attn.z[{h}]@{p}") for i in range(2) for h in range(3) for p in range(6)]
    cells += [mt.edit.Zero(f"{i}.mlp.post[{n}]@{p}") for i in range(2) for n in (0, 5) for p in range(6)]
    prompt, metric = [1, 2, 3, 4, 5, 6], mt.metric.LogitDifference(answer=0, foil=1)
    values = [model.run(prompt, edits=[c]).logits[0, -1] for c in cells]
    literal = torch.stack([v[0] - v[1] for v in values])
    swept = model.sweep(prompt, cells, metric).run()
    assert (swept.values - literal).abs().max() < 1e-5
    assert swept.effects.abs().max() > 1e-2
    for side in ("left", "right"):
        both = model.run([prompt, prompt[:3]], padding=side).logits
        alone = model.run(prompt[:3]).logits[0]
        assert (both[1, :3] if side == "right" else both[1, 3:]).sub(alone).abs().max() < 1e-5


def test_an_absent_norm_is_the_identity(tmp_path: Path) -> None:
    """Where no norm stands its scale is one, so that whatever reads through norms needs no second way."""
    model = planted.load(folder(tmp_path / "it", "none", "causal")).model
    run = model.run([1, 2, 3], capture=["*.attn.scale", "final.scale", "1.resid_post", "*.resid_mid", "*.mlp.in"])
    assert bool((run["final.scale"] == 1).all())
    assert torch.equal(run["0.mlp.in"], run["0.resid_mid"])
    assert (model.unembed(run["1.resid_post"]) - run.logits).abs().max() < 1e-5
    halved = model.run([1, 2, 3], edits=[mt.edit.Set("final.scale", 2.0)]).logits
    assert (halved - (run.logits - model.b_U) / 2 - model.b_U).abs().max() < 1e-5
    parts = mt.explain.contributions(model, [1, 2, 3], answer=1)
    assert abs(parts["gap"]).max() < 1e-5


def test_vocabularies_in_and_out_may_differ(tmp_path: Path) -> None:
    model = planted.load(folder(tmp_path / "it", "rms", "causal")).model
    assert model.anatomy.d_vocab == 7
    assert model.run([6, 5]).logits.shape == (1, 2, 4)
    assert model.run([6, 5], capture="logits").dataset()["logits"].sizes["vocab"] == 4
    with pytest.raises(mt.errors.PromptError, match="got 7; allowed: 0 to 6"):
        model.run([7])


def test_edges_are_counted(tmp_path: Path) -> None:
    model = planted.load(folder(tmp_path / "it", "none", "causal")).model
    layers, heads = 2, 3
    before = [2 + i * (heads + 1) for i in range(layers + 1)]
    expected = sum((3 * heads + 1) * n + heads for n in before[:-1]) + before[-1]
    found = planted.edges(model)
    assert len(found) == len(set(found)) == expected
    order = planted.nodes(model)
    assert all(order.index(u) < order.index(v) for u, v, _ in found)


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda held: held.pop(name)


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (without("blocks.1.attn.W_K"), r"has no array blocks\.1\.attn\.W_K; allowed: shape \[3, 12, 5\]"),
    "misshapen": (
        lambda held: held.update({"blocks.0.mlp.W_in": torch.zeros(9, 12)}),
        r"array blocks\.0\.mlp\.W_in in .* is misshapen; got \[9, 12\]; allowed: \[12, 9\]",
    ),
    "unknown": (
        lambda held: held.update({"blocks.0.attn.W_Z": torch.zeros(2)}),
        r'no such model has: blocks\.0\.attn\.W_Z\. Did you mean "blocks\.0\.attn\.W_',
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_arrays_are_named(tmp_path: Path, fault: str) -> None:
    damage, message = BROKEN[fault]
    path = folder(tmp_path / "it", "layer", "causal")
    held = arrays("layer")
    damage(held)
    save_file(held, path / "model.safetensors")
    with pytest.raises(mt.errors.ModelBroken, match=message) as caught:
        planted.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": None}, "gives no n_heads; got None; allowed: a whole number, 1 or more"),
        ({"d_mlp": 0}, "gives no d_mlp; got 0"),
        ({"normalization": "batch"}, "no known normalization; got 'batch'; allowed: none, rms, layer"),
        ({"attention_dir": "up"}, "no known attention_dir; got 'up'; allowed: causal, bidirectional"),
        ({"act_fn": "sine"}, "no known act_fn; got 'sine'"),
        ({"attn_scale": 0}, "no usable attn_scale; got 0; allowed: a number above 0"),
        ({"d_model": 13}, r"the array embed\.W_E in .* got \[7, 12\]; allowed: \[7, 13\]"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(mt.errors.ModelBroken, match=message):
        planted.load(folder(tmp_path / "it", "none", "causal", **change))


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"nodes": ["L0.head.3"]}, 'has not: "L0.head.3". Did you mean "L0.head'),
        ({"nodes": ["embed", "output"], "edges": [["output", "embed", "in"]]}, "an edge that it does not have"),
        ({"nodes": None}, "the nodes of a truth are not a list; got None"),
        ({"nodes": 5, "edges": []}, "the nodes of a truth are not a list; got 5"),
        ({"nodes": [["embed"]]}, r"a node that is not text; got \['embed'\]"),
        ({"nodes": [1]}, "a node that is not text; got 1"),
        ({"nodes": ["embed"], "edges": None}, "the edges of a truth are not a list; got None"),
        ({"nodes": ["embed"], "edges": {"embed": "output"}}, "the edges of a truth are not a list"),
        ({"nodes": ["embed"], "edges": [["embed", ["x"], "in"]]}, "an edge that it does not have"),
        ({"nodes": ["embed"], "edges": [5]}, "an edge that it does not have; got 5"),
        ({"nodes": ["embed"], "edges": [["embed", "output", "in"]]}, "ends at output, which is not one of its nodes"),
    ],
)
def test_a_wrong_truth_is_named(tmp_path: Path, truth: dict[str, Any], message: str) -> None:
    path = folder(tmp_path / "it", "none", "causal")
    (path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(mt.errors.DataError, match=message):
        planted.load(path)


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(mt.errors.ModelNotFound, match="holds no planted model: it has no config.json"):
        planted.load(tmp_path)
    path = folder(tmp_path / "it", "none", "causal")
    model = planted.load(path).model
    with pytest.raises(mt.errors.OutputError, match="exists already"):
        planted.save(model, path)
    with pytest.raises(mt.errors.DataError, match="has not"):
        planted.save(model, tmp_path / "new", truth={"nodes": ["L7.mlp"]})
    assert not (tmp_path / "new").exists()
    (path / "config.json").write_text("{")
    with pytest.raises(mt.errors.ModelBroken, match=r"config\.json is not JSON"):
        planted.load(path)
    (path / "config.json").write_text(json.dumps(SIZES | {"act_fn": "relu", "normalization": "none"}))
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(mt.errors.ModelBroken, match="no known attention_dir; got None"):
        planted.load(path)
