"""How many directions an attention pattern has.

Formula:  s_i the singular values of a head's pattern over the T tokens of a row;
          attention_rank = how many s_i are above tolerance * max s_i;
          attention_effective_rank = exp(-sum p_i ln p_i) with p_i = s_i / sum s;
          controls: the same of uniform attention over the keys 0 .. q, or over all keys where q sees both ways.
          The mean over heads of a layer is its ARank. A causal pattern in which no token forgets itself has rank T
          whatever the head does: the tolerance, ours, decides what counts.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.method import Argument, Column, Seen, Source, Text, measure

TOLERANCE = 0.05


@measure(
    "attention_rank",
    of="head",
    on=Text(sequences=8, width=64),
    sites="attn.pattern",
    atlas="full",
    title="rank of attention patterns",
    question="How many directions does the attention pattern of each head have?",
    columns=(
        Column(
            "attention_rank", "dimensions", "singular values of the pattern above a share of the largest",
            "attention_rank_uniform", (1, None),
        ),
        Column(
            "attention_rank_uniform", "dimensions", "the same for uniform attention", range=(1, None), interval=False,
        ),
        Column(
            "attention_effective_rank", "dimensions", "exponential of the entropy of the pattern's singular values",
            "attention_effective_rank_uniform", (1, None),
        ),
        Column(
            "attention_effective_rank_uniform", "dimensions", "the same for uniform attention", range=(1, None),
            interval=False,
        ),
    ),
    source=Source(
        "Luo et al.", "γ-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models", 2024,
        "2410.13859", "rank of attention maps",
        departs="heads are reported one by one; singular values count above a share of the largest, 0.05, which is "
        "our choice, beside a rank without threshold",
    ),
    cost="one singular value decomposition [T, T] per row and head",
    check="tests/laws/test_geometry.py",
)  # fmt: skip
def attention_rank(
    seen: Seen,
    tolerance: Annotated[
        float, Argument("share of the largest singular value from which on one counts", "share", 0, 1)
    ] = TOLERANCE,
) -> dict[str, Float[Tensor, "example head"]]:
    """The rank of the patterns of every head, and their effective rank, beside those of uniform attention."""
    pattern = seen["attn.pattern"].double()
    even = torch.ones(pattern.shape[-2:], dtype=pattern.dtype, device=pattern.device)
    even = even.tril() if seen.model.anatomy.causal else even
    uniform = (even / even.sum(-1, keepdim=True)).expand(*pattern.shape[:2], -1, -1)[:1, :1]
    found: dict[str, Tensor] = {}
    for end, a in (("", pattern), ("_uniform", uniform)):
        for name, values in pattern_ranks(a, tolerance).items():
            found[name + end] = values.expand(pattern.shape[:2])
    return found


def pattern_ranks(
    pattern: Float[Tensor, "batch head q_pos k_pos"], tolerance: float = TOLERANCE
) -> dict[str, Float[Tensor, "batch head"]]:
    """The rank above a tolerance and the effective rank [batch, head] of patterns [batch, head, q_pos, k_pos]."""
    values = torch.linalg.svdvals(pattern.double())
    p = values / values.sum(-1, keepdim=True)
    above = values > tolerance * values[..., :1]
    return {
        "attention_rank": above.double().sum(-1).clamp(min=1),
        "attention_effective_rank": torch.special.entr(p).sum(-1).exp(),
    }
