"""Which heads attend alike: the Jensen-Shannon map of all pairs of heads.

Formula:  A_i, A_j the patterns of two heads, q over all tokens but each row's first, H the entropy in nats:
          js[i, j] = mean over q of H((A_i[q] + A_j[q]) / 2) - (H(A_i[q]) + H(A_j[q])) / 2, between 0 and ln 2;
          control: the same with the pattern of j on the row's tokens in reverse order (its first one stays): a likeness
          that comes of positions alone is as large there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.errors import SiteError, error
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Moments

MOST = math.log(2)


@measure(
    "head_similarity",
    of="head",
    on=Text(sequences=8, width=64),
    title="heads that attend alike",
    question="Which heads attend to the same tokens?",
    columns=(
        Column(
            "js", "nats",
            "Jensen-Shannon divergence of the patterns of two heads; the other one is counted through all layers",
            "js_reversed", (0, MOST), extra=("other",), interval=False,
        ),
        Column(
            "js_reversed", "nats", "the same with the other head's pattern on the row's tokens in reverse order",
            range=(0, MOST), extra=("other",), interval=False,
        ),
    ),
    source=Source(
        "Clark et al.", "What Does BERT Look At? An Analysis of BERT's Attention", 2019, "1906.04341", "section 6",
        departs="the mean over tokens, not the sum; patterns of the reversed text are the control",
    ),
    cost="two forwards whose patterns are all kept, and heads^2 q^2 logarithms a row, twice; 80 heads^2 bytes",
    check="tests/laws/test_head_map.py",
    atlas=False,
)  # fmt: skip
class HeadSimilarity(Statistic):
    """The Jensen-Shannon divergence between the patterns of every two heads of the model.

    Raises:
        SiteError: the model has no attention whose pattern is known, or layers with different numbers of heads.
    """

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """The layers that have patterns."""
        a = model.anatomy
        self.layers = [i for i in range(a.n_layers) if Site("attn.pattern", i) in a.hook_points]
        self.shape = a.n_layers, a.n_heads
        sizes = {a.size(Site("attn.pattern", i), "head") for i in self.layers}
        if sizes != {a.n_heads}:
            why = a.missing.get(Site("attn.pattern", 0)) or f"layers with {sorted(sizes)} heads"
            what = f'the measure "head_similarity" compares the patterns of all heads of {a.name}'
            raise error(SiteError, what, got=why, do="leave the measure out")

    def start(self, model: Model, layer: int | None) -> Kept:
        """The mean of every pair."""
        heads = model.anatomy.n_layers * model.anatomy.n_heads
        return {name: Moments((heads, heads)) for name in ("js", "js_reversed")}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch, a row at a time."""
        a, counted = seen.model.anatomy, seen.later
        tokens = seen.tokens
        held, turned = (
            self._patterns(seen.model, x) for x in (tokens, torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1))
        )
        place = torch.cat([torch.arange(a.n_heads) + i * a.n_heads for i in self.layers])
        for row, patterns in enumerate(held.double()):
            queries = counted[row].to(held.device)
            if not bool(queries.any()):
                continue
            for name, against in (("js", patterns), ("js_reversed", turned[row].double())):
                whole = torch.zeros(kept[name].shape, dtype=torch.float64)  # NaN in the end, where there is no head
                whole[place.unsqueeze(1), place] = divergence(patterns[:, queries], against[:, queries]).cpu()
                kept[name].update(whole.unsqueeze(0))

    def _patterns(self, model: Model, tokens: Tensor) -> Float[Tensor, "batch head q_pos k_pos"]:
        """The patterns of all heads of all layers, one layer after the other."""
        run = model.run(tokens, capture="*.attn.pattern", logits=False)
        return torch.cat([run[f"{i}.attn.pattern"] for i in self.layers], dim=1)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """[layer, head, other]; NaN in layers without patterns."""
        layers, heads = self.shape
        there = torch.zeros(layers, dtype=torch.bool)
        there[self.layers] = True
        known = there.repeat_interleave(heads)
        known = known.unsqueeze(1) & known
        means = {name: held.result().mean.masked_fill(~known, torch.nan) for name, held in kept.items()}
        return {name: mean.reshape(layers, heads, -1) for name, mean in means.items()}


def divergence(
    one: Float[Tensor, "head query k_pos"], other: Float[Tensor, "other query k_pos"]
) -> Float[Tensor, "head other"]:
    """The Jensen-Shannon divergence of each two heads, mean over queries, in nats."""

    def entropy(x: Tensor) -> Tensor:
        return torch.special.entr(x).sum(-1).mean(-1)

    own, theirs = entropy(one), entropy(other)
    rows = [entropy((pattern + other) / 2) - (own[i] + theirs) / 2 for i, pattern in enumerate(one)]
    return torch.stack(rows).clamp(0, MOST)
