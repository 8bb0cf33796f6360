"""Neurons that serve one group of texts, such as a language or a domain, more than the others.

Formula:  for neuron n and group g, over the tokens of g:
          p_ng = share of tokens with gate > 0 (activation > 0 in plain MLPs)        group_firing
          m_ng = mean |a_n| |w_out,n|, what the neuron adds to the stream            group_effect
          LAPE_n = -sum_g p'_ng ln p'_ng  with  p'_ng = p_ng / sum_h p_nh            lape
          AP_ng = sum_k (R_k - R_k-1) P_k, the average precision with which the mean of a_n over a row says that the
          row is of g; a control column: the share of rows that are of g             group_ap
          The control of the first two is the same over the other groups; firing minus its control is the difference
          of rates.
          selected_ng = n is among the `share` of all neurons with the lowest LAPE, of those with max_g p_ng > bar, and
          p_ng > bar; bar is the 95th percentile of all p.
          A group of fewer than `least` tokens is undecided: NaN, and no part of LAPE and of the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.measurements._neuron_weights import output_directions
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import Firing, Histogram, Moments

BAR = 0.95
"""The percentile of firing rates above which a neuron counts as active."""

AXES = ("group", "layer", "neuron")
DECADES, STEPS = (-3, 2), 12
"""Means of rows are kept in bins, so many in each power of ten of either sign: from 0.001 to 100."""

_UP = torch.logspace(*DECADES, (DECADES[1] - DECADES[0]) * STEPS + 1, dtype=torch.float64)
EDGES = torch.cat([-_UP.flip(0), _UP])


def average_precision(
    positive: Float[Tensor, "*unit bin"], negative: Float[Tensor, "*unit bin"]
) -> Float[Tensor, "*unit"]:
    """The average precision [*unit] of scores that are counted in bins [*unit, bin], lowest first; ties are one step.

    Where nothing is positive it is NaN.
    """
    hits, misses = positive.flip(-1).double(), negative.flip(-1).double().cumsum(-1)
    found = hits.cumsum(-1)
    precision = found / (found + misses).clamp(min=1)
    return (hits * precision).sum(-1) / found[..., -1]


def entropy_over_groups(rates: Float[Tensor, "group ..."]) -> Float[Tensor, "*unit"]:
    """LAPE [*unit] in nats of firing rates [group, *unit]; groups of NaN take no part.

    NaN where a neuron never fires, and where fewer than two groups take part.
    """
    there = ~rates.isnan()
    known = rates.nan_to_num(0.0).double()
    found = torch.special.entr(known / known.sum(0)).sum(0)
    return torch.where(there.sum(0) > 1, found, torch.nan)


def select(rates: Float[Tensor, "group ..."], lape: Float[Tensor, "*unit"], share: float) -> Tensor:
    """[group, *unit] 1 where a neuron is chosen for a group, by the rule of this file's head; NaN for no group."""
    decided = ~rates.isnan().flatten(1).any(1)
    chosen = torch.full(rates.shape, torch.nan, dtype=torch.float64)
    if int(decided.sum()) < 2:
        return chosen
    known = rates[decided]
    flat = known.flatten().sort().values
    bar = flat[max(0, round(BAR * len(flat)) - 1)]
    order = torch.where((known > bar).any(0) & ~lape.isnan(), lape, torch.inf).flatten()
    lowest = order.argsort(stable=True)[: max(1, round(share * order.numel()))]
    low = torch.zeros_like(order, dtype=torch.bool)
    low[lowest] = order[lowest].isfinite()
    chosen[decided] = ((known > bar) & low.reshape(lape.shape)).double()
    return chosen


def elsewhere(x: Float[Tensor, "group ..."]) -> Float[Tensor, "group ..."]:
    """For each group the mean over the other groups, of those that are decided."""
    others = [torch.cat([x[:g], x[g + 1 :]]).nanmean(0) for g in range(len(x))]
    return torch.where(x.isnan(), torch.nan, torch.stack(others))


def _column(name: str, unit: str, meaning: str, control: str = "", most: float | None = None) -> Column:
    dims = ("group",) if name == "group_ap_chance" else AXES
    return Column(name, unit, meaning, control, (0, most), dims=dims, interval=False)


