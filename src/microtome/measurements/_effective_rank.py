"""How many directions the residual stream of each layer uses.

Formula:  p_i = the eigenvalues of the covariance of resid_post over tokens, divided by their sum;
          effective_rank = exp(-sum_i p_i log p_i), between 1 and d_model;
          control: the same for the diagonal, as if the dimensions were uncorrelated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Covariance


@measure(
    "effective_rank",
    of="layer",
    on=Text(sequences=16, width=128),
    sites="resid_post",
    title="effective rank of the stream",
    question="How many directions does the residual stream use after each layer?",
    columns=(
        Column(
            "effective_rank", "dimensions", "exponential of the entropy of the covariance's eigenvalues",
            "effective_rank_diagonal", (1, None), interval=False, title="eigenvalues", chart="Effective rank",
        ),
        Column(
            "effective_rank_diagonal", "dimensions", "the same for variances, as if dimensions were uncorrelated",
            range=(1, None), interval=False, title="variances", chart="Effective rank",
        ),
    ),
    source=Source(
        "Roy and Vetterli", "The Effective Rank: A Measure of Effective Dimensionality", 2007,
        departs="uses the covariance, so that the mean is not a direction; leaves out each row's first token",
    ),
    cost="d_model^2 operations per token and one eigendecomposition per layer, in float64",
    check="tests/laws/test_measures.py",
)  # fmt: skip
class EffectiveRank(Statistic):
    """The effective rank of the residual stream after each layer, over the first sequences of a text."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """No tokens yet."""
        return {"covariance": Covariance(model.anatomy.size(Site("resid_post", layer), "d_model"))}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in all tokens but the first of each row."""
        kept["covariance"].update(at_least_float32(seen["resid_post"]), seen.later)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """Of the eigenvalues, and of the diagonal."""
        covariance = kept["covariance"].result().covariance
        values = {
            "effective_rank": torch.linalg.eigvalsh(covariance).clamp(min=0),
            "effective_rank_diagonal": covariance.diagonal(),
        }
        return {name: torch.special.entr(x / x.sum()).sum().exp() for name, x in values.items()}
