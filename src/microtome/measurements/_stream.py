"""The residual stream layer by layer: norms, what each branch adds, and how much a block rotates it.

Formula:  over all tokens but the first of each row (which attention sinks inflate):
          attn_share = mean |attn_out| / |resid_pre|,   mlp_share = mean |mlp_out| / |resid before the MLP's sum|,
          attn_cos = mean cos(resid_pre, attn_out),     mlp_cos = mean cos(resid before, mlp_out),
          block_cos = mean cos(resid_pre, resid_post),  block_influence = 1 - block_cos;
          max_abs of |resid_post| over all tokens, median_abs the mean over 32 positions per row of each one's median.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.method import Column, Seen, Source, measure

SIZE = "none: a size, to compare with other layers"
ANGLE = "none: unrelated directions have a cosine within about 1 / sqrt(d_model) of 0"
NORMS = "Residual stream norm"
ADDED = "Norm of what a branch adds, relative to the stream"
COSINES = "Cosine with the residual stream"
LARGEST = "Largest and median activation"
REST = "each row's first token left out"


def _norm(name: str, meaning: str, title: str) -> Column:
    return Column(name, "norm", meaning, SIZE, (0, None), title=title, chart=NORMS, log=True)


def _cosine(name: str, meaning: str, title: str) -> Column:
    return Column(name, "cosine", meaning, ANGLE, (-1, 1), title=title, chart=COSINES)


def _share(name: str, part: str, title: str) -> Column:
    meaning = f"mean norm of what {part} adds, divided by the norm of what it is added to"
    return Column(name, "ratio", meaning, SIZE, (0, None), title=title, chart=ADDED, log=True)


@measure(
    "stream",
    of="layer",
    sites=("resid_pre", "attn_out", "mlp_out", "resid_post"),
    optional="resid_mid",
    title="residual stream by layer",
    question="How large is the residual stream, and how much does each branch and block change it?",
    columns=(
        _norm("resid_pre_norm", f"mean norm of the residual stream before the layer, {REST}", "before"),
        _norm("resid_mid_norm", f"mean norm between attention and MLP, {REST}", "between"),
        _norm("resid_post_norm", f"mean norm after the layer, {REST}", "after"),
        _norm("resid_post_norm_first", "mean norm after the layer at each row's first token", "after, first token"),
        _share("attn_share", "attention", "attention"),
        _share("mlp_share", "the MLP", "MLP"),
        _cosine("attn_cos", "mean cosine between what attention adds and what it is added to", "attention"),
        _cosine("mlp_cos", "mean cosine between what the MLP adds and what it is added to", "MLP"),
        _cosine("block_cos", "mean cosine between a block's input and its output", "block"),
        Column("block_influence", "1", "1 - block_cos: how much a block rotates the residual stream", ANGLE, (0, 2)),
        Column(
            "median_abs", "activation", "median absolute value of a token after the layer, over 32 positions per row",
            SIZE, (0, None), title="median", chart=LARGEST, log=True,
        ),
    ),
    source=(
        Source("Elhage et al.", "A Mathematical Framework for Transformer Circuits", 2021, where="residual stream"),
        Source(
            "Men et al.", "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
            "2403.03853", "block influence",
        ),
    ),
    cost="a few products of the stream with itself per layer; only one sum per row is kept",
    check="tests/laws/test_measures.py",
)  # fmt: skip
def stream(seen: Seen) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Norms, branch shares and cosines of the residual stream, layer by layer, with intervals over rows."""
    pre, attn, mlp, post = (at_least_float32(seen[n]) for n in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    before = at_least_float32(seen["resid_mid"]) if "resid_mid" in seen else pre
    norm = {name: x.norm(dim=-1) for name, x in (("pre", pre), ("post", post), ("attn", attn), ("mlp", mlp))}
    norm["before"] = before.norm(dim=-1) if before is not pre else norm["pre"]
    floor = torch.finfo(post.dtype).tiny

    def cosine(a: Tensor, b: Tensor, of: str, other: str) -> Tensor:
        return (a * b).sum(-1) / (norm[of] * norm[other]).clamp(min=floor)

    turn = cosine(pre, post, "pre", "post")
    found = {
        "resid_pre_norm": norm["pre"], "resid_post_norm": norm["post"],
        "attn_share": norm["attn"] / norm["pre"].clamp(min=floor),
        "mlp_share": norm["mlp"] / norm["before"].clamp(min=floor),
        "attn_cos": cosine(pre, attn, "pre", "attn"), "mlp_cos": cosine(before, mlp, "before", "mlp"),
        "block_cos": turn, "block_influence": 1 - turn,
    }  # fmt: skip
    found |= {"resid_mid_norm": norm["before"]} if before is not pre else {}
    later = seen.later
    first = torch.zeros_like(later)
    first[:, 0] = True
    some = torch.zeros_like(later)
    step = max(1, post.shape[1] // 32)
    some[:, step - 1 :: step] = True
    median = torch.zeros_like(norm["post"])
    median[:, step - 1 :: step] = post[:, step - 1 :: step].abs().median(-1).values
    masked = {name: (x, later) for name, x in found.items()}
    return masked | {"resid_post_norm_first": (norm["post"], first), "median_abs": (median, some)}
