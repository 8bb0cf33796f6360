"""The smallest and the largest value of each unit, exact.

Cost:  one minimum and one maximum over the values; 2 numbers a unit.
Check: tests/laws/test_accumulators.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import Accumulator, as_shape, unit_rows


@shown
@dataclass(frozen=True, eq=False)
class ExtremesResult:
    """`min` and `max`, float64 tensors of the accumulator's shape."""

    min: Float[Tensor, "*unit"]
    max: Float[Tensor, "*unit"]

    @property
    def max_abs(self) -> Float[Tensor, "*unit"]:
        """The largest absolute value of each unit."""
        return torch.maximum(self.max, -self.min)


class Extremes(Accumulator):
    """The smallest and the largest value of each unit.

    Args:
        shape: the axes of one row.
    """

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        self.shape = as_shape(shape)
        units = torch.Size(self.shape).numel()
        self._min = torch.full((units,), torch.inf, dtype=torch.float64)
        self._max = torch.full((units,), -torch.inf, dtype=torch.float64)

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values [..., *shape]; `mask` [...] (boolean) says which rows count, all by default.

        Raises:
            DataError: when the shapes do not fit, or a counted value is NaN or infinite.
        """
        rows = unit_rows(values, self.shape, mask, "Extremes.update")
        if rows.shape[0]:
            self._follow(rows)
            low, high = torch.aminmax(rows, dim=0)
            self._min = torch.minimum(self._min, low.to(self._min))
            self._max = torch.maximum(self._max, high.to(self._max))

    def _absorb(self, other: Self) -> None:
        self._min = torch.minimum(self._min, other._min)
        self._max = torch.maximum(self._max, other._max)

    def result(self) -> ExtremesResult:
        """The extremes of each unit.

        Raises:
            DataError: when nothing was counted.
        """
        self._rest()
        if bool((self._min > self._max).any()):
            raise error(DataError, "Extremes has counted nothing", do="call update with at least one row")
        return ExtremesResult(self._min.clone().reshape(self.shape), self._max.clone().reshape(self.shape))

    def state(self) -> dict[str, Tensor]:
        """Minimum, maximum and shape."""
        self._rest()
        shape = torch.tensor(self.shape, dtype=torch.int64)
        return {"min": self._min.clone(), "max": self._max.clone(), "shape": shape}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(tuple(int(axis) for axis in state["shape"]))
        new._min, new._max = (state[name].reshape(new._min.shape) for name in ("min", "max"))
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.shape,)
