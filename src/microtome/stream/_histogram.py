"""How the values of each unit are distributed: counts in given bins, and quantiles with a stated error.

Formula:  bins are half open, [e_i, e_i+1), and the last is closed, as in numpy. A quantile q of n values is the one of
          rank floor(q (n - 1)). With g = (1 + a) / (1 - a), a value x is counted in bucket ceil(log_g(|x| / s)) of its
          sign, and bucket i is reported as 2 s g^i / (g + 1), which is within a |x| of every x in it.
Source:   Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch", 2019 (1908.10693), section 2.
          Departs: buckets are never collapsed, and values below s in size are counted as 0.
Cost:     one binary search a value and 8 units (bins + 2) bytes; one logarithm a value and
          8 units (2 ln(max / s) / ln g + 1) bytes.
Check:    splits and merges are equal; counts equal numpy's; quantiles within a |x| (or s, for |x| < s) of numpy's.
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
from microtome.stream._accumulator import Accumulator, as_shape, blocks, int_scalar, unit_rows

DEFAULT_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BLOCK = 2**22  # values a block: each needs a bucket number and its count, so blocks are larger than the cache


@shown
@dataclass(frozen=True, eq=False)
class HistogramResult:
    """`edges` [unit, bin + 1] (float64); `count` [unit, bin], `below` and `above` [unit], outside the edges (int64)."""

    edges: Float[Tensor, "unit edge"]
    count: Int[Tensor, "unit bin"]
    below: Int[Tensor, " unit"]
    above: Int[Tensor, " unit"]


class Histogram(Accumulator):
    """Counts of each unit's values in bins.

    Args:
        units: how many units.
        edges: rising bin edges [bin + 1] for all units, or [unit, bin + 1].
    """

    def __init__(self, units: int, edges: Tensor | Sequence[float]) -> None:
        (self.units,) = as_shape(units)
        self.edges = torch.as_tensor(edges, dtype=torch.float64).detach().clone()
        fits = self.edges.ndim == 1 or (self.edges.ndim == 2 and self.edges.shape[0] == self.units)
        if not fits or self.edges.shape[-1] < 2 or not bool((self.edges.diff(dim=-1) > 0).all()):
            got, allowed = tuple(self.edges.shape), f"rising edges [bins + 1] or [{self.units}, bins + 1]"
            raise error(DataError, "Histogram: the edges do not fit, or do not increase", got=got, allowed=allowed)
        self._count = torch.zeros((self.units, self.edges.shape[-1] + 1), dtype=torch.int64)

    @classmethod
    def uniform(cls, units: int, lo: float | Tensor, hi: float | Tensor, bins: int) -> Self:
        """A histogram of `bins` equal bins from `lo` to `hi`, each one number or one per unit [unit]."""
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (lo, hi))
        (steps,) = as_shape(bins)
        share = torch.arange(steps + 1, dtype=torch.float64) / steps
        return cls(units, low[..., None] * (1 - share) + high[..., None] * share)

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values [..., unit]; `mask` [...] (boolean) says which rows count.

        Raises:
            DataError: when shapes do not fit, or a counted value is NaN or infinite.
        """
        rows = unit_rows(values, (self.units,), mask, "Histogram.update")
        edges = self.edges.to(rows.device)
        for block in blocks(rows, _BLOCK):
            table = block.to(torch.float64).T.contiguous()
            slot = torch.searchsorted(edges, table, right=True)
            slot -= (table == edges[..., -1:]).to(slot)  # the last bin is closed
            self._count = self._count + _count_slots(slot, self._count.shape[1]).to(self._count)

    def _absorb(self, other: Self) -> None:
        self._count = self._count + other._count

    def result(self) -> HistogramResult:
        """Edges and counts; one row of edges a unit even when all share them."""
        edges = self.edges.expand(self.units, self.edges.shape[-1]).clone()
        count = self._count.clone()
        return HistogramResult(edges, count[:, 1:-1], count[:, 0], count[:, -1])

    def state(self) -> dict[str, Tensor]:
        """Edges and counts, what fell below and above included."""
        return {"edges": self.edges.clone(), "count": self._count.clone()}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(state["count"].shape[0], state["edges"])
        new._count = state["count"].reshape(new._count.shape)
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.units, str(self.edges.cpu().numpy().tolist()))


@shown
@dataclass(frozen=True, eq=False)
class QuantilesResult:
    """`values` [unit, q] (float64): the quantiles `q` of `count` rows, each within `accuracy` |x| of the true x."""

    q: tuple[float, ...]
    values: Float[Tensor, "unit q"]
    count: int
    accuracy: float
    smallest: float


