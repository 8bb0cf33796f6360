"""What attention can tell apart: mixes of values, the slope of the softmax, and the rank of scores.

Formula:  A the pattern of a head, v_k its values, q over the later half of each row; S the N most attended keys of q:
          m = sum_{k in S} A[q, k] v_k / sum_{k in S} A[q, k];   u = the root mean square of |v_k| over the keys of q;
          selected_distance   mean over q and k in S of |m - v_k| / u;   other_distance  the same over keys not in S;
          separable           mean share of k in S that are nearer to m than every key not in S, N = 1, 2, 4, 8, 16;
          separable_random    the same for N keys drawn by the seed, with their own weights; of q with more than N keys;
          jacobian            mean of the spectral norm of dA[q] / d(scores) = diag(p) - p p^T, at most 1/2; its largest
                              eigenvalue is the root of 1 = sum_k p_k^2 / (p_k - x) between the two largest p;
          jacobian_uniform    the same for uniform attention: 1 / n;
          score_rank          exponential of the entropy of the shares s_i^2 / sum s^2 of the singular values s of q . k
                              over the row's tokens, at most d_head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import ExampleMeans

COUNTS = (1, 2, 4, 8, 16)
"""N, how many of the most attended keys count as selected."""
HALVINGS = 50
"""Steps of the bisection for the largest eigenvalue: to 1e-15."""
NAMES = ("selected_distance", "other_distance", "separable", "separable_random")


def _by_count(name: str, unit: str, meaning: str, control: str = "", most: float | None = None) -> Column:
    return Column(name, unit, meaning, control, (0, most), extra=("count",))


@measure(
    "selectivity",
    of="head",
    on=Text(sequences=8, width=64),
    sites=("attn.pattern", "attn.q", "attn.k", "attn.v"),
    title="what attention can tell apart",
    question="Can each head's mix of values be told apart from those it did not select, and how steep is its softmax?",
    columns=(
        _by_count(
            "selected_distance", "ratio", "distance of the mix of the 1, 2, 4, 8, 16 most attended values from each of"
            " them, over the values' norm", "other_distance",
        ),
        _by_count("other_distance", "ratio", "the same from all other values"),
        _by_count(
            "separable", "share", "share of those values that are nearer to their mix than every other one",
            "separable_random", 1,
        ),
        _by_count("separable_random", "share", "the same for as many random keys", most=1),
        Column(
            "jacobian", "1", "spectral norm of the softmax's derivative, mean over tokens", "jacobian_uniform", (0, 0.5)
        ),
        Column("jacobian_uniform", "1", "the same for uniform attention", range=(0, 0.5)),
        Column(
            "score_rank", "dimensions", "effective rank of the scores q . k of a row, at most d_head",
            "none: compare d_head", (1, None),
        ),
    ),
    source=(
        Source(
            "Mudarisov et al.", "Limitations of Normalization in Attention Mechanism", 2025, "2508.17821",
            departs="distances are of values, relative to their norm; N and the control of random keys are ours",
        ),
        Source(
            "Bhojanapalli et al.", "Low-Rank Bottleneck in Multi-head Attention Models", 2020, "2002.07028",
            departs="the effective rank, beside the bound",
        ),
    ),
    cost="some 60 passes over the patterns of the first sequences, and one singular value decomposition of each",
    check="tests/laws/test_selectivity.py",
    atlas="full",
)  # fmt: skip
class Selectivity(Statistic):
    """Distances of mixes of values, the slope of the softmax, and the rank of the scores of every head."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """The means of every head; those by N only of as many as some query can leave others out of."""
        heads = model.anatomy.size(Site("attn.pattern", layer), "head")
        found: Kept = {f"{name}.{n}": ExampleMeans(heads) for name in NAMES for n in COUNTS}
        return found | {name: ExampleMeans(heads) for name in ("jacobian", "jacobian_uniform", "score_rank")}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch."""
        pattern, causal = seen["attn.pattern"].double(), seen.model.anatomy.causal
        heads, width = pattern.shape[1], pattern.shape[-1]
        q, k, v = (at_least_float32(seen[f"attn.{name}"]).double().transpose(1, 2) for name in ("q", "k", "v"))
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        late = torch.arange(width) >= max(1, width // 2)
        counted = seen.later & late
        sees = torch.ones(width, width, dtype=torch.bool, device=pattern.device)
        sees = sees.tril() if causal else sees
        for n in COUNTS:
            there = counted & (sees.sum(1) > n).to(counted.device)
            if bool(there.any()):
                for name, x in mixes(pattern, v, sees, n).items():
                    kept[f"{name}.{n}"].update(x, seen.examples, there)
        norm = softmax_norm(pattern)
        kept["jacobian"].update(norm.transpose(1, 2), seen.examples, counted)
        even = (1 / sees.sum(1).double()).clamp(max=0.5)
        even = torch.where(sees.sum(1) > 1, even, 0.0).reshape(1, -1, 1).expand(len(pattern), width, heads)
        kept["jacobian_uniform"].update(even, seen.examples, counted)
        whole = seen.mask is None or seen.mask[:, seen.lead :].all(1)
        rows = None if whole is True else torch.as_tensor(whole).expand(len(pattern))
        kept["score_rank"].update(effective_rank_of(q @ k.transpose(-1, -2)), seen.examples, rows)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The means; NaN at an N that leaves no others out."""
        found = {name: torch.stack([kept[f"{name}.{n}"].mean for n in COUNTS], dim=-1) for name in NAMES}
        return found | {name: kept[name].mean for name in ("jacobian", "jacobian_uniform", "score_rank")}


def mixes(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    value: Float[Tensor, "batch head k_pos d_head"],
    sees: Bool[Tensor, "q_pos k_pos"],
    count: int,
) -> dict[str, Float[Tensor, "batch q_pos head"]]:
    """Distances from the mix of the `count` most attended values, and how many of these are nearest to it."""
    gram = value @ value.transpose(-1, -2)
    own = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)  # [batch, head, 1, k_pos]
    size = ((own * sees).sum(-1) / sees.sum(-1)).clamp(min=torch.finfo(own.dtype).tiny).sqrt()
    generator = torch.Generator().manual_seed(current().seed)
    noise = torch.rand(pattern.shape[-2:], generator=generator, dtype=pattern.dtype).to(pattern.device)
    found: dict[str, Tensor] = {}
    for ending, order in (("", pattern), ("_random", noise.expand_as(pattern))):
        chosen = torch.zeros_like(sees).expand_as(pattern).clone()
        best = order.masked_fill(~sees, -1).topk(min(count, pattern.shape[-1]), dim=-1).indices
        chosen = chosen.scatter(-1, best, torch.ones_like(best, dtype=torch.bool)) & sees
        weight = torch.where(chosen, pattern.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)
        mixed = weight @ gram
        far = (own + (weight * mixed).sum(-1, keepdim=True) - 2 * mixed).clamp(min=0)
        rest = sees & ~chosen
        nearest = far.masked_fill(~rest, torch.inf).amin(-1, keepdim=True)
        inside = chosen & (far < nearest)
        found[f"separable{ending}"] = inside.sum(-1) / chosen.sum(-1).clamp(min=1)
        if not ending:
            away = far.sqrt() / size.unsqueeze(-1)
            found["selected_distance"] = (away * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)
            found["other_distance"] = (away * rest).sum(-1) / rest.sum(-1).clamp(min=1)
    return {name: x.to(pattern).transpose(1, 2) for name, x in found.items()}


def softmax_norm(p: Float[Tensor, "*at k_pos"]) -> Float[Tensor, "*at"]:
    """The spectral norm of diag(p) - p p^T of each row of probabilities: see this file's head. At most 1/2."""
    top = p.topk(min(2, p.shape[-1]), dim=-1).values
    high = top[..., 0].clone()
    low = top[..., 1].clone() if p.shape[-1] > 1 else torch.zeros_like(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        gap = p - middle.unsqueeze(-1)
        terms = torch.where(p > 0, p**2 / torch.where(gap == 0, torch.finfo(p.dtype).tiny, gap), 0.0)
        right = terms.sum(-1) < 1  # the root is above
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    found = (low + high) / 2
    return torch.where(top[..., 0] >= 1, torch.zeros_like(found), found).clamp(0, 0.5)


def effective_rank_of(scores: Float[Tensor, "*of q_pos k_pos"]) -> Float[Tensor, "*of"]:
    """The exponential of the entropy of the shares of squared singular values of each matrix."""
    energy = torch.linalg.svdvals(scores.double()) ** 2
    share = energy / energy.sum(-1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()
