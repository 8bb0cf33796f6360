"""Subspaces that are learned: rotations by interchange (DAS), with soft boundaries, and masks over neurons.

Formula:  x' = base + (source - base) P, with P = Q Qᵀ of an orthonormal Q [d, rank], Q the factor of A = Q R (DAS);
          P = Rᵀ diag(m) R of a whole rotation R = (1 - S)(1 + S)^-1 R_0, S = W - Wᵀ (Cayley), and
          m_i = sigmoid((b d - i - 1/2) / T) of a boundary b (boundless DAS); P = diag(sigmoid(s / T)) (neuron mask).
          loss = CE(label | x') over swaps that want a cause + isolate * the same over those that want none
          + sparsity * mean(m). T falls geometrically from its first to its last value.
          What is returned is hard: m_i > 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from microtome.errors import FitError, error
from microtome.subspaces._exchange import Exchange
from microtome.training import fit, frozen_weights

UNDECIDED = (0.1, 0.9)
MOST_UNDECIDED = 0.05
"""The share of a mask's entries that may be undecided at its end."""
TEMPERATURES = {"boundless": (0.1, 1e-4), "mask": (1.0, 0.01)}
"""First and last temperature; of boundaries in shares of the width."""


@dataclass(frozen=True)
class Plan:
    """How a subspace is learned.

    Attributes:
        rank: of the subspace; of no use where boundaries or masks decide it.
        isolate: weight of the swaps that should change nothing.
        steps, lr, rows: of the training; rows are the swaps of one step, half of either kind where there are both.
        sparsity: weight of the mean of the mask.
        seed: of the start and of the draws.
    """

    rank: int
    isolate: float = 1.0
    steps: int = 200
    lr: float = 0.01
    rows: int = 16
    sparsity: float = 0.01
    seed: int = 0


Batch = tuple[float, list[int]]
"""How far the training is, 0 to 1, and the numbers of the swaps."""


def rotation(exchange: Exchange, plan: Plan) -> tuple[Float[Tensor, "rank d"], dict[str, Any]]:
    """The basis of a subspace of given rank, by interchange: DAS, and with `isolate` above 0 MDAS."""
    start = torch.linalg.qr(_normal(exchange.width, plan.rank, plan.seed)).Q
    held = {"rotation": start.to(exchange.base).clone()}

    def part(delta: Tensor, _: float) -> tuple[Tensor, Tensor | None]:
        q = torch.linalg.qr(held["rotation"]).Q
        return (delta @ q) @ q.T, None

    attrs = _fitted(exchange, plan, held, part)
    return torch.linalg.qr(held["rotation"].detach().double()).Q.T, attrs


def boundless(exchange: Exchange, plan: Plan) -> tuple[Float[Tensor, "rank d"], dict[str, Any]]:
    """The basis of a subspace whose rank is learned too: a whole rotation, and a boundary along its axes.

    Raises:
        FitError: too much of the mask is undecided at its end.
    """
    width = exchange.width
    first = torch.linalg.qr(_normal(width, width, plan.seed)).Q.to(exchange.base)
    eye = torch.eye(width).to(exchange.base)
    held = {"skew": torch.zeros_like(eye), "boundary": torch.full((1,), 0.5).to(eye)}
    places = (torch.arange(width).to(eye) + 0.5) / width

    def rotated() -> Tensor:
        skew = held["skew"] - held["skew"].T
        return torch.linalg.solve(eye + skew, eye - skew) @ first

    def mask(done: float) -> Tensor:
        return ((held["boundary"].clamp(0, 1) - places) / _temperature("boundless", done)).sigmoid()

    def part(delta: Tensor, done: float) -> tuple[Tensor, Tensor | None]:
        r, m = rotated(), mask(done)
        return ((delta @ r.T) * m) @ r, m

    attrs = _fitted(exchange, plan, held, part)
    kept = _decided(mask(1.0).detach(), attrs)
    basis = torch.linalg.qr(rotated().detach().double().T).Q.T  # orthonormal to float64 again
    return basis[kept], attrs | {"boundary": float(held["boundary"].detach().clamp(0, 1))}


