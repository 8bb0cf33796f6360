"""How often each unit fires, by group of texts, and which units fire together. Counts are exact integers.

Formula:  fires_u = #{rows: x_u > threshold};  by group: #{rows of g: x_u fires};
          joint_uv = #{rows: u fires and v fires}.
Cost:     one comparison a value; `Cooccurrence` is one matrix product of rows x units^2 and 8 units^2 bytes.
          Sums of flags are made in float32 over at most 2^20 rows, where they are exact, then kept as int64.
Check:    splits and merges are equal; equal to the same counts made by numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import (
    Accumulator,
    as_shape,
    blocks,
    check_mask,
    int_scalar,
    pack_names,
    unit_rows,
    unpack_names,
)

_EXACT_ROWS = 2**20
_BLOCK_ROWS = 2**14
_FEW = 8  # groups from which on one product is quicker than a sum for each


@shown
@dataclass(frozen=True, eq=False)
class FiringResult:
    """`count` (int64, the accumulator's shape): rows above the threshold, of `total` rows."""

    count: Int[Tensor, "*unit"]
    total: int

    @property
    def rate(self) -> Float[Tensor, "*unit"]:
        """Share of rows in which each unit fires (float64); NaN when no row was counted."""
        return self.count.double() / self.total


class Firing(Accumulator):
    """How many rows have each unit above a threshold.

    Args:
        shape: the axes of one row.
        threshold: one number, or one per unit (a tensor of `shape`). It is rounded to the dtype of the values it is
            compared with. Strictly above counts as firing. 0 is the sign of an activation.
    """

    def __init__(self, shape: int | tuple[int, ...], threshold: float | Tensor = 0.0) -> None:
        self.shape = as_shape(shape)
        limit = torch.as_tensor(threshold, dtype=torch.float64).detach().clone()
        if (limit.ndim and tuple(limit.shape) != self.shape) or bool(limit.isnan().any()):
            got = f"shape {tuple(limit.shape)}{' with NaN' if bool(limit.isnan().any()) else ''}"
            raise error(DataError, "Firing: the threshold does not fit", got=got, allowed=f"a number or {self.shape}")
        self.threshold = limit
        self.total = 0
        self._count = torch.zeros(torch.Size(self.shape).numel(), dtype=torch.int64)

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values [..., *shape]; `mask` [...] (boolean) says which rows count.

        Raises:
            DataError: when the shapes do not fit, or a counted value is NaN or infinite.
        """
        rows = unit_rows(values, self.shape, mask, "Firing.update")
        self._follow(rows)
        limit = self.threshold.reshape(-1) if self.threshold.ndim else self.threshold
        limit = limit.to(rows.device, rows.dtype if rows.is_floating_point() else torch.float64)
        for block in blocks(rows):
            self._count = self._count + _sum_flags(block > limit).to(self._count)
        self.total += rows.shape[0]

    def _absorb(self, other: Self) -> None:
        self._count = self._count + other._count
        self.total += other.total

    def result(self) -> FiringResult:
        """Counts (int64) and the number of rows they are of."""
        self._rest()
        return FiringResult(self._count.clone().reshape(self.shape), self.total)

    def state(self) -> dict[str, Tensor]:
        """Counts, total, shape and threshold."""
        self._rest()
        shape = torch.tensor(self.shape, dtype=torch.int64)
        counts = {"count": self._count.clone(), "total": int_scalar(self.total)}
        return {**counts, "shape": shape, "threshold": self.threshold.clone()}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(tuple(int(axis) for axis in state["shape"]), state["threshold"])
        new._count, new.total = state["count"].reshape(new._count.shape), int(state["total"])
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.shape, str(self.threshold.cpu().numpy().tolist()))


@shown
@dataclass(frozen=True, eq=False)
class CounterResult:
    """`count` [group, unit] and `total` [group], int64, in the order of `groups`."""

    groups: tuple[str, ...]
    count: Int[Tensor, "group unit"]
    total: Int[Tensor, " group"]

    @property
    def rate(self) -> Float[Tensor, "group unit"]:
        """Share of each group's rows in which each unit fires [group, unit] (float64); NaN for an empty group."""
        return self.count.double() / self.total.double()[:, None]


class Counter(Accumulator):
    """How often each unit fires in each group of rows.

    Args:
        groups: the names of the groups; `update` gives each row the number of its group.
        units: how many units.
    """

    def __init__(self, groups: tuple[str, ...] | list[str], units: int) -> None:
        self.groups = tuple(groups)
        (self.units,) = as_shape(units)
        if not self.groups or len(set(self.groups)) != len(self.groups):
            raise error(DataError, "Counter: group names must be given, and differ", got=self.groups)
        self._count = torch.zeros((len(self.groups), self.units), dtype=torch.int64)
        self._total = torch.zeros(len(self.groups), dtype=torch.int64)

    def update(self, fired: Tensor, group: Tensor, mask: Tensor | None = None) -> None:
        """Take in flags [..., unit] (boolean) and the group number of each row [...] (integer); `mask` as elsewhere.

        Raises:
            DataError: when shapes or dtypes do not fit, or a group number is out of range.
        """
        rows = _flag_rows(fired, self.units, mask, "Counter.update")
        lead = tuple(fired.shape[:-1])
        if tuple(group.shape) != lead or group.is_floating_point() or group.dtype == torch.bool:
            got, allowed = f"{group.dtype} {tuple(group.shape)}", f"integers {lead}"
            raise error(DataError, "Counter.update: the group numbers do not fit", got=got, allowed=allowed)
        numbers = (group if mask is None else group[mask]).reshape(-1).to(self._total.device, torch.int64)
        if not numbers.numel():
            return
        if int(numbers.min()) < 0 or int(numbers.max()) >= len(self.groups):
            got, allowed = f"{int(numbers.min())} to {int(numbers.max())}", f"0 to {len(self.groups) - 1}"
            raise error(DataError, "Counter.update: a group number is out of range", got=got, allowed=allowed)
        self._total = self._total + numbers.bincount(minlength=len(self.groups))
        more = torch.zeros_like(self._count)
        if len(self.groups) > _FEW:
            for flags, own in zip(rows.split(_BLOCK_ROWS), numbers.split(_BLOCK_ROWS), strict=True):
                member = torch.nn.functional.one_hot(own, len(self.groups)).to(rows.device, torch.float32)
                more = more + (member.T @ flags.to(torch.float32)).to(more)
        else:
            for number in sorted({*numbers.cpu().numpy().tolist()}):
                more[number] = _sum_flags(rows[(numbers == number).to(rows.device)]).to(more)
        self._count = self._count + more

    def _absorb(self, other: Self) -> None:
        self._count = self._count + other._count
        self._total = self._total + other._total

    def result(self) -> CounterResult:
        """Counts [group, unit] and totals [group]."""
        return CounterResult(self.groups, self._count.clone(), self._total.clone())

    def state(self) -> dict[str, Tensor]:
        """Counts, totals and group names."""
        return {"count": self._count.clone(), "total": self._total.clone(), "groups": pack_names(self.groups)}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        groups, units = unpack_names(state["groups"]), state["count"].shape[1]
        new = cls(groups, units)
        new._count, new._total = state["count"].reshape(len(groups), units), state["total"].reshape(len(groups))
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.groups, self.units)