class Quantiles(Accumulator):
    """A sketch of each unit's distribution that answers any quantile with a bounded relative error.

    Args:
        units: how many units.
        accuracy: the largest relative error of a quantile.
        smallest: values below this in size count as 0, so that near zero the error is at most this; the default is far
            below the activations that matter, and keeps the sketch of a float32 tensor small.
    """

    def __init__(self, units: int, accuracy: float = 0.01, smallest: float = 1e-4) -> None:
        (self.units,) = as_shape(units)
        if not 1e-6 <= accuracy < 1 or not 0 < smallest < math.inf:
            got, allowed = f"accuracy {accuracy}, smallest {smallest}", "1e-6 <= accuracy < 1 and 0 < smallest"
            raise error(DataError, "Quantiles: settings out of range", got=got, allowed=allowed)
        self.accuracy, self.smallest = float(accuracy), float(smallest)
        self.count = 0
        self._growth = math.log1p(self.accuracy) - math.log1p(-self.accuracy)  # ln g
        self._count = torch.zeros((self.units, 1), dtype=torch.int64)  # most negative bucket ... zero ... most positive

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values [..., unit]; `mask` [...] (boolean) says which rows count.

        Raises:
            DataError: when shapes do not fit, or a counted value is NaN or infinite.
        """
        rows = unit_rows(values, (self.units,), mask, "Quantiles.update")
        for block in blocks(rows, _BLOCK):
            table = block.to(torch.float64)
            size = table.abs()
            bucket = (size / self.smallest).log_().div_(self._growth).ceil_().clamp_(min=0).add_(1)
            bucket = bucket.masked_fill_(size < self.smallest, 0).mul_(table.sign()).to(torch.int64)
            self._grow(int(bucket.abs().max()))
            slots = bucket.add_(self._count.shape[1] // 2).T
            self._count = self._count + _count_slots(slots, self._count.shape[1]).to(self._count)
        self.count += rows.shape[0]

    def _grow(self, side: int) -> None:
        """Make room for `side` buckets on each side of zero."""
        more = side - self._count.shape[1] // 2
        if more > 0:
            self._count = torch.nn.functional.pad(self._count, (more, more))

    def _absorb(self, other: Self) -> None:
        self._grow(other._count.shape[1] // 2)
        more = (self._count.shape[1] - other._count.shape[1]) // 2
        self._count = self._count + torch.nn.functional.pad(other._count, (more, more))
        self.count += other.count

    def result(self, q: Sequence[float] = DEFAULT_QUANTILES) -> QuantilesResult:
        """The quantiles `q` of each unit.

        Args:
            q: shares from 0 (the least value) to 1 (the greatest).

        Returns:
            Values [unit, q], within `accuracy` |x| of the true value x of rank floor(q (count - 1)), or within
            `smallest` of it where |x| < `smallest`.

        Raises:
            DataError: when nothing was counted, or a share is outside 0 to 1.
        """
        if not self.count:
            raise error(DataError, "Quantiles has counted nothing", do="call update with at least one row")
        if not all(0 <= share <= 1 for share in q):
            raise error(DataError, "a quantile is out of range", got=list(q), allowed="0 to 1")
        ranks = torch.tensor([math.floor(share * (self.count - 1)) for share in q], dtype=torch.int64)
        up_to = self._count.cumsum(dim=1)
        slot = torch.searchsorted(up_to, ranks.to(up_to).expand(self.units, -1).contiguous(), right=True)
        bucket = slot - self._count.shape[1] // 2
        size = self.smallest * (1 - self.accuracy) * ((bucket.abs().double() - 1) * self._growth).exp()
        return QuantilesResult(tuple(q), size * bucket.sign(), self.count, self.accuracy, self.smallest)

    def state(self) -> dict[str, Tensor]:
        """Counts of all buckets, the number of rows, accuracy and smallest size."""
        settings = {"accuracy": self.accuracy, "smallest": self.smallest}
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in settings.items()}
        return {"count": int_scalar(self.count), "buckets": self._count.clone(), **numbers}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(state["buckets"].shape[0], float(state["accuracy"]), float(state["smallest"]))
        new._count, new.count = state["buckets"].reshape(new.units, -1), int(state["count"])
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.units, self.accuracy, self.smallest)


def _count_slots(slots: Int[Tensor, "unit row"], width: int) -> Int[Tensor, "unit {width}"]:
    """How often each slot 0 to width - 1 occurs in each row of `slots` [unit, row], as int64 [unit, slot]."""
    first = torch.arange(slots.shape[0], device=slots.device)[:, None] * width
    return (slots + first).reshape(-1).bincount(minlength=slots.shape[0] * width).reshape(-1, width)
