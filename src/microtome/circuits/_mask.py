"""A circuit by a learned mask: a gate on every edge, kept where it is worth more than it costs.

Formula:  x_v = sum over u of g_uv write_u(row) + (1 - g_uv) other_u,  g = sigmoid(tau s);
          loss = mean over pairs of KL(clean || gated) at the last position + sparsity * mean over edges of g, see
          `_sparsify.py`. Kept is s > 0; the score of an edge is sigmoid(s), above 1/2 where it is kept.
          So an edge stays if the loss rises by more than sparsity / edges as its gate closes.
Cost:     steps times a forward and a backward under gates of at most `PAIRS` pairs.
Check:    tests/laws/test_masks.py, tests/planted/test_circuits.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.circuits._bench import OPTIMAL, Bench, divergence
from microtome.circuits._circuit import Circuit, of_mask, required
from microtome.circuits._optimal import Constants
from microtome.circuits._soft import Engines, soft_mean
from microtome.circuits._sparsify import Gates, learn
from microtome.circuits._sparsify import Sparsification as Sparsification
from microtome.context import current
from microtome.explain import Pairs
from microtome.model import Model

MASK_STEPS = 300
PAIRS = 8
"""Pairs that one step reads at most."""


def by_mask(model: Model, pairs: Pairs, plan: Sparsification, cost: str, about: dict[str, Any]) -> Circuit:
    """The circuit of a learned mask; what changes nothing is left out of it.

    Args:
        model: the model.
        pairs: the prompts.
        plan: how it is learned.
        cost: "kl", or "metric" for what the metric loses.
        about: what the circuit records; its ablation is what edges that are out give.

    Raises:
        FitError: the mask did not decide.
        ArgumentError: no edge is left.
    """
    ablation, sign = about["ablation"], 1.0 if cost == "kl" else -1.0
    optimal = ablation == OPTIMAL
    bench = Bench(model, pairs, divergence(model, pairs) if cost == "kl" else None, "mean" if optimal else ablation)
    kept, scores, how = gates_of(model, bench.groups, plan, sign=sign, optimal=optimal)
    about = about | {"method": f"mask, sparsity {plan.sparsity:g}, {cost}"} | how
    if not optimal:
        about["cost"] = sign * float(bench.measure(kept[None]).mean())
    why = f"each is worth less than {plan.sparsity:g} / {int(bench.edges.sum()):,}, or leads nowhere"
    return required(of_mask(model, kept, scores, **about).pruned(), why)


def gates_of(
    model: Model, engines: Engines, plan: Sparsification, *, sign: float = 1.0, optimal: bool = False
) -> tuple[Bool[Tensor, "sender receiver"], Float[Tensor, "sender receiver"], dict[str, Any]]:
    """The edges that a learned mask keeps, their scores, and how it was learned.

    Args:
        model: of the engines.
        engines: pairs; their metric is the objective.
        plan: how.
        sign: -1 where a larger metric is better.
        optimal: whether what edges that are out give, a constant for each sender, is learned with the mask.

    Raises:
        FitError: the mask did not decide.
    """
    edges, total, seed = engines[0][1].edges, sum(len(own) for own, _ in engines), current().seed
    constants = Constants.of(engines) if optimal else None

    def objective(gates: Gates, step: int) -> Tensor:
        full = torch.zeros(edges.shape, device=edges.device).masked_scatter(edges, gates["edge"])
        some: list[int] | None = None
        if total > PAIRS:
            generator = torch.Generator().manual_seed(seed + step)
            some = torch.randperm(total, generator=generator)[:PAIRS].tolist()
        return sign * soft_mean(engines, full, None if constants is None else constants.values(), some)

    like = {"edge": torch.zeros(int(edges.sum()), device=edges.device)}
    besides = {} if constants is None else {"constants": constants.moved}
    found = learn(plan, like, objective, "edges", model=model, besides=besides)
    strength = torch.full(edges.shape, torch.nan, dtype=torch.float64, device=edges.device)
    strength[edges] = found.strength["edge"].double()
    return (strength > 0).cpu(), strength.sigmoid().cpu(), dict(found.attrs)
