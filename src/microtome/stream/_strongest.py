"""The token at which each unit is strongest among some tokens, whatever the order in which they come.

Formula:  t(u) = argmax over the tokens that count for u of |x[t, u]|, the first of them where several are equal.
Cost:     one max over the values; 32 bytes a unit.
Check:    tests/laws/test_strongest.py: any split and any order of merges gives equal tensors, ties included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import Accumulator, as_shape, unit_rows

NEVER = -1


@shown
@dataclass(frozen=True, eq=False)
class StrongestResult:
    """Each [unit]: its strongest token.

    `value` (float64) is the unit's there, NaN where no token counted; `index` and `start` (int64) are of that token and
    of the row that it is in, -1 where none counted.
    """

    value: Float[Tensor, " unit"]
    index: Int[Tensor, " unit"]
    start: Int[Tensor, " unit"]


class Strongest(Accumulator):
    """The token at which each unit is strongest in absolute value.

    Args:
        units: how many units.
    """

    def __init__(self, units: int) -> None:
        (self.units,) = as_shape(units)
        self._value = torch.full((self.units,), torch.nan, dtype=torch.float64)
        self._index = torch.full((self.units,), NEVER, dtype=torch.int64)
        self._start = torch.full((self.units,), NEVER, dtype=torch.int64)

    def update(
        self,
        values: Tensor,
        index: Int[Tensor, " token"],
        start: Int[Tensor, " token"],
        counts: Bool[Tensor, "token unit"],
    ) -> None:
        """Take in values [token, unit].

        Args:
            values: of tokens in the order of their indices.
            index: the global index of each token.
            start: the global index of the first token of each token's row.
            counts: which tokens count for which units.

        Raises:
            DataError: the shapes do not fit, or a value is NaN or infinite.
        """
        rows = unit_rows(values, (self.units,), None, "Strongest.update")
        if tuple(counts.shape) != tuple(rows.shape) or len(index) != len(rows) or len(start) != len(rows):
            got = f"values {tuple(rows.shape)}, counts {tuple(counts.shape)}, {len(index)} indices, {len(start)} starts"
            raise error(
                DataError, "Strongest.update: the shapes do not fit", got=got, allowed="one of each for a token"
            )
        if not len(rows):
            return
        self._follow(rows)
        size, place = torch.where(counts.to(rows.device), rows.abs(), NEVER).max(0)
        value = rows.gather(0, place[None])[0].to(self._value)
        found = torch.where(size.to(value.device) < 0, torch.nan, value)
        place = place.to(self._index.device)
        self._take(found, index.to(self._index)[place], start.to(self._start)[place])

    def _take(self, value: Float[Tensor, " unit"], index: Int[Tensor, " unit"], start: Int[Tensor, " unit"]) -> None:
        """Keep what is larger, and of equals what comes first."""
        old, new = (x.abs().nan_to_num(nan=float(NEVER)) for x in (self._value, value))
        better = (new > old) | ((new == old) & (new >= 0) & (index < self._index))
        self._value = torch.where(better, value, self._value)
        self._index = torch.where(better, index, self._index)
        self._start = torch.where(better, start, self._start)

    def _absorb(self, other: Self) -> None:
        self._take(other._value, other._index, other._start)

    def result(self) -> StrongestResult:
        """Value and place of each unit."""
        self._rest()
        return StrongestResult(self._value.clone(), self._index.clone(), self._start.clone())

    def state(self) -> dict[str, Tensor]:
        """Values, indices and starts."""
        self._rest()
        return {"value": self._value.clone(), "index": self._index.clone(), "start": self._start.clone()}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(len(state["value"]))
        new._value, new._index, new._start = (state[name].reshape(new.units) for name in ("value", "index", "start"))
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.units,)
