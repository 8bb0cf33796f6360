"""Whether a device gives what the CPU gives: one model of random weights on both, and the largest gaps between them.

In float32 a tensor may differ by 1e-4 of its largest value. In bfloat16 the rounding itself is larger, so that three
models of the same rounded weights are compared: float32 on the CPU, which is the truth, and bfloat16 on both. The
device may be as far from the truth as three times what the CPU is, plus four epsilons (2^-5) of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import xarray as xr
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import microtome as mt
import tokenizers
from microtome.atlas import measures_of
from microtome.edit import (
    Add,
    Apply,
    Clamp,
    Edit,
    KnockOut,
    Mean,
    Noise,
    Patch,
    Project,
    Repeat,
    Rotate,
    Scale,
    ScaleBlock,
    Set,
    Skip,
    Zero,
)
from microtome.method import refused

TIGHT = 1e-4
"""Of the largest value of a tensor, in float32."""

LAYERS, HEADS, WIDTH, NEURONS, VOCAB, POSITIONS = 4, 8, 128, 320, 211, 12
CLEAN, CORRUPT, ANSWER, FOIL = 1, 2, 17, 101
Found = dict[str, Tensor]
"""Tensors by name, in float64 on the CPU."""


class Disagreement(Exception):
    """Two results that must be equal to rounding are not."""


@cache
def _weights() -> LlamaForCausalLM:
    """A small llama whose weights are bfloat16 numbers, large enough that every head attends unevenly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=64, initializer_range=0.08,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    return hf.to(torch.bfloat16).to(torch.float32)


@cache
def opened(device: str, dtype: torch.dtype) -> mt.Model:
    """The model on a device, its map proven there."""
    return mt.open(deepcopy(_weights()).to(device, dtype), tokenizer=_words())


@cache
def _words() -> PreTrainedTokenizerFast:
    """A word for every token, of which the first ones end sentences and lines."""
    words = [".", ",", "\n", *(f"w{i}" for i in range(VOCAB - 3))]
    made = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def tokens(seed: int, rows: int = 1, length: int = POSITIONS) -> Tensor:
    """Random token ids; those of two seeds differ at the first position and every third one."""
    made = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    other = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    made[:, ::3] = other[:, ::3]
    return made


