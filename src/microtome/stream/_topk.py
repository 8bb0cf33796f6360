"""The contexts in which each unit peaks highest, exact whatever the order in which they come.

Formula:  peak(row, u) = max over pos of x[row, pos, u], at the first pos that reaches it; each unit keeps its k largest
          peaks, ordered by value (descending), then by the peak's global token index, then by the row's start.
Cost:     one max over the values and three sorts of k + batch numbers a unit; 24 units k bytes.
Check:    any split and any order of merges gives equal tensors, ties included; equal to sorting everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import Accumulator, as_shape, check_mask, int_scalar, unit_rows


@shown
@dataclass(frozen=True, eq=False)
class TopResult:
    """Each [unit, rank], best first; slots that were never filled hold value -inf, index -1 and start -1.

    `values` (float64) are the peaks, `index` (int64) the global token index of each peak, `start` (int64) the global
    index of the first token of its row, so that the peak is at position `index - start` of the row.
    """

    values: Float[Tensor, "unit rank"]
    index: Int[Tensor, "unit rank"]
    start: Int[Tensor, "unit rank"]


class TopExamples(Accumulator):
    """The k rows in which each unit peaks highest, one peak per row.

    For the lowest, update a second one with the negated values. A row given twice is kept twice.

    Args:
        units: how many units.
        k: how many rows to keep for each.
    """

    def __init__(self, units: int, k: int) -> None:
        self.units, self.k = as_shape((units, k))
        self.rows = 0
        self._values = torch.full((self.units, self.k), -torch.inf, dtype=torch.float64)
        self._index = torch.full((self.units, self.k), -1, dtype=torch.int64)
        self._start = torch.full((self.units, self.k), -1, dtype=torch.int64)

    def update(self, values: Tensor, start: Tensor | Sequence[int], mask: Tensor | None = None) -> None:
        """Take in values [batch, pos, unit].

        Args:
            values: activations.
            start: global index of the first token of each row [batch], not negative.
            mask: which positions count [batch, pos] (boolean), all by default. A row with none is left out.

        Raises:
            DataError: when shapes do not fit, or a counted value is NaN or infinite.
        """
        if values.ndim != 3 or values.shape[2] != self.units:
            allowed = f"[batch, pos, {self.units}]"
            raise error(DataError, "TopExamples.update: values have the wrong shape", got=tuple(values.shape),
                        allowed=allowed)  # fmt: skip
        self._follow(values)
        home = self._values.device
        first = self._starts(start, values.shape[0]).to(home, non_blocking=True)
        values = values.detach()
        if mask is not None:
            check_mask(mask, tuple(values.shape[:2]), "TopExamples.update")
        if not math.isfinite(values.sum().item()):
            unit_rows(values, (self.units,), mask, "TopExamples.update")
        if mask is not None:
            if not bool(mask.all()):
                lowest = -torch.inf if values.is_floating_point() else torch.iinfo(values.dtype).min
                values = values.masked_fill(~mask.to(values.device)[..., None], lowest)
            some = mask.any(dim=1)
            if not bool(some.all()):
                values, first = values[some.to(values.device)], first[some.to(home)]
        if not values.shape[0] or not values.shape[1]:
            return
        peaks, positions = values.max(dim=1)
        peaks, positions = peaks.to(home, torch.float64), positions.to(home)
        starts = first[:, None].expand_as(positions)
        self._keep(peaks.T, (positions + starts).T, starts.T)
        self.rows += values.shape[0]

    def _starts(self, start: Tensor | Sequence[int], batch: int) -> Int[Tensor, " {batch}"]:
        """Starts as int64 [batch], refused when they are not whole, not enough, or negative."""
        given = torch.as_tensor(start)
        whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool) or not given.numel()
        if not whole or tuple(given.shape) != (batch,) or bool((given < 0).any()):
            got, allowed = f"{given.dtype} {tuple(given.shape)}", f"{batch} integers from 0"
            raise error(DataError, "TopExamples.update: the starts do not fit", got=got, allowed=allowed)
        return given.detach().to(torch.int64)

    def _keep(
        self,
        values: Float[Tensor, "unit candidate"],
        index: Int[Tensor, "unit candidate"],
        start: Int[Tensor, "unit candidate"],
    ) -> None:
        """Keep the k best of what is held and the candidates [unit, candidate]."""
        pool: list[Tensor] = [torch.cat((self._values, values), dim=1)]
        pool += [torch.cat((self._index, index), dim=1), torch.cat((self._start, start), dim=1)]
        for key, descending in ((2, False), (1, False), (0, True)):  # stable: the last sort rules
            order = pool[key].argsort(dim=1, descending=descending, stable=True)
            order = order[:, : self.k] if key == 0 else order
            pool = [part.gather(1, order) for part in pool]
        self._values, self._index, self._start = pool

    def _absorb(self, other: Self) -> None:
        self._keep(other._values, other._index, other._start)
        self.rows += other.rows

    def result(self) -> TopResult:
        """The best peaks of each unit [unit, rank], best first."""
        self._rest()
        return TopResult(self._values.clone(), self._index.clone(), self._start.clone())

    def state(self) -> dict[str, Tensor]:
        """Values, indices, starts and the number of rows seen."""
        self._rest()
        parts = {"values": self._values.clone(), "index": self._index.clone(), "start": self._start.clone()}
        return {**parts, "rows": int_scalar(self.rows)}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        units, k = state["values"].shape
        new = cls(units, k)
        new._values, new.rows = state["values"], int(state["rows"])
        new._index, new._start = state["index"].reshape(units, k), state["start"].reshape(units, k)
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.units, self.k)
