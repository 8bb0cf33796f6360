"""Neurons that each group of texts needs, by the gradient of its loss.

Formula:  G_ng = - mean over tokens of a_n dL/da_n, with L the next-token loss of group g: to first order, what the loss
          of a token rises by when the neuron is set to 0; its control is the same over the other groups, each counting
          once, so that what serves every text cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.measurements._group_neurons import elsewhere
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.metric import token_loss
from microtome.model import Model
from microtome.stream import Moments

AXES = ("group", "layer", "neuron")


@measure(
    "group_gradient",
    of="neuron",
    on=Text(sequences=16, width=128),
    atlas=False,
    title="gradients of neurons of groups",
    question="Which neurons does the loss of one group of texts need, by its gradient?",
    columns=(
        Column("group_gradient", "nats", "what a token's loss in the group rises by, to first order, when the neuron "
               "is set to 0", "group_gradient_elsewhere", dims=AXES, interval=False),
        Column("group_gradient_elsewhere", "nats", "the same over the other groups, each counting once", dims=AXES,
               interval=False),
    ),
    source=Source(
        "Yamamoto et al.", "Neuron-Level Analysis of Cultural Understanding in Large Language Models", 2025,
        "2510.08284", where="gradient times activation",
        departs="the loss of every next token in place of answers to questions; minus the other groups in place of "
        "control tasks",
    ),
    cost="a forward and a backward over the first sequences of each group",
    check="tests/laws/test_group_neurons.py, tests/planted/test_neurons.py",
    needs="mlp.post",
)  # fmt: skip
class GroupGradient(Statistic):
    """First-order effect of every neuron on the loss of every group.

    Raises:
        SiteError: the model's MLPs have no neurons.
        ModelUnsupported: the model is not causal.
    """

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """Refuse a model without next tokens, before anything runs; and which layers have neurons."""
        model.require_next_token()
        self._layers = [i for i in range(model.anatomy.n_layers) if Site("mlp.post", i) in model.anatomy.hook_points]

    def start(self, model: Model, layer: int | None) -> Kept:
        """The mean over rows, and how many tokens a row has on average."""
        return {"effect": Moments((model.anatomy.n_layers, model.anatomy.d_mlp)), "tokens": Moments(1)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Run the rows of one group with gradients."""
        tokens = seen.tokens
        counted = torch.ones(tokens.shape, dtype=torch.bool) if seen.mask is None else seen.mask.clone()
        counted[:, 0] = False  # nothing comes before the first token to predict it from
        some = counted.any(1)
        if not bool(some.any()):
            return
        rows, mask = tokens[some.to(tokens.device)], counted[some]
        sites = [f"{i}.mlp.post" for i in self._layers]
        with torch.enable_grad():
            run = seen.model.run(rows, capture=sites, grad=True)
            loss = token_loss(run.logits, rows)
            slopes = run.grad((loss * mask[:, 1:].to(loss)).sum())
        effect = torch.zeros(len(rows), seen.model.anatomy.n_layers, seen.model.anatomy.d_mlp, dtype=torch.float64)
        for i, site in zip(self._layers, sites, strict=True):
            effect[:, i] = -(slopes[site].double() * run[site].detach().double()).sum(1).cpu()
        kept["effect"].update(effect)
        kept["tokens"].update(mask.double().sum(1, keepdim=True))

    def across(self, kept: Mapping[str, Sequence[Kept]]) -> Mapping[str, Tensor]:
        """The effect a token in each group, and in the others."""
        every = [only for (only,) in kept.values()]
        nothing = torch.full(every[0]["effect"].shape, torch.nan, dtype=torch.float64)
        found = torch.stack([
            one["effect"].result().mean / one["tokens"].result().mean if one["effect"].count else nothing
            for one in every
        ])  # fmt: skip
        found[:, [i for i in range(found.shape[1]) if i not in self._layers]] = torch.nan
        return {"group_gradient": found, "group_gradient_elsewhere": elsewhere(found)}