def vector(size: int, seed: int = 0) -> Tensor:
    """A direction, on the CPU as anybody would give it."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def plain(x: Any) -> Tensor:
    """A result as float64 on the CPU; what a mask forbids is 0, NaN stays."""
    x = torch.as_tensor(x).detach().cpu()
    if x.dtype.is_floating_point:
        x = torch.where(x <= torch.finfo(x.dtype).min / 64, torch.zeros_like(x), x)
    return x.double()


# ------------------------------------------------------------------------------------------------ what is compared


def capture(model: mt.Model) -> Found:
    """Every site of every layer, the logits, and the logits of padded rows."""
    names = dict.fromkeys(site.name for site in model.anatomy.hook_points if site.layer is not None)
    wanted = [*(f"*.{name}" for name in names), "embed", "final"]
    run = model.run(tokens(CLEAN, rows=2), capture=wanted)
    found = {str(address): plain(x) for address, x in run.captured.items()} | {"logits": plain(run.logits)}
    rows = [tokens(CLEAN)[0], tokens(CORRUPT)[0, :7]]
    for side in ("left", "right"):
        padded = model.run(rows, padding=side)
        found[f"logits padded {side}"] = plain(padded.logits[padded.mask])
    return found


def edits_of(source: Any) -> dict[str, list[Edit]]:
    """One list of edits for every kind that there is, with values on the CPU."""
    turn, _ = torch.linalg.qr(vector(WIDTH * WIDTH).reshape(WIDTH, WIDTH))
    return {
        "zero": [Zero("1.attn.z[3]@-1")], "zero pattern": [Zero("2.attn.pattern[1]")],
        "set": [Set("1.mlp.post[5-9]", value=0.5)], "set by position": [Set("1.attn_out", value=vector(WIDTH))],
        "add": [Add("2.resid_post@3", value=vector(WIDTH), strength=2.0)],
        "scale": [Scale("0.mlp.post[5-90]", factor=3.0)],
        "patch": [Patch("1.resid_pre@4", source=source)], "patch heads": [Patch("2.attn.z[0-3]", source=source)],
        "patch subspace": [Patch("2.resid_pre", source=source, basis=torch.stack([vector(WIDTH), vector(WIDTH, 1)]))],
        "mean": [Mean("2.attn_out@2-8")], "project": [Project("1.resid_post", basis=vector(WIDTH))],
        "rotate": [Rotate("1.mlp_out", matrix=turn)], "clamp": [Clamp("1.mlp.post", low=-0.1, high=0.2)],
        "apply": [Apply("3.mlp.in", function=torch.tanh)], "noise": [Noise("embed@0-2", std=0.1)],
        "knock out": [KnockOut("1.attn.scores@10-11", keys="2-3")], "skip": [Skip(1)], "repeat": [Repeat(2, times=2)],
        "scale block": [ScaleBlock("1-2", factor=0.5)],
        "several": [Zero("0.attn.z[1]"), Add("1.resid_post@last", value=vector(WIDTH)), Skip(3)],
    }  # fmt: skip


def edits(model: mt.Model) -> Found:
    """Logits under every kind of edit, from a run of this device and from one of the CPU; and a steered generation."""
    source = model.run(tokens(CORRUPT), capture=["*.resid_pre", "*.attn.z"], logits=False)
    found = {name: plain(model.run(tokens(CLEAN), edits=e).logits) for name, e in edits_of(source).items()}
    elsewhere = {str(address): x.cpu() for address, x in source.captured.items()}
    found["patch from the CPU"] = plain(model.run(tokens(CLEAN), edits=Patch("1.resid_pre@4", source=elsewhere)).logits)
    given = model.run(tokens(CLEAN), capture="2.resid_pre")["2.resid_pre"]
    found["started"] = plain(model.run(tokens(CLEAN), start_at=2, given=given.cpu().to(given.device)).logits)
    ids = tokens(CLEAN).to(model.device)
    with model.editing(Add("2.resid_post@last", value=vector(WIDTH))):
        out = model.hf.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, min_new_tokens=6,
            pad_token_id=0,
        )  # fmt: skip
    if model.dtype == torch.float32:  # a near tie of two tokens is decided by the rounding
        found["steered generation"] = plain(out)
    return found


def _metric() -> Any:
    return mt.metric.LogitDifference(ANSWER, foil=FOIL)


def sweep(model: mt.Model) -> Found:
    """Every layer and position, every head and every neuron block as cells of a sweep, and two prompts in one sweep."""
    source = model.run(tokens(CORRUPT), capture=["*.resid_pre", "*.attn.z", "*.mlp_out"], logits=False)
    cells: list[Any] = [Patch(f"{i}.resid_pre@{p}", source=source) for i in range(LAYERS) for p in range(POSITIONS)]
    cells += [Patch(f"{i}.attn.z[{h}]", source=source) for i in range(LAYERS) for h in range(HEADS)]
    cells += [Zero(f"{i}.mlp.post[{8 * k}-{8 * k + 7}]") for i in range(LAYERS) for k in range(10)]
    cells += [[Zero(f"{i}.attn.z[2]"), Add(f"{i}.resid_post@5", value=vector(WIDTH))] for i in range(LAYERS)]
    swept = model.sweep(tokens(CLEAN), cells, _metric()).run().whole()
    found = {"values": plain(swept.values), "base": plain(swept.base)}
    if model.dtype == torch.float32:
        literal = [model.run(tokens(CLEAN), edits=cells[i]).logits[0, -1] for i in range(0, len(cells), 9)]
        one_by_one = torch.stack([plain(x[ANSWER] - x[FOIL]) for x in literal])
        gap, largest = float((plain(swept.values[::9]) - one_by_one).abs().max()), float(one_by_one.abs().max())
        if gap > TIGHT * largest:
            raise Disagreement(
                f"a sweep and literal runs of its cells differ by {gap:.3g}, allowed {TIGHT * largest:.3g}"
            )
    both = torch.cat([tokens(CLEAN), tokens(CORRUPT)])
    two = model.sweep(both, cells[:20] * 2, _metric(), prompts=[0] * 20 + [1] * 20).run().whole()
    return found | {"two prompts": plain(two.values)}


def edges(model: mt.Model) -> Found:
    """Single edges in a sweep, and all nodes and edges of a pair."""
    source = model.run(tokens(CORRUPT), capture=["embed", "*.attn.z", "*.mlp_out"], logits=False)
    cells = [
        mt.sweep.Edge(sender, receiver, source=source)
        for sender, receiver in (
            ("embed", "1.attn.q[3]"), ("0.attn.z[5]", "2.attn.k[4]"), ("1.mlp_out", "3.attn.v[0]"),
            ("0.mlp_out", "2.mlp.in"), ("2.attn.z[1]", "final"), ("embed@3-5", "final"),
        )
    ]  # fmt: skip
    given: dict[str, Any] = {"answer": ANSWER, "foil": FOIL, "direction": "noise"}
    pair = tokens(CLEAN), tokens(CORRUPT)
    found = {"cells": plain(model.sweep(tokens(CLEAN), cells, _metric()).run().whole().values)}
    found |= _numbers("nodes", mt.explain.node_effects(model, *pair, **given))
    return found | _numbers("edges", mt.explain.edge_effects(model, *pair, **given))


def attribution(model: mt.Model) -> Found:
    """Scores of nodes and edges by their gradients, with the best measured exactly, and contributions."""
    found: Found = {}
    for method in ("atp", "relp", "eap"):
        data = mt.explain.attribute(model, tokens(CLEAN), tokens(CORRUPT), answer=ANSWER, foil=FOIL, method=method,
                                    verify=4)  # fmt: skip
        # Which cells are the best is decided by the rounding where two are alike: what is measured is of those.
        found |= _numbers(method, data[[*data.attrs["sites"], "clean", "corrupt"]])
    data = mt.explain.contributions(model, tokens(CLEAN), answer=ANSWER, foil=FOIL)
    return found | _numbers("contributions", data.drop_vars("gap"))  # a gap is nothing but rounding


def methods_of_pairs(model: mt.Model) -> Found:
    """The other causal methods, and the lens."""
    given: dict[str, Any] = {"answer": ANSWER, "foil": FOIL}
    found = _numbers("patch", mt.explain.patch(model, tokens(CLEAN), tokens(CORRUPT), **given))
    found |= _numbers("knockout", mt.explain.attention_knockout(model, tokens(CLEAN), keys=(2, 4), answer=ANSWER))
    found |= _numbers("trace", mt.explain.causal_trace(model, tokens(CLEAN), subject=(1, 3), answer=ANSWER, samples=2))
    lens = mt.explain.logit_lens(model, tokens(CLEAN))
    return found | _numbers("lens", lens[[name for name in lens if lens[name].dtype.kind == "f"]])


def measures(model: mt.Model) -> Found:
    """The columns of all measures of the default atlas over two batches of tokens."""
    lacking = refused(model)
    names = [name for name in measures_of("default") if lacking[name] is None]
    data = mt.measure(model, *names, text=tokens(CLEAN, rows=6, length=32), rows=3, sequences=4, period=12)
    rounded = [name for name in data.data_vars if str(name).endswith("_around")]  # of the rows chosen, to eight bits
    return _numbers("", data.drop_vars(rounded))


def _numbers(name: str, data: xr.Dataset) -> Found:
    """The numeric variables of a result, without indices, whose order at near ties is the rounding's."""
    return {f"{name} {key}".strip(): plain(x.values) for key, x in data.data_vars.items() if x.dtype.kind == "f"}