def neuron_mask(exchange: Exchange, plan: Plan) -> tuple[Float[Tensor, "rank d"], dict[str, Any]]:
    """The basis of the coordinates that a differentiable binary mask keeps.

    Raises:
        FitError: too much of the mask is undecided at its end.
    """
    width = exchange.width
    held = {"mask": torch.zeros(width).to(exchange.base)}

    def mask(done: float) -> Tensor:
        return (held["mask"] / _temperature("mask", done)).sigmoid()

    def part(delta: Tensor, done: float) -> tuple[Tensor, Tensor | None]:
        m = mask(done)
        return delta * m, m

    attrs = _fitted(exchange, plan, held, part)
    kept = _decided(mask(1.0).detach(), attrs)
    return torch.eye(width, dtype=torch.float64)[kept], attrs


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _temperature(kind: str, done: float) -> float:
    first, last = TEMPERATURES[kind]
    return first * (last / first) ** done


def _decided(mask: Float[Tensor, " d"], attrs: dict[str, Any]) -> Tensor:
    """What a mask keeps.

    Raises:
        FitError: too much of it is neither kept nor left out.
    """
    undecided = float(((mask > UNDECIDED[0]) & (mask < UNDECIDED[1])).double().mean())
    attrs["undecided"] = undecided
    if undecided > MOST_UNDECIDED:
        raise error(
            FitError, "the mask did not decide which dimensions it keeps",
            got=f"{undecided:.1%} between {UNDECIDED[0]} and {UNDECIDED[1]}", allowed=f"{MOST_UNDECIDED:.0%}",
            do="train longer or with a larger lr, or give sparsity",
        )  # fmt: skip
    return (mask > 0.5).cpu()


def _fitted(
    exchange: Exchange,
    plan: Plan,
    held: dict[str, Tensor],
    part: Callable[[Tensor, float], tuple[Tensor, Tensor | None]],
) -> dict[str, Any]:
    """Train what is held, in place; what is known of the training."""
    kinds = [[i for i, s in enumerate(exchange.swaps) if s.wants == wants] for wants in ("cause", "isolate")]
    weights = (1.0, plan.isolate)
    used = [(own, weight) for own, weight in zip(kinds, weights, strict=True) if own and weight > 0]
    labels = exchange.labels

    def batches(step: int) -> Batch:
        rng = np.random.default_rng([plan.seed, step])
        n = max(1, plan.rows // len(used))
        which = [own[i] for own, _ in used for i in rng.choice(len(own), min(n, len(own)), replace=False)]
        return step / max(plan.steps - 1, 1), which

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        done, which = batch
        base = exchange.base[which]
        moved, mask = part(exchange.source[which] - base, done)
        logits = exchange.logits(which, base + moved, grad=True)
        each = cross_entropy(logits.float(), labels[which], reduction="none")
        total, at, parts = each.new_zeros(()), 0, dict[str, float]()
        for own, weight in used:
            n = min(max(1, plan.rows // len(used)), len(own))
            mean = each[at : at + n].mean()
            parts["cause" if own is kinds[0] else "isolate"] = float(mean.detach())
            total, at = total + weight * mean, at + n
        if mask is not None and plan.sparsity:
            total = total + plan.sparsity * mask.mean()
        return total, parts

    with frozen_weights(exchange.model):
        fitted = fit(held, loss, batches, steps=plan.steps, lr=plan.lr, seed=plan.seed, name="learning a subspace")
    said: dict[str, Any] = {"steps": plan.steps, "lr": plan.lr, "rows": plan.rows, "isolate_weight": plan.isolate}
    if plan.steps:
        values = fitted.metrics["loss"].values
        said |= {"first_loss": float(values[0]), "last_loss": float(np.mean(values[-10:]))}
    return said | {"seed": plan.seed}
