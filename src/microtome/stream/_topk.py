"""The contexts in which each unit peaks highest, and rows drawn at random, exact whatever the order in which they come.

Formula:  peak(row, u) = max over pos of x[row, pos, u], at the first pos that reaches it; each unit keeps its k largest
          peaks, ordered by value (descending), then by the peak's global token index, then by the row's start. A random
          draw keeps the k rows whose hashed start is largest instead: evenly drawn, and the same for every unit.
          Around each peak the values of the unit at the tokens before and behind it are kept, NaN beyond the row.
Cost:     one max over the values and three sorts of k + batch numbers a unit; (24 + 4 context) units k bytes.
Check:    any split and any order of merges gives equal tensors, ties included; equal to sorting everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import Accumulator, as_shape, check_mask, int_scalar, unit_rows


@shown
@dataclass(frozen=True, eq=False)
class TopResult:
    """Each [unit, rank], best first; slots that were never filled hold value -inf, index -1 and start -1.

    `values` (float64) are the peaks, `index` (int64) the global token index of each peak, `start` (int64) the global
    index of the first token of its row, so that the peak is at position `index - start` of the row. `around` (float32)
    are the unit's values at the tokens around each peak, NaN where the row ends or a token does not count.
    """

    values: Float[Tensor, "unit rank"]
    index: Int[Tensor, "unit rank"]
    start: Int[Tensor, "unit rank"]
    around: Float[Tensor, "unit rank token"]


class TopExamples(Accumulator):
    """The k rows in which each unit peaks highest, one peak per row.

    For the lowest, update a second one with the negated values. A row given twice is kept twice.

    Args:
        units: how many units.
        k: how many rows to keep for each.
        context: how many tokens before a peak, and how many behind it, the unit's values are kept of.
    """

    def __init__(self, units: int, k: int, context: tuple[int, int] = (0, 0)) -> None:
        self.units, self.k = as_shape((units, k))
        self.context = (int(context[0]), int(context[1]))
        self.rows = 0
        self._key = torch.full((self.units, self.k), -torch.inf, dtype=torch.float64)
        self._values = torch.full((self.units, self.k), -torch.inf, dtype=torch.float64)
        self._index = torch.full((self.units, self.k), -1, dtype=torch.int64)
        self._start = torch.full((self.units, self.k), -1, dtype=torch.int64)
        self._around = torch.full((self.units, self.k, 1 + sum(self.context)), torch.nan)

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
                values, first, mask = values[some.to(values.device)], first[some.to(home)], mask[some]
        self.rows += values.shape[0] if values.shape[1] else 0
        if (chosen := self._may_enter(first)) is not None:
            values, first = values[chosen.to(values.device)], first[chosen]
            mask = None if mask is None else mask[chosen.to(mask.device)]
        if not values.shape[0] or not values.shape[1]:
            return
        peaks, positions = values.max(dim=1)
        around = self._window(values, positions, mask)
        peaks, positions = peaks.to(home, torch.float64), positions.to(home)
        starts = first[:, None].expand_as(positions)
        self._keep(self._rank(peaks, first).T, peaks.T, (positions + starts).T, starts.T, around.to(home))

    def _may_enter(self, start: Int[Tensor, " row"]) -> Bool[Tensor, " row"] | None:
        """Which rows may be kept, where that can be said without their values; None for all."""
        return None

    def _rank(self, peaks: Float[Tensor, "row unit"], start: Int[Tensor, " row"]) -> Float[Tensor, "row unit"]:
        """What rows are kept by, the largest first."""
        return peaks

    def _window(
        self, values: Tensor, positions: Int[Tensor, "row unit"], mask: Tensor | None
    ) -> Float[Tensor, "unit row token"]:
        """The values of each unit around its peak in each row; NaN beyond the row, and at what does not count."""
        before, behind = self.context
        places = positions[:, None] + torch.arange(-before, behind + 1, device=values.device)[:, None]
        inside = places.clamp(0, values.shape[1] - 1)
        there = places == inside
        if mask is not None:
            rows = torch.arange(len(values), device=values.device)[:, None, None]
            there &= mask.to(values.device)[rows, inside]
        return values.gather(1, inside).float().masked_fill(~there, torch.nan).permute(2, 0, 1)

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
        key: Float[Tensor, "unit candidate"],
        values: Float[Tensor, "unit candidate"],
        index: Int[Tensor, "unit candidate"],
        start: Int[Tensor, "unit candidate"],
        around: Float[Tensor, "unit candidate token"],
    ) -> None:
        """Keep the k best of what is held and the candidates [unit, candidate]."""
        pool = [
            torch.cat(pair, dim=1)
            for pair in ((self._key, key), (self._index, index), (self._start, start), (self._values, values))
        ]
        chosen = torch.arange(pool[0].shape[1], device=key.device).expand(self.units, -1)
        for part, descending in ((2, False), (1, False), (0, True)):  # stable: the last sort rules
            order = pool[part].gather(1, chosen).argsort(dim=1, descending=descending, stable=True)
            chosen = chosen.gather(1, order)
        chosen = chosen[:, : self.k]
        self._key, self._index, self._start, self._values = (x.gather(1, chosen) for x in pool)
        windows = torch.cat((self._around, around), dim=1)
        self._around = windows.gather(1, chosen[..., None].expand(-1, -1, windows.shape[2]))

    def _absorb(self, other: Self) -> None:
        self._keep(other._key, other._values, other._index, other._start, other._around)
        self.rows += other.rows

    def result(self) -> TopResult:
        """The rows of each unit [unit, rank], best first."""
        self._rest()
        return TopResult(self._values.clone(), self._index.clone(), self._start.clone(), self._around.clone())

    def state(self) -> dict[str, Tensor]:
        """What rows are kept by, values, indices, starts, the values around, and the number of rows seen."""
        self._rest()
        held = {"key": self._key, "values": self._values, "index": self._index, "start": self._start}
        parts = {name: x.clone() for name, x in held.items()} | {"around": self._around.clone()}
        return {**parts, "rows": int_scalar(self.rows), "before": int_scalar(self.context[0])}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        units, k = state["values"].shape
        before = int(state["before"])
        new = cls(units, k, (before, state["around"].shape[2] - 1 - before))
        new._key, new._values, new.rows = state["key"].reshape(units, k), state["values"], int(state["rows"])
        new._index, new._start = state["index"].reshape(units, k), state["start"].reshape(units, k)
        new._around = state["around"].reshape(new._around.shape)
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.units, self.k, self.context)


class DrawnExamples(TopExamples):
    """The peaks of each unit in k rows that are drawn evenly from all rows, the same for every unit.

    A row is drawn by a hash of its start (SplitMix64, salted), so that any split of the rows gives the same draw.
    """

    def _rank(self, peaks: Float[Tensor, "row unit"], start: Int[Tensor, " row"]) -> Float[Tensor, "row unit"]:
        return _keys(start)[:, None].to(peaks.device).expand_as(peaks)

    def _may_enter(self, start: Int[Tensor, " row"]) -> Bool[Tensor, " row"] | None:
        """The rows that are drawn before the last one that is held; of equal ones the order of places decides."""
        return _keys(start).to(start.device) >= self._key[0, -1].to(start.device) if self.units and self.k else None


def _keys(start: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """What rows are drawn by: those of the largest numbers."""
    return torch.tensor([_hashed(number) for number in start.tolist()], dtype=torch.float64)


def _hashed(number: int) -> float:
    """A number from 0 to 1 that looks random (SplitMix64)."""
    z = (number + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) / 2**64