# ------------------------------------------------------------------------------------------------- how it is compared


@cache
def _on_cpu(name: str, dtype: torch.dtype) -> Found:
    """What the CPU gives."""
    return CHECKS[name](opened("cpu", dtype))


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors; infinite where shapes differ or one is not finite where the other is."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    return float(torch.where(a.isfinite(), a - b, torch.zeros_like(a)).abs().max()) if a.numel() else 0.0


def largest(x: Tensor) -> float:
    """The largest absolute value that is finite."""
    return float(torch.where(x.isfinite(), x, torch.zeros_like(x)).abs().max()) if x.numel() else 0.0


def compare(here: Found, there: Found, truth: Found | None) -> dict[str, Any]:
    """The largest gap in units of what is allowed, and where it is.

    Args:
        here: what the CPU gives.
        there: what the device gives.
        truth: what float32 gives on the CPU, where the others are bfloat16.

    Raises:
        Disagreement: a gap is larger than allowed; names the worst ones.
    """
    if here.keys() != there.keys():
        raise Disagreement(f"only one of them has {sorted(here.keys() ^ there.keys())}")
    ratios: dict[str, float] = {}
    for name, x in there.items():
        if truth is None:
            off, allowed = gap(here[name], x), TIGHT * largest(here[name])
        else:
            rounding = 4 * torch.finfo(torch.bfloat16).eps * largest(truth[name])
            off, allowed = gap(truth[name], x), 3 * gap(truth[name], here[name]) + rounding
        ratios[name] = 0.0 if off == 0 else off / allowed if allowed else float("inf")
    worst = sorted(ratios, key=lambda name: -ratios[name] if ratios[name] == ratios[name] else -float("inf"))[:5]
    said = {name: round(ratios[name], 4) for name in worst}
    if not all(ratio <= 1 for ratio in ratios.values()):
        raise Disagreement(f"gaps in units of what is allowed: {said}")
    return {"tensors": len(ratios), "largest gap / allowed": said[worst[0]], "worst": said}


def check(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Run one check on the CPU and on the device, and compare them."""
    truth = None if dtype == torch.float32 else _on_cpu(name, torch.float32)
    return compare(_on_cpu(name, dtype), CHECKS[name](opened(str(device), dtype)), truth)


CHECKS: Mapping[str, Callable[[mt.Model], Found]] = {
    "capture": capture, "edits": edits, "sweep": sweep, "edges": edges, "attribution": attribution,
    "other methods": methods_of_pairs, "measures": measures,
}  # fmt: skip
