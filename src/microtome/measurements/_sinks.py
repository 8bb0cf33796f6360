"""Attention sinks: how much of later attention the first token of a row receives, and what its value is worth.

Formula:  A the pattern of a head over the T tokens of a row, queries q and keys k counted from 0:
          alpha_k = 1 / (T - k) sum_{q >= k} A[q, k], where q sees 0 .. q; else 1 / T sum_q A[q, k];
          sink_attention = mean over rows of alpha_0;   sink_share = share of rows with alpha_0 > threshold;
          secondary_attention = mean over rows of the largest alpha_k of k in 1 .. T/2 - 1 (keys of the second half have
          so few queries that alpha is large by chance);
          value_drain = mean over rows of |v_0| / median_k |v_k|.
          Controls: sink_uniform, alpha_0 of uniform attention: H_T / T = (1 + 1/2 + .. + 1/T) / T, or 1 / T;
          secondary_uniform, its alpha_1: (H_T - 1) / (T - 1), or 1 / T;
          value_drain_elsewhere, the same of the token in the middle of the row.
          Reported for each group of a text, sink_attention says on which a head is dormant and on which it is active.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.method import Argument, Column, Seen, Source, Text, measure

THRESHOLD = 0.3
"""Of alpha, above which a key is a sink."""
FEW = "none: uniform attention over ten or more tokens has none"


@measure(
    "sinks",
    of="head",
    on=Text(sequences=16, width=128),
    sites="attn.pattern",
    optional="attn.v",
    title="attention sinks",
    question="Which heads send their attention to the first token, or to another token, whatever the query?",
    columns=(
        Column(
            "sink_attention", "share", "mean attention that the first token of a row receives", "sink_uniform", (0, 1),
        ),
        Column("sink_uniform", "share", "the same for uniform attention", range=(0, 1), interval=False),
        Column("sink_share", "share", "rows in which that is above the threshold", FEW, (0, 1)),
        Column(
            "secondary_attention", "share", "largest mean attention that another token of a row's first half receives",
            "secondary_uniform", (0, 1),
        ),
        Column("secondary_uniform", "share", "the same for uniform attention", range=(0, 1), interval=False),
        Column(
            "value_drain", "ratio", "norm of the first token's value over the median norm in its row",
            "value_drain_elsewhere", (0, None),
        ),
        Column("value_drain_elsewhere", "ratio", "the same of the token in the middle of the row", range=(0, None)),
    ),
    source=(
        Source(
            "Gu et al.", "When Attention Sink Emerges in Language Models: An Empirical View", 2024, "2410.10781",
            "section 3.1, importance scores", departs="rows of 128 tokens, not 64; sinks other than the first token "
            "are sought in the first half of a row",
        ),
        Source(
            "Guo et al.",
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs", 2024,
            "2410.13835", "value-state drains", departs="the ratio is to the median of the row",
        ),
    ),
    cost="two sums over the patterns of the first sequences; patterns are computed but not kept",
    check="tests/laws/test_sinks.py",
)  # fmt: skip
def sinks(
    seen: Seen,
    threshold: Annotated[float, Argument("mean attention above which a token is a sink", "share", 0, 1)] = THRESHOLD,
) -> dict[str, Float[Tensor, "example head"]]:
    """How much attention first tokens receive from later ones, how many others do, and how small first values are."""
    causal = seen.model.anatomy.causal
    alpha = sink_scores(seen["attn.pattern"], causal=causal)
    width = alpha.shape[-1]
    first = alpha[..., 0]
    even = first.new_ones(1, 1, width, width)
    even = even.tril() if causal else even
    uniform = sink_scores(even / even.sum(-1, keepdim=True), causal=causal)[0, 0]
    found = {
        "sink_attention": first, "sink_uniform": uniform[0].expand_as(first),
        "sink_share": (first > threshold).double(),
        "secondary_attention": alpha[..., 1 : max(2, width // 2)].amax(-1),
        "secondary_uniform": uniform[1].expand_as(first),
    }  # fmt: skip
    if "attn.v" in seen:
        norm = at_least_float32(seen["attn.v"]).double().norm(dim=-1)  # [example, pos, kv_head]
        norm = norm.repeat_interleave(alpha.shape[1] // norm.shape[2], dim=2)
        usual = norm.median(1).values.clamp(min=torch.finfo(torch.float32).tiny)
        found |= {"value_drain": norm[:, 0] / usual, "value_drain_elsewhere": norm[:, width // 2] / usual}
    return found


def sink_scores(
    pattern: Float[Tensor, "batch head q_pos k_pos"], *, causal: bool = True
) -> Float[Tensor, "batch head k_pos"]:
    """The mean attention alpha [batch, head, k_pos] that each key receives from the queries that see it, in float64.

    Args:
        pattern: [batch, head, q_pos, k_pos] what each query attends to.
        causal: whether a query sees the keys 0 .. q only; all of them otherwise.
    """
    width = pattern.shape[-1]
    received = pattern.sum(-2, dtype=torch.float64)
    queries = torch.arange(width, 0, -1, dtype=torch.float64, device=pattern.device)
    return received / (queries if causal else width)
