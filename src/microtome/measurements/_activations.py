"""Neurons on a text: how they are distributed, how often they fire, and where they peak.

Formula:  over all tokens of the text (a beginning-of-text token does not count): moments of the activation;
          firing_rate = share of tokens with gate > 0 (activation > 0 in plain MLPs); the k rows in which each peaks
          highest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import Firing, Moments, TopExamples

PLAIN = "none: describes one neuron, to compare with others of its layer"
KEYS = Source(
    "Geva et al.", "Transformer Feed-Forward Layers Are Key-Value Memories", 2021, "2012.14913", "trigger examples"
)
CHECK = "tests/laws/test_measures.py"


@measure(
    "activations",
    of="neuron",
    sites="mlp.post",
    title="activations of neurons",
    question="How are the activations of each neuron distributed over a text?",
    columns=(
        Column("mean", "activation", "mean activation over the text", PLAIN, interval=False),
        Column("std", "activation", "standard deviation of the activation", PLAIN, (0, None), interval=False),
        Column("max", "activation", "largest activation", PLAIN, interval=False),
        Column("min", "activation", "smallest activation", PLAIN, interval=False),
    ),
    source=KEYS,
    cost="two passes over the activations in float64; five numbers per neuron",
    check=CHECK,
)
class Activations(Statistic):
    """Mean, standard deviation, maximum and minimum of every neuron's activation."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """Moments of every neuron."""
        return {"moments": Moments(model.anatomy.d_mlp)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens that count."""
        kept["moments"].update(seen["mlp.post"], seen.mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The four moments."""
        found = kept["moments"].result()
        return {"mean": found.mean, "std": found.std, "max": found.max, "min": found.min}


@measure(
    "firing",
    of="neuron",
    sites="mlp.post",
    optional=("mlp.gate", "mlp.pre"),
    title="firing of neurons",
    question="How often is each neuron active?",
    columns=(
        Column("firing_rate", "share", "share of tokens with a positive gate (a positive activation in plain MLPs)",
               PLAIN, (0, 1), interval=False),
    ),
    source=Source("Voita, Ferrando and Nalmpantis", "Neurons in Large Language Models: Dead, N-gram, Positional", 2023,
                  "2309.04827"),
    cost="one comparison per activation",
    check=CHECK,
)  # fmt: skip
class FiringRate(Statistic):
    """The share of tokens on which each neuron is active."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """A counter of every neuron."""
        return {"firing": Firing(model.anatomy.d_mlp)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """A plain activation (GELU, ReLU) has the sign of its pre-activation, so that one rule serves both."""
        gate = next(seen[name] for name in ("mlp.gate", "mlp.pre", "mlp.post") if name in seen)
        kept["firing"].update(gate, seen.mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The rates."""
        return {"firing_rate": kept["firing"].result().rate}


@measure(
    "top_examples",
    of="neuron",
    sites="mlp.post",
    title="top examples of neurons",
    question="On which tokens of a text is each neuron most active?",
    columns=(
        Column("example_value", "activation", "peak activation, at most one peak per row of the text", PLAIN,
               extra=("rank",), interval=False),
        Column("example_index", "index", "index in the text of the token at the peak", PLAIN, extra=("rank",),
               interval=False),
        Column("example_start", "index", "index in the text of the first token of the row", PLAIN, extra=("rank",),
               interval=False),
    ),
    source=KEYS,
    cost="one maximum over the activations; 24 k bytes per neuron",
    check=CHECK,
)  # fmt: skip
class PeakExamples(Statistic):
    """The rows of a text in which each neuron peaks highest, one peak per row."""

    def __init__(
        self, examples: Annotated[int, Argument("how many top examples to keep per neuron", "rows", least=1)] = 5
    ) -> None:
        """Keep so many."""
        self.examples = examples

    def start(self, model: Model, layer: int | None) -> Kept:
        """No rows yet."""
        return {"top": TopExamples(model.anatomy.d_mlp, self.examples)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens that count."""
        kept["top"].update(seen["mlp.post"], seen.examples, seen.mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """As many as were asked for; where fewer rows were read, NaN and -1 fill up."""
        found = kept["top"].result()
        values = torch.where(found.index >= 0, found.values, torch.nan)
        return {"example_value": values, "example_index": found.index, "example_start": found.start}
