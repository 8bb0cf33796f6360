"""Gradients integrated along a way whose ends are known, with points where the metric turns.

Formula:  on an interval [a, b] the sum over points t_k of w_k g(t_k) . (way), the points and weights of Gauss and
          Legendre; its residual is m(b) - m(a) minus that. While the residuals add up to more than the tolerance, those
          intervals that leave most are halved, so that points gather where the metric changes fast.
Check:    a step that equal spacing misses is found; tests/laws/test_integrated.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Read = Callable[[Sequence[float]], Float[Tensor, " point"]]
Scores = Callable[[Sequence[float], Sequence[float]], Float[Tensor, " *of"]]
AT_ONCE = 4
"""Intervals that are halved at once, at most."""


@dataclass(frozen=True, eq=False)
class Integral:
    """What was integrated.

    Attributes:
        scores: the parts of the change of the metric.
        whole: the change of the metric from one end of the way to the other.
        gap: |whole - sum of the parts|.
        points: at how many points gradients were taken.
    """

    scores: Float[Tensor, " *of"]
    whole: float
    gap: float
    points: int


@dataclass(frozen=True, eq=False)
class _Interval:
    ends: tuple[float, float]
    values: tuple[float, float]
    scores: Float[Tensor, " *of"]

    @property
    def residual(self) -> float:
        return abs(self.values[1] - self.values[0] - float(self.scores.sum()))


def integrate(read: Read, scores: Scores, *, points: int, most: int, tolerance: float) -> Integral:
    """Integrate along a way from 0 to 1.

    Args:
        read: the metric at some points.
        scores: the way times the sum of the gradients at some points, each times its weight; by part.
        points: for each interval.
        most: points altogether.
        tolerance: what the residuals may add up to, in units of the metric.
    """
    ends = read([0.0, 1.0]).tolist()
    held = [_over((0.0, 1.0), (ends[0], ends[1]), scores, points)]
    while sum(own.residual for own in held) > tolerance and (1 + len(held)) * points <= most:
        held.sort(key=lambda own: -own.residual)
        room = most // points - len(held)
        worst = [own for own in held[: min(AT_ONCE, room)] if own.residual > 0.1 * held[0].residual] or held[:1]
        middles = [sum(own.ends) / 2 for own in worst]
        values = read(middles).tolist()
        held = held[len(worst) :]
        for own, middle, value in zip(worst, middles, values, strict=True):
            held.append(_over((own.ends[0], middle), (own.values[0], value), scores, points))
            held.append(_over((middle, own.ends[1]), (value, own.values[1]), scores, points))
    total = torch.stack([own.scores for own in held]).sum(0)
    whole = ends[1] - ends[0]
    return Integral(total, whole, abs(whole - float(total.sum())), len(held) * points)


def _over(ends: tuple[float, float], values: tuple[float, float], scores: Scores, points: int) -> _Interval:
    at, weights = np.polynomial.legendre.leggauss(points)
    width = ends[1] - ends[0]
    return _Interval(ends, values, scores((ends[0] + width * (at + 1) / 2).tolist(), (weights * width / 2).tolist()))
