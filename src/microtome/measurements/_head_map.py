"""How far back heads look in a text, at how many tokens at once, and whether at what followed these tokens before.

Formula:  A the pattern of a head, q over all tokens but each row's first, n the number of keys that q sees:
          previous_attention  mean A[q, q - 1];   next_attention  mean A[q, q + 1], where q sees both ways;
          within_w            mean sum_{k: |q - k| <= w} A[q, k], w = 1, 4, 16, 64;
          distance            mean sum_k A[q, k] |q - k|;
          k90                 mean of the fewest keys that hold 90 % of the attention; k90_rest, of what attention is
                              left without the row's first key, where sinks are;
          mode_single, mode_subset, mode_global: shares of q with k90 = 1, with 1 < k90 <= n / 2, with k90 > n / 2;
          ngram<n>_attention  mean sum_{k in M} A[q, k], M the keys 0 < k < q whose n - 1 tokens before them are the
                              last n - 1 tokens up to q (what followed these before), q over those with such keys.
          Controls: the same for uniform attention over the keys of each q; and for n-grams the attention to keys near
          those, sum_{k in M} mean_d A[q, k + d], d in -3, -2, 2, 3 with 0 < k + d < q.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.method import Column, Seen, Source, Text, measure

REACHES = (1, 4, 16, 64)
"""How far the attention is counted, in tokens."""
ORDERS = (2, 3, 4)
"""Lengths of n-grams."""
WRONG = (-3, -2, 2, 3)
"""How far the control of an n-gram looks from the keys that would be right."""
MASS = 0.9
ROUNDING = 1e-6
"""By how much a sum of probabilities in float32 may fall short of 0.9 and still count as 90 %."""

Shares = dict[str, Float[Tensor, "batch q_pos head"]]


def _share(name: str, meaning: str, control: str = "", *, interval: bool = True) -> Column:
    return Column(name, "share", meaning, control, range=(0, 1), interval=interval)


def _pair(name: str, uniform: str, meaning: str) -> tuple[Column, Column]:
    return _share(name, meaning, uniform), _share(uniform, "the same for uniform attention", interval=False)


def _mode(name: str, meaning: str) -> Column:
    return _share(name, f"share of tokens whose attention {meaning}", "none: the three modes add up to 1")


def _ngram(n: int) -> tuple[Column, Column]:
    last = "the last token" if n == 2 else f"the last {n - 1} tokens"
    return (
        _share(f"ngram{n}_attention", f"attention to what followed {last} earlier in the row, where it occurred before",
               f"ngram{n}_elsewhere"),
        _share(f"ngram{n}_elsewhere", "the same for keys 2 or 3 tokens off"),
    )  # fmt: skip


@measure(
    "head_map",
    of="head",
    on=Text(sequences=16, width=128),
    sites="attn.pattern",
    title="how far and how widely heads look",
    question="How far back does each head look in a text, at how many tokens, and at what followed these before?",
    columns=(
        *_pair("previous_attention", "previous_uniform", "attention to the token before, in a text"),
        *_pair("next_attention", "next_uniform", "attention to the token after, where a model looks both ways"),
        *(
            column
            for w in REACHES
            for column in _pair(
                f"within_{w}", f"within_{w}_uniform", f"attention to tokens at most {w} away, itself included"
            )
        ),
        Column("distance", "tokens", "mean distance of what is attended to", "distance_uniform", (0, None)),
        Column("distance_uniform", "tokens", "the same for uniform attention", range=(0, None), interval=False),
        Column("k90", "tokens", "fewest keys that hold 90 % of the attention", "k90_uniform", (1, None)),
        Column("k90_uniform", "tokens", "the same for uniform attention", range=(1, None), interval=False),
        Column(
            "k90_rest", "tokens", "fewest keys that hold 90 % of the attention to keys other than the row's first",
            "none: compare k90, which counts the first key too", (1, None),
        ),
        _mode("mode_single", "has 90 % at one key"),
        _mode("mode_subset", "needs several keys for 90 %, but at most half of them"),
        _mode("mode_global", "needs more than half of the keys for 90 %"),
        *(column for n in ORDERS for column in _ngram(n)),
    ),
    source=(
        Source(
            "Clark et al.", "What Does BERT Look At? An Analysis of BERT's Attention", 2019, "1906.04341", "section 3",
            departs="uniform attention is the control",
        ),
        Source(
            "Ramsauer et al.", "Hopfield Networks is All You Need", 2020, "2008.02217", "operating modes of heads",
            departs="modes are shares of tokens; the bounds 1 and n / 2 are ours",
        ),
        Source(
            "Akyürek et al.", "In-Context Language Learning: Architectures and Algorithms", 2024, "2401.12973",
            "n-gram heads", departs="on text, with a control at wrong offsets",
        ),
    ),
    cost="one forward over the first sequences of the text, and one sort of each row of each pattern",
    check="tests/laws/test_head_map.py",
    atlas="full",
)  # fmt: skip
def head_map(seen: Seen) -> dict[str, tuple[Float[Tensor, "batch pos head"], Bool[Tensor, "batch pos"]]]:
    """How far every head looks, at how many tokens, and at what followed the last tokens before.

    Columns of n-grams are left out where no n-gram of the text occurs twice in a row of tokens.
    """
    causal, later = seen.model.anatomy.causal, seen.later
    pattern = seen["attn.pattern"].double()
    found = {name: (x, later) for name, x in (reach(pattern, causal=causal) | spread(pattern, causal=causal)).items()}
    for n in ORDERS:
        keys = followers(seen.tokens, n)
        there = later & keys.any(-1).to(later.device)
        if bool(there.any()):
            found |= {name: (x, there) for name, x in ngram_shares(pattern, keys, n).items()}
    return found


def _counts(pattern: Float[Tensor, "batch head q_pos k_pos"], *, causal: bool) -> Float[Tensor, "q_pos k_pos"]:
    """Uniform attention over the keys that each query sees."""
    even = torch.ones(pattern.shape[-2:], dtype=pattern.dtype, device=pattern.device)
    even = even.tril() if causal else even
    return even / even.sum(1, keepdim=True)


def reach(pattern: Float[Tensor, "batch head q_pos k_pos"], *, causal: bool = True) -> Shares:
    """Attention by distance [batch, q_pos, head], and what uniform attention would give."""
    place = torch.arange(pattern.shape[-1], device=pattern.device)
    away = (place.unsqueeze(1) - place).to(pattern.dtype)
    weights = {"previous": away == 1} | ({} if causal else {"next": away == -1})
    named = {f"{name}_attention": (f"{name}_uniform", x) for name, x in weights.items()}
    named |= {f"within_{w}": (f"within_{w}_uniform", away.abs() <= w) for w in REACHES}
    named["distance"] = "distance_uniform", away.abs()
    even = _counts(pattern, causal=causal)
    ones = pattern.new_ones((len(pattern), 1, pattern.shape[1]))
    stacked = torch.stack([of.to(pattern) for _, of in named.values()])
    every = torch.einsum("bhqk,nqk->nbqh", pattern, stacked)
    uniform = (even * stacked).sum(-1).unsqueeze(-1)
    found: Shares = {}
    for (name, (control, _)), x, same in zip(named.items(), every, uniform, strict=True):
        found |= {name: x, control: same * ones}
    return found


def spread(pattern: Float[Tensor, "batch head q_pos k_pos"], *, causal: bool = True) -> Shares:
    """At how many keys each query looks [batch, q_pos, head], and in which mode."""
    width = pattern.shape[-1]
    seen = torch.arange(1, width + 1, dtype=pattern.dtype, device=pattern.device)
    seen = (seen if causal else torch.full_like(seen, width)).unsqueeze(1)
    k90 = fewest(pattern)
    single, wide = k90 == 1, k90 > seen / 2
    wide = wide & ~single
    return {
        "k90": k90, "k90_rest": fewest(pattern[..., 1:]),
        "k90_uniform": (MASS * seen - ROUNDING).ceil() * torch.ones_like(k90),
        "mode_single": single.to(k90), "mode_global": wide.to(k90), "mode_subset": (~single & ~wide).to(k90),
    }  # fmt: skip


def fewest(pattern: Float[Tensor, "batch head q_pos k_pos"]) -> Float[Tensor, "batch q_pos head"]:
    """The fewest keys that hold 90 % of the attention of each query."""
    held = pattern.sort(dim=-1, descending=True).values.cumsum(-1)
    short = held < MASS * held[..., -1:] - ROUNDING
    return (1 + short.sum(-1)).to(pattern).transpose(1, 2)


def followers(tokens: Int[Tensor, "batch pos"], n: int) -> Bool[Tensor, "batch q_pos k_pos"]:
    """Which earlier keys stand behind the same n - 1 tokens as the last n - 1 up to the query."""
    rows, width = tokens.shape
    found = torch.ones((width, width), dtype=torch.bool, device=tokens.device).tril(-1).expand(rows, width, width)
    for back in range(n - 1):
        query = torch.full_like(tokens, -1)  # the token `back` places before the query; there is none at first
        query[:, back:] = tokens[:, : width - back]
        key = torch.full_like(tokens, -2)
        key[:, back + 1 :] = tokens[:, : width - back - 1]
        found = found & (query.unsqueeze(2) == key.unsqueeze(1))
    return found


def ngram_shares(
    pattern: Float[Tensor, "batch head q_pos k_pos"], keys: Bool[Tensor, "batch q_pos k_pos"], n: int
) -> Shares:
    """Attention [batch, q_pos, head] to the keys that follow the same tokens, and to keys near those."""
    width = pattern.shape[-1]
    place = torch.arange(width, device=pattern.device)
    near, count = torch.zeros_like(pattern), pattern.new_zeros((width, width))
    for d in WRONG:
        other = (place + d).clamp(0, width - 1)
        there = ((place + d > 0) & (place + d < place.unsqueeze(1))).to(pattern)
        near, count = near + pattern[..., other] * there, count + there
    near = near / count.clamp(min=1)
    return {
        f"ngram{n}_attention": torch.einsum("bhqk,bqk->bqh", pattern, keys.to(pattern)),
        f"ngram{n}_elsewhere": torch.einsum("bhqk,bqk->bqh", near, keys.to(pattern)),
    }
