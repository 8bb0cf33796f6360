"""Neurons of the experts of a mixture on a text, each over the tokens that its expert saw.

Formula:  for each neuron, over the tokens of the text to which the router gave its expert a weight (a beginning-of-text
          token does not count): how many they are, and moments of the activation. An expert that saw none has moments
          of NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.method import Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import Moments

PLAIN = "none: describes one neuron, to compare with others of its expert"


@measure(
    "expert_neurons",
    of="expert_neuron",
    sites=("mlp.experts.post", "mlp.router"),
    title="neurons of experts",
    question="How are the activations of each expert's neurons distributed over the tokens that it saw?",
    columns=(
        Column(
            "expert_tokens", "tokens", "how many tokens of the text the neuron's expert saw", PLAIN, (0, None),
            interval=False,
        ),
        Column("expert_mean", "activation", "mean activation over those tokens", PLAIN, interval=False),
        Column("expert_std", "activation", "its standard deviation over them", PLAIN, (0, None), interval=False),
        Column("expert_max", "activation", "largest activation over them", PLAIN, interval=False),
        Column("expert_min", "activation", "smallest activation over them", PLAIN, interval=False),
    ),
    source=Source(
        "Geva et al.", "Transformer Feed-Forward Layers Are Key-Value Memories", 2021, "2012.14913",
        departs="neurons of experts, each over the tokens that its expert saw",
    ),
    cost="the neurons of the experts that are used, once more; two passes over them in float64",
    check="tests/laws/test_experts.py",
)  # fmt: skip
class ExpertNeurons(Statistic):
    """Mean, standard deviation, maximum and minimum of the activation of every neuron of every expert."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """Moments of every neuron, expert by expert, since each sees other tokens."""
        experts, neurons = (model.anatomy.size(Site("mlp.experts.post", layer), axis) for axis in ("expert", "neuron"))
        return {str(expert): Moments(neurons) for expert in range(experts)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens that count, of those that each expert saw."""
        post, weights = seen["mlp.experts.post"], seen["mlp.router"]
        for expert, moments in kept.items():
            saw = weights[:, :, int(expert)] != 0
            mask = saw if seen.mask is None else saw & seen.mask.to(saw.device)
            if bool(mask.any()):
                moments.update(post[:, :, int(expert)], mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """How many tokens each saw, and the four moments [expert, neuron]."""
        found = [kept[str(expert)] for expert in range(len(kept))]
        nothing = torch.full(found[0].shape, torch.nan, dtype=torch.float64)
        made = [each.result() if each.count else None for each in found]
        columns = {
            f"expert_{name}": torch.stack([nothing if one is None else getattr(one, name) for one in made])
            for name in ("mean", "std", "max", "min")
        }
        seen = torch.tensor([each.count for each in found]).unsqueeze(1).expand(-1, *found[0].shape)
        return {"expert_tokens": seen.contiguous(), **columns}
