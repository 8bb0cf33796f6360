"""Neurons on a text: how they are distributed, how often they fire, and where they peak.

Formula:  over all tokens of the text (a beginning-of-text token does not count): moments of the activation;
          firing_rate = share of tokens with gate > 0 (activation > 0 in plain MLPs); the k rows in which each peaks
          highest, and some rows drawn evenly, with the activations at the tokens around each peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import DrawnExamples, Firing, Histogram, Moments, Strongest, TopExamples

PLAIN = "none: describes one neuron, to compare with others of its layer"
KEYS = Source(
    "Geva et al.", "Transformer Feed-Forward Layers Are Key-Value Memories", 2021, "2012.14913", "trigger examples"
)
CHECK = "tests/laws/test_measures.py"
CONTEXT = (16, 8)
"""Tokens before and behind a peak of which the activation is kept."""
AROUND = f"activations from {CONTEXT[0]} tokens before the peak to {CONTEXT[1]} behind it, to within 0.4 %"
BINS = (*(-(2.0**k) for k in range(9, -9, -1)), *(2.0**k for k in range(-8, 10)))
"""Edges of bins of activations; the outermost take in all that is larger."""
EVERY = 16
SOME = f"of every {EVERY}th token"
SIGNS = {
    "gate_pos_in_pos": "a positive gate and a positive input",
    "gate_pos_in_neg": "a positive gate and a negative input",
    "gate_neg_in_pos": "a negative gate and a positive input",
    "gate_neg_in_neg": "a negative gate and a negative input",
}


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
    title="examples of neurons",
    question="On which tokens of a text is each neuron most active, and how active is it in rows drawn at random?",
    columns=tuple(
        Column(f"{kind}_{name}", unit, f"{meaning}, {of}", PLAIN, extra=(axis, *more), interval=False)
        for kind, axis, of in (
            ("example", "rank", "in the rows where it peaks highest, one peak per row"),
            ("drawn", "draw", "in rows drawn evenly from the text, the same for all neurons, highest peak first"),
        )
        for name, unit, meaning, more in (
            ("value", "activation", "peak activation", ()),
            ("index", "index", "index in the text of the token at the peak", ()),
            ("start", "index", "index in the text of the first token of the row", ()),
            ("around", "activation", AROUND, ("token",)),
        )
    ),
    source=KEYS,
    cost="one maximum over the activations; (24 + 100) examples bytes per neuron",
    check=CHECK,
)  # fmt: skip
class PeakExamples(Statistic):
    """The rows of a text in which each neuron peaks highest, and some drawn at random, with the activations around."""

    def __init__(
        self,
        examples: Annotated[int, Argument("how many top examples to keep per neuron", "rows", least=1)] = 5,
        drawn: Annotated[int, Argument("how many rows drawn at random to keep", "rows", least=1)] = 4,
    ) -> None:
        """Keep so many."""
        self.examples, self.drawn = examples, drawn

    def start(self, model: Model, layer: int | None) -> Kept:
        """No rows yet."""
        neurons = model.anatomy.d_mlp
        return {
            "example": TopExamples(neurons, self.examples, CONTEXT),
            "drawn": DrawnExamples(neurons, self.drawn, CONTEXT),
        }

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens that count."""
        for held in kept.values():
            held.update(seen["mlp.post"], seen.examples, seen.mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """As many as were asked for; where fewer rows were read, NaN and -1 fill up."""
        columns: dict[str, Tensor] = {}
        for kind, held in kept.items():
            found = held.result()
            order = found.index.argsort(dim=1)  # stable: the last sort rules
            order = order.gather(1, found.values.gather(1, order).argsort(dim=1, descending=True, stable=True))
            values, index, start = (x.gather(1, order) for x in (found.values, found.index, found.start))
            columns[f"{kind}_value"] = torch.where(index >= 0, values, torch.nan)
            columns |= {f"{kind}_index": index, f"{kind}_start": start}
            around = found.around.gather(1, order[..., None].expand_as(found.around))
            mantissa, exponent = around.frexp()  # eight bits of it compress well
            columns[f"{kind}_around"] = torch.ldexp((mantissa * 256).round() / 256, exponent)
        return columns


@measure(
    "distribution",
    of="neuron",
    sites="mlp.post",
    optional=("mlp.gate", "mlp.up"),
    title="distribution of activations",
    question="How are the activations of each neuron spread, and with which signs of gate and input do they occur?",
    columns=(
        Column("histogram", "tokens", f"tokens by activation, {SOME}; bins double in width away from 0", PLAIN,
               (0, None), extra=("bin",), bins=BINS, interval=False),
        *(
            Column(name, "share", f"share of tokens with {signs}, {SOME}", PLAIN, (0, 1), interval=False)
            for name, signs in SIGNS.items()
        ),
        *(
            Column(f"signs_{name}", unit, f"{meaning} of the largest size, by the signs of gate and input: ++, +-, -+, "
                   f"--; {SOME}", PLAIN, extra=("signs",), interval=False)
            for name, unit, meaning in (
                ("value", "activation", "activation"),
                ("index", "index", "index in the text of the token with the activation"),
                ("start", "index", "index in the text of the first token of the row with the activation"),
            )
        ),
    ),
    source=Source(
        "Gerstner and Schütze", "Understanding Gated Neurons in Transformers from Their Input-Output Functionality",
        2025, "2505.17936", where="signs of gate and input",
        departs=f"{SOME}; a gate or an input of 0 counts as negative",
    ),
    cost="a search among the bins, seven comparisons and four maxima for a sixteenth of the activations",
    check=CHECK,
)  # fmt: skip
class Distribution(Statistic):
    """Histograms of every neuron's activation, and how often gate and input have which signs."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """Empty bins."""
        neurons = model.anatomy.d_mlp
        held: Kept = {"histogram": Histogram(neurons, (-torch.inf, *BINS[1:-1], torch.inf))}
        held |= {name: Firing(neurons) for name in SIGNS}
        return held | {f"strongest {name}": Strongest(neurons) for name in SIGNS}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in a sixteenth of the tokens that count."""
        assert seen.batch is not None
        place = seen.examples[:, None] + torch.arange(seen.batch.tokens.shape[1])
        some = (place % EVERY == 0) & (torch.ones_like(place, dtype=torch.bool) if seen.mask is None else seen.mask)
        chosen = some.nonzero(as_tuple=True)
        post = seen["mlp.post"][chosen]
        kept["histogram"].update(post)
        if "mlp.gate" in seen and "mlp.up" in seen:
            gate, up = seen["mlp.gate"][chosen] > 0, seen["mlp.up"][chosen] > 0
            for name, both in zip(SIGNS, (gate & up, gate & ~up, ~gate & up, ~(gate | up)), strict=True):
                kept[name].update(both.float())
                kept[f"strongest {name}"].update(post, place[chosen], seen.examples[chosen[0]], both)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """Counts by bin, and shares by signs where there is a gate."""
        rates = {name: kept[name].result() for name in SIGNS}
        found = {name: rate.rate for name, rate in rates.items() if rate.total}
        if found:
            best = [kept[f"strongest {name}"].result() for name in SIGNS]
            found |= {f"signs_{k}": torch.stack([getattr(b, k) for b in best], -1) for k in ("value", "index", "start")}
        return {"histogram": kept["histogram"].result().count} | found
