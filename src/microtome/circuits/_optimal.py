"""Optimal ablation: what edges that are out give is the constant of each sender under which the circuit does best.

Formula:  a* = argmin over a [sender, d_model] of the mean over pairs of KL(clean || circuit with a), the same a_u on
          every edge out of u that is not kept, at every position; a starts at the mean that u writes.
          Trained is d with a_u = mean_u + rms(write_u - mean_u) d_u, so that a step is as large for every sender.
          What is taken is the best a that was met, hence never worse than the mean on the pairs it was fitted on.
          Judged are other pairs: constants that are fitted on one half of them are measured on the other.
Source:   Li, Janson, "Optimal ablation for interpretability", 2024 (arXiv 2409.09951), sections 2 and 4. Departs: AdamW
          from the mean with a falling rate, and pairs are held out.
Cost:     `STEPS` forwards and backwards under gates a circuit and half.
Check:    no worse than the mean on what it was fitted on, and the known optimum where no edge is kept;
          tests/laws/test_optimal.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.circuits._soft import Engines, soft_mean
from microtome.circuits._soft import first_order as first_order
from microtome.model import Model
from microtome.training import fit, frozen_weights

STEPS = 60
LR = 0.1
"""In sizes of what each sender writes."""


@dataclass(frozen=True, eq=False)
class Constants:
    """A constant for every sender, that can be trained.

    Attributes:
        mean: what it writes in the mean over clean prompts and positions.
        size: the root mean square of what it writes besides, over all of these.
        moved: how far it is from the mean, in these sizes.
    """

    mean: Float[Tensor, "sender d_model"]
    size: Float[Tensor, "sender 1"]
    moved: Float[Tensor, "sender d_model"]

    @classmethod
    def of(cls, engines: Engines, numbers: Sequence[int] | None = None) -> Constants:
        """Those at the mean of some pairs, or of all."""
        wanted = None if numbers is None else set(numbers)
        total, squares, count = torch.zeros(()), torch.zeros(()), 0
        for own, engine in engines:
            mine = [i for i, pair in enumerate(own) if wanted is None or pair in wanted]
            x = engine.own[mine].double()
            total, squares = total + x.sum((0, 2)).cpu(), squares + x.pow(2).sum((0, 2)).cpu()
            count += x.shape[0] * x.shape[2]
        mean = total / count
        size = (squares / count - mean.pow(2)).clamp(min=0).mean(-1, keepdim=True).sqrt()
        like = engines[0][1].own
        return cls(mean.to(like), size.to(like), torch.zeros_like(mean).to(like))

    def values(self, out: Bool[Tensor, " sender"] | None = None) -> Float[Tensor, "sender d_model"]:
        """What edges give; of senders with no edge `out` the mean, which rounding alone would move."""
        size = self.size if out is None else self.size * out.unsqueeze(1)
        return self.mean + size * self.moved


@dataclass(frozen=True, eq=False)
class Optimal:
    """The best constants of a circuit.

    Attributes:
        values: a constant for every sender.
        start, loss: the loss at the mean, and at the constants.
    """

    values: Float[Tensor, "sender d_model"]
    start: float
    loss: float


def optimal(
    model: Model,
    engines: Engines,
    kept: Bool[Tensor, "sender receiver"],
    numbers: Sequence[int] | None = None,
    *,
    steps: int = STEPS,
    lr: float = LR,
) -> Optimal:
    """The constants under which a circuit has the smallest metric.

    Args:
        model: of the engines.
        engines: pairs whose metric is a loss.
        kept: the edges of the circuit.
        numbers: of the pairs that they are fitted on; all of them by default.
        steps: of the training.
        lr: its first learning rate, in sizes of what each sender writes.
    """
    constants = Constants.of(engines, numbers)
    gates = kept.to(constants.mean)
    out = (engines[0][1].edges & (gates < 1)).any(1)
    best = [(float("inf"), constants.mean)]

    def loss(_: int) -> Tensor:
        values = constants.values(out)
        found = soft_mean(engines, gates, values, numbers)
        if float(found.detach()) < best[0][0]:
            best[0] = float(found.detach()), values.detach().clone()
        return found

    with frozen_weights(model):
        fitted = fit({"constants": constants.moved}, loss, lambda step: step, steps, lr=lr, schedule="cosine",
                     model=model, name="fitting constants")  # fmt: skip
    value, found = best[0]
    return Optimal(found, float(fitted.metrics["loss"][0]), value)
