"""How peaked the activations of each neuron are.

Formula:  kurtosis = mean (x - mean)^4 / (mean (x - mean)^2)^2 over tokens: 3 for a normal distribution, more where
          few tokens carry most of the variance; skewness likewise, with third powers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Moments


@measure(
    "kurtosis",
    of="neuron",
    on=Text(sequences=16, width=128),
    sites="mlp.post",
    title="kurtosis of neurons",
    question="Does each neuron vary across all tokens, or peak on a few?",
    columns=(
        Column(
            "kurtosis", "1", "fourth central moment of the activation over the squared variance",
            "none: 3 for a normal distribution", (1, None), interval=False,
        ),
        Column(
            "skewness", "1", "third central moment of the activation over the variance to the power 3/2",
            "none: 0 for a symmetric distribution", interval=False,
        ),
    ),
    source=Source(
        "Elhage et al.", "Privileged Bases in the Transformer Residual Stream", 2023,
        departs="measures neurons over tokens; the paper measures the residual stream over dimensions",
    ),
    cost="four moments of the activations, in float64",
    check="tests/laws/test_measures.py",
)  # fmt: skip
class Kurtosis(Statistic):
    """Kurtosis and skewness of every neuron's activation over the first sequences of a text."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """Moments of every neuron, to the fourth."""
        return {"moments": Moments(model.anatomy.d_mlp, order=4)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens that count."""
        kept["moments"].update(seen["mlp.post"], seen.mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The two higher moments."""
        found = kept["moments"].result()
        return {"kurtosis": found.kurtosis, "skewness": found.skewness}
