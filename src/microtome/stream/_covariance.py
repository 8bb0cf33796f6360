"""Mean, covariance and second moment of vectors, in float64, stable however far the mean is from zero.

Formula:  with n = a + b and d = mean_b - mean_a,
          mean = mean_a + d b/n,   C = C_a + C_b + d d^T a b/n,   covariance = C / n,
          second moment = covariance + mean mean^T.
Source:   Chan, Golub and LeVeque, 1979, in matrix form. Departs: the origin of `Moments`.
Cost:     rows x d^2 multiplications in float64; 8 d^2 bytes, as much again while updating, and 8 d x 4,096 for a block.
Check:    splits and merges agree to 1e-12; agrees with numpy.cov and with exact arithmetic far from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import Accumulator, as_shape, blocks, int_scalar, unit_rows

_ROWS = 4096


@shown
@dataclass(frozen=True, eq=False)
class CovarianceResult:
    """`count` rows, `mean` [d] and population `covariance` [d, d], float64; the covariance is exactly symmetric."""

    count: int
    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]

    @property
    def second_moment(self) -> Float[Tensor, "d d"]:
        """Mean of x x^T, uncentred [d, d]."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def correlation(self) -> Float[Tensor, "d d"]:
        """Pearson correlation [d, d]; NaN for a unit that never varies."""
        scale = self.covariance.diagonal().sqrt()
        return self.covariance / torch.outer(scale, scale)


class Covariance(Accumulator):
    """Mean and covariance of vectors of `d` numbers.

    Args:
        d: the length of a vector.
    """

    def __init__(self, d: int) -> None:
        (self.d,) = as_shape(d)
        self.count = 0
        self._origin = torch.zeros(self.d, dtype=torch.float64)
        self._offset = torch.zeros(self.d, dtype=torch.float64)
        self._scatter = torch.zeros((self.d, self.d), dtype=torch.float64)

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values [..., d]; `mask` [...] (boolean) says which rows count.

        Raises:
            DataError: when shapes do not fit, or a counted value is NaN or infinite.
        """
        rows = unit_rows(values, (self.d,), mask, "Covariance.update")
        if not rows.shape[0]:
            return
        home = self._origin.device
        if not self.count:
            self._origin = rows[0].to(home, torch.float64, copy=True)
        origin = self._origin.to(rows.device)
        for block in blocks(rows, _ROWS * self.d):
            shifted = block.to(torch.float64) - origin
            mean = shifted.mean(dim=0)
            shifted -= mean
            self._chan(block.shape[0], mean.to(home), (shifted.T @ shifted).to(home))

    def _chan(self, count: int, offset: Float[Tensor, " d"], scatter: Float[Tensor, "d d"]) -> None:
        """Take in `count` rows whose mean is `offset` from this origin."""
        whole = self.count + count
        delta = offset - self._offset
        self._offset = self._offset + delta * (count / whole)
        self._scatter = (self._scatter + scatter).addr_(delta, delta, alpha=self.count * count / whole)
        self.count = whole

    def _absorb(self, other: Self) -> None:
        if not other.count:
            return
        if not self.count:
            self._origin = other._origin.clone()
        self._chan(other.count, (other._origin - self._origin) + other._offset, other._scatter)

    def result(self) -> CovarianceResult:
        """Mean and population covariance.

        Raises:
            DataError: when nothing was counted.
        """
        if not self.count:
            raise error(DataError, "Covariance has counted nothing", do="call update with at least one row")
        symmetric = (self._scatter + self._scatter.T) / (2 * self.count)
        return CovarianceResult(self.count, self._origin + self._offset, symmetric)

    def state(self) -> dict[str, Tensor]:
        """Count, origin, offset and scatter matrix."""
        parts = {"origin": self._origin, "offset": self._offset, "scatter": self._scatter}
        return {"count": int_scalar(self.count), **{name: tensor.clone() for name, tensor in parts.items()}}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(state["origin"].shape[0])
        new.count, new._origin = int(state["count"]), state["origin"].reshape(new.d)
        new._offset, new._scatter = state["offset"].reshape(new.d), state["scatter"].reshape(new.d, new.d)
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.d,)
