"""The residual stream layer by layer: norms, what each branch adds, and how much a block rotates it.

Formula:  over all tokens but the first of each row (which attention sinks inflate):
          attn_share = mean |attn_out| / |resid_pre|,   mlp_share = mean |mlp_out| / |resid before the MLP's sum|,
          attn_cos = mean cos(resid_pre, attn_out),     mlp_cos = mean cos(resid before, mlp_out),
          the same of mixers that are no attention; of branches that a layer has not, there is NaN;
          block_cos = mean cos(resid_pre, resid_post),  block_influence = 1 - block_cos;
          their controls: the same with the second vector of the token half the row away, round its end (streams share
          a direction, so that those of unrelated tokens are not at right angles);
          max_abs of |resid_post| over all tokens, median_abs the mean over 32 positions per row of each one's median.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.method import Column, Seen, Source, measure

SIZE = "none: a size, to compare with other layers"
NORMS = "Residual stream norm"
ADDED = "Norm of what a branch adds, relative to the stream"
COSINES = "Cosine with the residual stream"
LARGEST = "Largest and median activation"
BRANCHES = ("attn", "mixer", "mlp")
REST = "each row's first token left out"


def _norm(name: str, meaning: str, title: str) -> Column:
    return Column(name, "norm", meaning, SIZE, (0, None), title=title, chart=NORMS, log=True)


def _cosine(name: str, what: str, other: str, title: str) -> tuple[Column, Column]:
    """A cosine, and its control."""
    control = f"the same with {other} half the row away"
    return (
        Column(name, "cosine", f"mean cosine between {what}", f"{name}_elsewhere", (-1, 1), title=title, chart=COSINES),
        Column(f"{name}_elsewhere", "cosine", control, range=(-1, 1), chart=COSINES),
    )


def _share(name: str, part: str, title: str) -> Column:
    meaning = f"mean norm of what {part} adds, divided by the norm of what it is added to"
    return Column(name, "ratio", meaning, SIZE, (0, None), title=title, chart=ADDED, log=True)


@measure(
    "stream",
    of="layer",
    sites=("resid_pre", "resid_post"),
    optional=("resid_mid", *(f"{name}_out" for name in BRANCHES)),
    title="residual stream by layer",
    question="How large is the residual stream, and how much does each branch and block change it?",
    columns=(
        _norm("resid_pre_norm", f"mean norm of the residual stream before the layer, {REST}", "before"),
        _norm("resid_mid_norm", f"mean norm between attention and MLP, {REST}", "between"),
        _norm("resid_post_norm", f"mean norm after the layer, {REST}", "after"),
        _norm("resid_post_norm_first", "mean norm after the layer at each row's first token", "after, first token"),
        _share("attn_share", "attention", "attention"),
        _share("mixer_share", "a mixer that is no attention", "mixer"),
        _share("mlp_share", "the MLP", "MLP"),
        *_cosine("attn_cos", "what attention adds and what it is added to", "what it adds", "attention"),
        *_cosine("mixer_cos", "what a mixer adds and what it is added to", "what it adds", "mixer"),
        *_cosine("mlp_cos", "what the MLP adds and what it is added to", "what it adds", "MLP"),
        *_cosine("block_cos", "a block's input and its output", "the output", "block"),
        Column(
            "block_influence", "1", "1 - block_cos: how much a block rotates the residual stream",
            "block_influence_elsewhere", (0, 2),
        ),
        Column("block_influence_elsewhere", "1", "1 - block_cos_elsewhere", range=(0, 2)),
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
    pre, post = (at_least_float32(seen[name]) for name in ("resid_pre", "resid_post"))
    before = at_least_float32(seen["resid_mid"]) if "resid_mid" in seen else pre
    before = before if before.shape == pre.shape else pre  # of one lane
    added = {name: at_least_float32(seen[f"{name}_out"]) for name in BRANCHES if f"{name}_out" in seen}
    added = {name: x for name, x in added.items() if x.shape == pre.shape}  # lanes have no angle with a branch
    norm = {name: x.norm(dim=-1) for name, x in {"pre": pre, "post": post, **added}.items()}
    norm["before"] = before.norm(dim=-1) if before is not pre else norm["pre"]
    floor = torch.finfo(post.dtype).tiny

    def cosine(a: Tensor, b: Tensor, of: str, other: str) -> Tensor:
        return (a * b).sum(-1) / (norm[of] * norm[other]).clamp(min=floor)

    later = seen.later
    away = half_a_row(pre.shape[1]).to(pre.device, non_blocking=True)

    def elsewhere(a: Tensor, b: Tensor, of: str, other: str) -> Tensor:
        return (a * b[:, away]).sum(-1) / (norm[of] * norm[other][:, away]).clamp(min=floor)

    turn, unrelated = cosine(pre, post, "pre", "post"), elsewhere(pre, post, "pre", "post")
    found = {
        "resid_pre_norm": norm["pre"], "resid_post_norm": norm["post"],
        "block_cos": turn, "block_influence": 1 - turn,
        "block_cos_elsewhere": unrelated, "block_influence_elsewhere": 1 - unrelated,
    }  # fmt: skip
    for name, x in added.items():
        stream, to = (before, "before") if name == "mlp" else (pre, "pre")
        found |= {
            f"{name}_share": norm[name] / norm[to].clamp(min=floor),
            f"{name}_cos": cosine(stream, x, to, name),
            f"{name}_cos_elsewhere": elsewhere(stream, x, to, name),
        }
    found |= {"resid_mid_norm": norm["before"]} if before is not pre else {}
    first = torch.zeros_like(later)
    first[:, 0] = True
    some = torch.zeros_like(later)
    step = max(1, post.shape[1] // 32)
    some[:, step - 1 :: step] = True
    median = torch.zeros_like(norm["post"])
    median[:, step - 1 :: step] = post[:, step - 1 :: step].abs().median(-1).values
    masked = {name: (x, later) for name, x in found.items()}
    return masked | {"resid_post_norm_first": (norm["post"], first), "median_abs": (median, some)}


def half_a_row(length: int) -> Int[Tensor, " pos"]:
    """[pos] For each token but the first the one half a row on, beginning again behind the first at the row's end."""
    place = torch.arange(length)
    if length > 1:
        place[1:] = 1 + (place[1:] - 1 + (length - 1) // 2) % (length - 1)
    return place
