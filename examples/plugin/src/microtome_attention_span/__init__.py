"""How far back attention heads attend.

Formula:  A the pattern of a head: attention_span = mean over q of sum_k A[q, k] (q - k), q without each row's first;
          control: the same if attention were spread evenly over the keys 0 .. q, which is q / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.method import Column, Seen, Source, Text, measure


@measure(
    "attention_span",
    of="head",
    on=Text(sequences=16, width=128),
    sites="attn.pattern",
    title="span of attention",
    question="How far back does each head attend?",
    columns=(
        Column("attention_span", "tokens", "mean distance to attended keys", "attention_span_uniform", (0, None)),
        Column("attention_span_uniform", "tokens", "the same for uniform attention", range=(0, None)),
    ),
    source=Source(
        "Sukhbaatar et al.", "Adaptive Attention Span in Transformers", 2019, "1905.07799",
        departs="the distance is measured, not learned",
    ),
    cost="one forward over the first sequences of the text; patterns are computed but not kept",
    check="tests/laws/test_plugin.py",
)  # fmt: skip
def attention_span(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean distance over which each head attends."""
    pattern = seen["attn.pattern"].double()
    place = torch.arange(pattern.shape[-1], dtype=pattern.dtype, device=pattern.device)
    span = torch.einsum("bhqk,qk->bqh", pattern, place.unsqueeze(1) - place)
    even = (place / 2).unsqueeze(-1).expand(span.shape)
    return {"attention_span": (span, seen.later), "attention_span_uniform": (even, seen.later)}