@measure(
    "group_neurons",
    of="neuron",
    sites="mlp.post",
    optional=("mlp.gate", "mlp.pre"),
    needs=("mlp_out", "W_out"),
    atlas=False,
    title="neurons of groups",
    question="Which neurons serve one group of texts, such as a language, more than the others?",
    columns=(
        Column("lape", "nats", "entropy over groups of how often the neuron fires; 0 where it fires in one alone",
               "none: the logarithm of the number of groups where it fires as often in each", (0, None),
               interval=False),
        _column("group_firing", "share", "share of the group's tokens with a positive gate (activation in plain MLPs)",
                "group_firing_elsewhere", 1),
        _column("group_firing_elsewhere", "share", "the same over the other groups, each counting once", most=1),
        _column("group_effect", "norm", "mean norm of what the neuron adds to the stream in the group, before the "
                "divisor of any norm after the MLP", "group_effect_elsewhere"),
        _column("group_effect_elsewhere", "norm", "the same over the other groups, each counting once"),
        _column("group_ap", "precision", "average precision with which the neuron's mean over a row says that the row "
                "is of the group", "group_ap_chance", 1),
        _column("group_ap_chance", "precision", "share of the rows that are of the group", most=1),
        _column("group_selected", "1", "1 where the neuron is chosen for the group: lape among the lowest, and firing "
                "in it above the 95th percentile of all rates", "none: chosen by lape", 1),
    ),
    source=(
        Source("Tang et al.", "Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language "
               "Models", 2024, "2402.16438", "LAPE",
               departs="undecided groups are left out; 1 % of neurons by default, a constant that is ours to choose"),
        Source("Liu et al.", "On Relation-Specific Neurons in Large Language Models", 2025, "2502.17355",
               departs="means of rows are kept in 12 bins a power of ten, within which rows tie"),
        Source("Zhao et al.", "How do Large Language Models Handle Multilingualism?", 2024, "2402.18815",
               where="what a neuron of an MLP adds", departs="the mean over tokens, not a threshold in every document"),
    ),
    cost="three passes over the activations, two of them in float64; 1 kB per neuron and group",
    check="tests/laws/test_group_neurons.py, tests/planted/test_neurons.py",
)  # fmt: skip
class GroupNeurons(Statistic):
    """How much each neuron serves each group of texts: by entropy, difference of rates, precision and effect."""

    def __init__(
        self,
        share: Annotated[float, Argument("share of all neurons to choose by lape", "share", 0, 1)] = 0.01,
        least: Annotated[int, Argument("tokens below which a group is undecided", "tokens", least=1)] = 30,
    ) -> None:
        """Choose so many, of groups of so many tokens."""
        self.share, self.least = share, least
        self._norms: dict[int | None, Tensor] = {}

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """The norm of what a unit of each neuron adds."""
        self._norms = {i: output_directions(model, i or 0).double().norm(dim=-1) for i in layers}

    def start(self, model: Model, layer: int | None) -> Kept:
        """Counters of tokens, means of sizes, and counts of rows by their mean."""
        n = model.anatomy.d_mlp
        return {"firing": Firing(n), "effect": Moments(n), "rows": Histogram(n, EDGES)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens of one group."""
        post = seen["mlp.post"]
        gate = next(seen[name] for name in ("mlp.gate", "mlp.pre", "mlp.post") if name in seen)
        kept["firing"].update(gate, seen.mask)
        kept["effect"].update(post.abs() * self._norms[seen.layer].to(post), seen.mask)
        mask = torch.ones(post.shape[:2], dtype=torch.bool) if seen.mask is None else seen.mask
        some, weight = mask.any(1).to(post.device), mask.to(post).unsqueeze(-1)
        means = torch.where(weight > 0, post, 0.0).sum(1) / weight.sum(1).clamp(min=1)
        kept["rows"].update(means[some])

    def across(self, kept: Mapping[str, Sequence[Kept]]) -> Mapping[str, Tensor]:
        """The scores of every neuron for every group, each set against the other groups."""
        every = list(kept.values())
        tokens = torch.tensor([layers[0]["firing"].result().total for layers in every])
        undecided = (tokens < self.least).reshape(-1, 1, 1)
        firing = torch.stack([torch.stack([k["firing"].result().rate for k in layers]) for layers in every])
        firing = firing.masked_fill(undecided, torch.nan)
        nothing = torch.full(firing.shape[2:], torch.nan, dtype=torch.float64)
        effect = torch.stack([
            torch.stack([k["effect"].result().mean if k["effect"].count else nothing for k in layers])
            for layers in every
        ]).masked_fill(undecided, torch.nan)  # fmt: skip
        lape = entropy_over_groups(firing)
        found = {
            "lape": lape, "group_firing": firing, "group_firing_elsewhere": elsewhere(firing),
            "group_effect": effect, "group_effect_elsewhere": elsewhere(effect),
            "group_selected": select(firing, lape, self.share),
        }  # fmt: skip
        return found | _precision(every, undecided)


def _precision(every: Sequence[Sequence[Kept]], undecided: Tensor) -> dict[str, Tensor]:
    """Average precision of each neuron for each group, and its chance level; layer by layer, to hold one at a time."""
    found = torch.full((len(every), len(every[0]), every[0][0]["rows"].units), torch.nan, dtype=torch.float64)
    rows = torch.zeros(len(every), dtype=torch.float64)
    for layer in range(len(every[0])):
        counts = [_counts(layers[layer]["rows"]) for layers in every]
        whole = torch.stack(counts).sum(0)
        for group, own in enumerate(counts):
            found[group, layer] = average_precision(own, whole - own)
            rows[group] = own[0].sum()
    chance = (rows / rows.sum()).masked_fill(undecided.flatten(), torch.nan)
    return {"group_ap": found.masked_fill(undecided, torch.nan), "group_ap_chance": chance}


def _counts(rows: Histogram) -> Float[Tensor, "neuron bin"]:
    """The rows of each neuron by bin, those outside the edges at the ends."""
    held = rows.result()
    return torch.cat([held.below.unsqueeze(1), held.count, held.above.unsqueeze(1)], dim=1).double()
