"""What attention heads do on repeated random tokens.

Formula:  tokens r_0..r_{T-1} r_0..r_{T-1};  A the pattern of a head, q over the second half unless stated otherwise:
          induction       mean A[q, q - T + 1]      the token after the earlier occurrence
          duplicate       mean A[q, q - T]          the earlier occurrence itself
          previous_token  mean A[q, q - 1]          q >= 1, both halves
          first_token     mean A[q, 0]              q >= 2, both halves: the sink
          entropy         mean -sum_k A log A       both halves, in nats
          Controls: induction_control, mean A[q, q - T + 1 + d] over d in -8..8 without -1, 0, 1 (keys as far away, but
          wrong); uniform_share and uniform_entropy, what uniform attention over the keys of each q would give
          (0 .. q, or all of them where q sees both ways).
          Where the tokenizer begins every text with a token of its own, that token stands before r_0, is the first
          token of first_token, and is neither query nor key of the other scores.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.method import Column, RepeatedTokens, Seen, Source, measure


def _share(name: str, meaning: str, control: str = "uniform_share") -> Column:
    return Column(name, "share", f"attention to {meaning}, on repeated random tokens", control, range=(0, 1))


@measure(
    "induction",
    of="head",
    on=RepeatedTokens(),
    sites="attn.pattern",
    title="scores on repeated random tokens",
    question="Which heads attend to earlier occurrences of a token, to the previous token, or to the first token?",
    columns=(
        _share("previous_token", "the previous token"),
        _share("duplicate", "the earlier occurrence of the same token, in the second half", "induction_control"),
        _share("induction", "the token after the earlier occurrence, in the second half", "induction_control"),
        _share("induction_control", "keys at a similar distance to induction's, but 2 to 8 positions off", ""),
        _share("first_token", "the first token"),
        Column(
            "uniform_share", "share", "attention to any one key under uniform attention", range=(0, 1), interval=False
        ),
        Column("entropy", "nats", "mean entropy of the pattern's rows", "uniform_entropy", range=(0, None)),
        Column(
            "uniform_entropy", "nats", "the same for uniform attention", range=(0, None), interval=False
        ),
    ),
    source=(
        Source(
            "Olsson et al.", "In-context Learning and Induction Heads", 2022, "2209.11895",
            where="random repeated tokens", departs="an explicit control at wrong offsets",
        ),
        Source(
            "Wang et al.", "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
            2022, "2211.00593", where="duplicate token heads",
        ),
    ),
    cost="one forward over sequences x 2 period tokens; patterns are computed in every layer but not kept",
    check="tests/laws/test_measures.py",
)  # fmt: skip
def induction(seen: Seen) -> dict[str, Float[Tensor, "example head"]]:
    """Previous-token, duplicate, induction and first-token scores of every head, with controls."""
    return pattern_scores(seen["attn.pattern"], seen.look.period, seen.lead, causal=seen.model.anatomy.causal)


def pattern_scores(
    pattern: Float[Tensor, "batch head q_pos k_pos"], period: int, lead: int = 0, *, causal: bool = True
) -> dict[str, Float[Tensor, "batch head"]]:
    """The scores [batch, head] of patterns [batch, head, q_pos, k_pos] on tokens that repeat after `period`.

    The first `lead` positions stand before the tokens, and count as the first token only. Even attention is spread over
    the keys 0 .. q where the model is causal, and over all keys where it is not.
    """
    a = pattern.double()

    def diagonal(offset: int, first: int) -> Float[Tensor, "batch head"]:
        """Mean of A[q, q - offset] over q >= first, counted without the lead."""
        return a.diagonal(-offset, dim1=2, dim2=3)[..., max(lead, lead + first - offset) :].mean(-1)

    wrong = [diagonal(period - 1 - d, period) for d in range(-8, 9) if abs(d) > 1]
    keys = torch.arange(1, a.shape[2] + 1, dtype=a.dtype, device=a.device)
    keys = keys if causal else torch.full_like(keys, a.shape[3])
    even = a.new_ones(a.shape[:2])
    return {
        "previous_token": diagonal(1, 1),
        "duplicate": diagonal(period, period),
        "induction": diagonal(period - 1, period),
        "induction_control": torch.stack(wrong).mean(0),
        "first_token": a[:, :, max(2, lead) :, 0].mean(-1),
        "uniform_share": even * (1 / keys[max(2, lead) :]).mean(),
        "entropy": -torch.special.xlogy(a, a).sum(-1)[..., lead:].mean(-1),
        "uniform_entropy": even * keys[lead:].log().mean(),
    }