@shown
@dataclass(frozen=True, eq=False)
class CooccurrenceResult:
    """`joint` [unit, unit] (int64, symmetric): rows where both fire, of `total`; its diagonal is each unit's count."""

    joint: Int[Tensor, "unit unit"]
    total: int

    @property
    def count(self) -> Int[Tensor, " unit"]:
        """How often each unit fires [unit] (int64)."""
        return self.joint.diagonal().clone()

    @property
    def jaccard(self) -> Float[Tensor, "unit unit"]:
        """Rows where both fire, over rows where either does [unit, unit] (float64); NaN where neither ever does."""
        count = self.count
        return self.joint.double() / (count[:, None] + count[None, :] - self.joint).double()


class Cooccurrence(Accumulator):
    """How often each pair of units fires in the same row.

    Args:
        units: how many units; the state takes 8 units^2 bytes.
    """

    def __init__(self, units: int) -> None:
        (self.units,) = as_shape(units)
        self.total = 0
        self._joint = torch.zeros((self.units, self.units), dtype=torch.int64)

    def update(self, fired: Tensor, mask: Tensor | None = None) -> None:
        """Take in flags [..., unit] (boolean); `mask` [...] (boolean) says which rows count.

        Raises:
            DataError: when shapes or dtypes do not fit.
        """
        rows = _flag_rows(fired, self.units, mask, "Cooccurrence.update")
        for block in blocks(rows, _EXACT_ROWS * self.units):
            flags = block.to(torch.float32)
            self._joint = self._joint + (flags.T @ flags).to(self._joint)
        self.total += rows.shape[0]

    def _absorb(self, other: Self) -> None:
        self._joint = self._joint + other._joint
        self.total += other.total

    def result(self) -> CooccurrenceResult:
        """Joint counts [unit, unit] and the number of rows."""
        return CooccurrenceResult(self._joint.clone(), self.total)

    def state(self) -> dict[str, Tensor]:
        """Joint counts and total."""
        return {"joint": self._joint.clone(), "total": int_scalar(self.total)}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(state["joint"].shape[0])
        new._joint, new.total = state["joint"].reshape(new.units, new.units), int(state["total"])
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.units,)


def _flag_rows(fired: Tensor, units: int, mask: Tensor | None, where: str) -> Bool[Tensor, "row {units}"]:
    """Boolean flags [..., unit] as a table [row, unit] of the rows that count."""
    if fired.dtype != torch.bool or not fired.ndim or fired.shape[-1] != units:
        got, allowed = f"{fired.dtype} {tuple(fired.shape)}", f"torch.bool [..., {units}]"
        raise error(DataError, f"{where}: flags do not fit", got=got, allowed=allowed, do="pass values > threshold")
    rows = fired.detach().reshape(-1, units)
    if mask is None:
        return rows
    check_mask(mask, tuple(fired.shape[:-1]), where)
    return rows[mask.reshape(-1).to(rows.device)]


def _sum_flags(flags: Bool[Tensor, "row unit"]) -> Int[Tensor, " unit"]:
    """How many of the rows [row, unit] are true, for each unit; exact."""
    if not flags.is_cpu:  # where whole numbers are added as fast
        return flags.sum(dim=0)
    total = torch.zeros(flags.shape[1], dtype=torch.int64, device=flags.device)
    for block in blocks(flags, _EXACT_ROWS * flags.shape[1]):
        total += block.to(torch.float32).sum(dim=0).to(torch.int64)
    return total
