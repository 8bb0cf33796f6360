"""Masks learned by continuous sparsification: soft gates that harden while they are trained.

Formula:  gate_i = sigmoid(tau s_i), s = 0 at the start, tau = growth^step;
          loss = objective(gates) + sparsity * mean(gate); it ends when the gates between 0.1 and 0.9 are less than 1 %
          of those above 1/2. Kept is s > 0.
          The published constants, AdamW at 5e-5 and a growth of 1.001 in at most 15,000 steps, leave every gate at 1/2
          in a short run: AdamW moves s by at most about the learning rate a step. In n steps they are therefore
          5e-5 * 15,000 / n and 1.001^(15,000 / n) unless others are given: s and tau go the same way in fewer steps,
          and 15,000 steps are the published run.
Check:    what a gate costs and what it is worth decide whether it is kept; tests/laws/test_masks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, FitError, error
from microtome.model import Model
from microtome.shown import shown
from microtome.training import fit, frozen_weights

PUBLISHED = {"steps": 15_000, "lr": 5e-5, "growth": 1.001}
UNDECIDED = (0.1, 0.9)
MOST_UNDECIDED = 0.01
"""Of the gates that are kept, the share that may be undecided as many at the end."""

Gates = Mapping[str, Tensor]


@shown
@dataclass(frozen=True)
class Sparsification:
    """How a mask is learned.

    >>> mt.circuits.Sparsification(20.0, steps=15_000)  # the published lr and growth

    Attributes:
        sparsity: weight of the mean of all gates.
        steps: at most.
        lr: of AdamW; by default as published, in shares of the run.
        growth: of tau in a step; likewise.

    Raises:
        ArgumentError: one of them cannot have this value.
    """

    sparsity: float
    steps: int = 300
    lr: float | None = None
    growth: float | None = None

    def __post_init__(self) -> None:
        fits = {
            "sparsity": self.sparsity >= 0, "steps": self.steps >= 1, "lr": self.lr is None or self.lr > 0,
            "growth": self.growth is None or self.growth > 1,
        }  # fmt: skip
        limits = {"sparsity": "0 or more", "steps": "1 or more", "lr": "above 0", "growth": "above 1"}
        for name, fit_ in fits.items():
            if not fit_:
                raise error(ArgumentError, f"{name} of a mask", got=getattr(self, name), allowed=limits[name],
                            do="choose another value")  # fmt: skip

    @property
    def rate(self) -> float:
        """The learning rate."""
        return PUBLISHED["lr"] * PUBLISHED["steps"] / self.steps if self.lr is None else self.lr

    def tau(self, step: int) -> float:
        """How hard gates are at a step."""
        growth = PUBLISHED["growth"] ** (PUBLISHED["steps"] / self.steps) if self.growth is None else self.growth
        return min(growth**step, 1e30)

    def attrs(self) -> dict[str, Any]:
        """What is recorded of it."""
        return {"sparsity": self.sparsity, "lr": self.rate, "growth": self.tau(1)}


@dataclass(frozen=True, eq=False)
class Learned:
    """A mask that has decided.

    Attributes:
        strength: by name, s; above 0 is kept.
        attrs: how it was learned: steps taken, the objective at the first and the last, the undecided share.
    """

    strength: Gates
    attrs: Mapping[str, Any]

    @property
    def kept(self) -> dict[str, Tensor]:
        """By name, whether each is kept."""
        return {name: s > 0 for name, s in self.strength.items()}


def learn(
    plan: Sparsification,
    like: Gates,
    objective: Callable[[Gates, int], Tensor],
    what: str,
    *,
    model: Model,
    besides: Gates | None = None,
    observe: Callable[[int], None] | None = None,
) -> Learned:
    """Learn a mask.

    Args:
        plan: how.
        like: by name, a tensor of the shape, device and type that its gates have.
        objective: of the gates at a step, a scalar with its graph.
        what: what gates are of, in words.
        model: the model that the objective runs.
        besides: tensors that are trained in place together with the gates.
        observe: called after each step.

    Raises:
        FitError: too many gates are undecided at the end; says how many.
    """
    strength = {name: torch.zeros_like(x) for name, x in like.items()}
    count = sum(x.numel() for x in strength.values())

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        gates = {name: (plan.tau(step) * s).sigmoid() for name, s in strength.items()}
        value = objective(gates, step)
        mean = torch.stack([g.sum(dtype=torch.float32) for g in gates.values()]).sum() / count
        kept, undecided = _counted(gates)
        state = {"objective": float(value.detach()), "kept": kept, "undecided": undecided}
        return value + plan.sparsity * mean, state

    def decided(step: int, state: Mapping[str, float]) -> bool:
        if observe is not None:
            observe(step)
        return state["undecided"] <= MOST_UNDECIDED * state["kept"]

    stage = f"learning which {what} are kept"
    held = {**{f"mask.{name}": s for name, s in strength.items()}, **(besides or {})}
    with frozen_weights(model):
        fitted = fit(held, loss, lambda step: step, plan.steps, lr=plan.rate, model=model, observe=decided,
                     name=stage)  # fmt: skip
    current().report(stage, plan.steps, plan.steps)  # also where it ended before: nothing was stopped
    values = {name: fitted.metrics[name].values for name in ("objective", "kept", "undecided")}
    last = {name: float(x[-1]) for name, x in values.items()}
    if last["undecided"] > MOST_UNDECIDED * last["kept"]:
        share = last["undecided"] / count
        raise error(
            FitError, f"the mask did not decide which {what} it keeps in {fitted.step} steps",
            got=f"{share:.1%} of its gates between {UNDECIDED[0]} and {UNDECIDED[1]}, {last['kept'] / count:.1%} kept",
            allowed=f"undecided below {MOST_UNDECIDED:.0%} of those kept",
            do="take more steps, a larger lr or growth, or another sparsity",
        )  # fmt: skip
    attrs = {
        "steps": fitted.step,
        "undecided": last["undecided"] / max(last["kept"], 1.0),
        "first": float(values["objective"][0]),
        "last": last["objective"],
    }
    return Learned({name: s.detach() for name, s in strength.items()}, attrs | plan.attrs())


def _counted(gates: Gates) -> tuple[float, float]:
    """How many are kept, and how many undecided."""
    kept = sum(float((g > 0.5).sum()) for g in gates.values())
    low, high = UNDECIDED
    return kept, sum(float(((g > low) & (g < high)).sum()) for g in gates.values())
