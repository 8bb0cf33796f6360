"""How two kinds of vectors vary together, in float64, stable however far their means are from zero.

Formula:  with n = a + b and d = mean_b - mean_a of either kind,
          C = C_a + C_b + d_x d_y^T a b/n,   V = V_a + V_b + d^2 a b/n of either,   covariance = C / n,
          correlation = C / sqrt(V_x V_y^T).
Source:   Chan, Golub and LeVeque, 1979, of two vectors. Departs: origins, as `Moments`.
Cost:     rows x d_x d_y multiplications in float64; 8 d_x d_y bytes, and as much again while updating.
Check:    splits and merges agree to 1e-12; equal to the block of `Covariance` of both; tests/laws/test_accumulators.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import Accumulator, as_shape, int_scalar, unit_rows

_ROWS = 4096


@shown
@dataclass(frozen=True, eq=False)
class CrossCovarianceResult:
    """`count` rows, population `covariance` [x, y], and the `variance_x` [x] and `variance_y` [y], float64."""

    count: int
    covariance: Float[Tensor, "x y"]
    variance_x: Float[Tensor, " x"]
    variance_y: Float[Tensor, " y"]

    @property
    def correlation(self) -> Float[Tensor, "x y"]:
        """Pearson correlation [x, y]; NaN for a unit that never varies."""
        return self.covariance / torch.outer(self.variance_x.sqrt(), self.variance_y.sqrt())


class CrossCovariance(Accumulator):
    """The covariance of vectors of `x` numbers with vectors of `y` numbers, row by row.

    Args:
        x, y: the lengths of the vectors.
    """

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = as_shape((x, y))
        self.count = 0
        self._origin = torch.zeros(self.x + self.y, dtype=torch.float64)
        self._offset = torch.zeros(self.x + self.y, dtype=torch.float64)
        self._square = torch.zeros(self.x + self.y, dtype=torch.float64)
        self._cross = torch.zeros((self.x, self.y), dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Take in x [..., x] and y [..., y] of the same rows; `mask` [...] (boolean) says which rows count.

        Raises:
            DataError: when shapes do not fit, or a counted value is NaN or infinite.
        """
        if x.shape[:-1] != y.shape[:-1]:
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise error(DataError, "CrossCovariance.update: the rows differ", got=got, allowed="the same leading axes")
        pair = zip((x, y), (self.x, self.y), strict=True)
        rows = [unit_rows(part, (size,), mask, "CrossCovariance.update") for part, size in pair]
        if not rows[0].shape[0]:
            return
        self._follow(rows[0])
        home = self._origin.device
        if not self.count:
            self._origin = torch.cat([part[0].to(home, torch.float64) for part in rows])
        origin = self._origin.to(rows[0].device).split([self.x, self.y])
        for a, b in zip(*(part.split(_ROWS) for part in rows), strict=True):
            shifted = [part.to(torch.float64) - start for part, start in zip((a, b), origin, strict=True)]
            mean = torch.cat([part.mean(0) for part in shifted])
            for part, own in zip(shifted, mean.split([self.x, self.y]), strict=True):
                part -= own
            square = torch.cat([part.square().sum(0) for part in shifted])
            self._chan(len(a), mean.to(home), square.to(home), (shifted[0].T @ shifted[1]).to(home))

    def _chan(
        self, count: int, offset: Float[Tensor, " both"], square: Float[Tensor, " both"], cross: Float[Tensor, "x y"]
    ) -> None:
        """Take in `count` rows whose mean is `offset` from this origin."""
        whole = self.count + count
        delta = offset - self._offset
        weight = self.count * count / whole
        self._offset = self._offset + delta * (count / whole)
        self._square = self._square + square + delta.square() * weight
        self._cross = (self._cross + cross).addr_(delta[: self.x], delta[self.x :], alpha=weight)
        self.count = whole

    def _absorb(self, other: Self) -> None:
        if not other.count:
            return
        if not self.count:
            self._origin = other._origin.clone()
        self._chan(other.count, (other._origin - self._origin) + other._offset, other._square, other._cross)

    def result(self) -> CrossCovarianceResult:
        """Covariance and variances.

        Raises:
            DataError: when nothing was counted.
        """
        if not self.count:
            raise error(DataError, "CrossCovariance has counted nothing", do="call update with at least one row")
        self._rest()
        x, y = (self._square / self.count).split([self.x, self.y])
        return CrossCovarianceResult(self.count, self._cross / self.count, x.clone(), y.clone())

    def state(self) -> dict[str, Tensor]:
        """Count, sizes, origin, offset, sums of squares and of products."""
        self._rest()
        parts = {"origin": self._origin, "offset": self._offset, "square": self._square, "cross": self._cross}
        return {"count": int_scalar(self.count), **{name: tensor.clone() for name, tensor in parts.items()}}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(*state["cross"].shape)
        size = new.x + new.y
        new.count, new._cross = int(state["count"]), state["cross"]
        new._origin, new._offset, new._square = (state[name].reshape(size) for name in ("origin", "offset", "square"))
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.x, self.y)
