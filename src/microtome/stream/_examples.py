"""Means over tokens that remember their examples, so that an interval can be over examples and not over tokens.

Formula:  with s_e = sum over the tokens of example e of x, and n_e their number:
          mean = sum_e s_e / sum_e n_e;  interval: `mean_interval` of s with the weights n.
Law:      an example whose tokens come in several batches, in any order, counts once.
Cost:     one sum over the values; 8 examples x units bytes.
Check:    tests/laws/test_accumulators.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.stream._accumulator import Accumulator, as_shape, check_mask, require_finite


@shown
@dataclass(frozen=True, eq=False)
class ExampleMeansResult:
    """What `ExampleMeans` measured, float64.

    Attributes:
        example: [example] the number of each example, in order.
        count: [example] how many tokens of it were counted.
        total: [example, *shape] the sum over them.
    """

    example: Int[Tensor, " example"]
    count: Float[Tensor, " example"]
    total: Float[Tensor, "example ..."]

    @property
    def mean(self) -> Float[Tensor, "*unit"]:
        """The mean over all tokens, of the accumulator's shape."""
        return self.total.sum(0) / self.count.sum()

    @property
    def each(self) -> Float[Tensor, "example ..."]:
        """The mean of each example [example, *shape]."""
        return self.total / self.count.reshape(-1, *[1] * (self.total.dim() - 1))


class ExampleMeans(Accumulator):
    """The mean of each unit over tokens, with what each example has added to it.

    Args:
        shape: the axes of one value, such as `9` for heads.
    """

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        self.shape = as_shape(shape)
        units = torch.Size(self.shape).numel()
        self._example = torch.zeros(0, dtype=torch.int64)
        self._count = torch.zeros(0, dtype=torch.float64)
        self._total = torch.zeros((0, units), dtype=torch.float64)

    def update(self, values: Tensor, example: Tensor, mask: Tensor | None = None, absent: Tensor | None = None) -> None:
        """Take in values of examples, one each or one a token.

        Args:
            values: [example, *shape], or [example, pos, *shape].
            example: [example] int64, what each row is called; rows of one name are one example.
            mask: [example, pos] or [example] (boolean), which values count; all by default.
            absent: [*shape] (boolean), units of which there are no values: their sums are NaN.

        Raises:
            DataError: when the shapes do not fit, or a counted value is NaN or infinite.
        """
        where = "ExampleMeans.update"
        lead = values.dim() - len(self.shape)
        if lead not in (1, 2) or tuple(values.shape[lead:]) != self.shape or tuple(example.shape) != values.shape[:1]:
            allowed = f"[example, {', '.join(map(str, self.shape))}] or [example, pos, ...]"
            got = f"values {tuple(values.shape)}, examples {tuple(example.shape)}"
            raise error(DataError, f"{where}: values have the wrong shape", got=got, allowed=allowed)
        rows = values.detach().reshape(values.shape[0], -1, self._total.shape[1])
        weight = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device if mask is None else mask.device)
        if mask is not None:
            check_mask(mask, tuple(values.shape[:lead]), where)
            weight = mask.reshape(weight.shape)
            there = weight.to(rows.device, non_blocking=True).unsqueeze(-1)
            rows = torch.where(there, rows, rows.new_zeros(()))
        nowhere = None if absent is None else absent.reshape(-1).to(rows.device)
        rows = rows if nowhere is None else rows.masked_fill(nowhere, 0.0)
        require_finite(rows.flatten(0, 1), self.shape, where)
        total = rows.sum(1, dtype=torch.float64).to(self._total)
        total = total if nowhere is None else total.masked_fill(nowhere.to(total.device), torch.nan)
        count = weight.sum(1, dtype=torch.float64).to(self._count)
        counted = count > 0
        self._take(example.to(self._example)[counted], count[counted], total[counted])

    def _take(
        self, example: Int[Tensor, " example"], count: Float[Tensor, " example"], total: Float[Tensor, "example unit"]
    ) -> None:
        every = torch.cat([self._example, example])
        self._example, place = every.unique(return_inverse=True)
        size = len(self._example)
        self._count = torch.zeros(size, dtype=torch.float64).index_add_(0, place, torch.cat([self._count, count]))
        totals = torch.cat([self._total, total])
        self._total = torch.zeros((size, totals.shape[1]), dtype=torch.float64).index_add_(0, place, totals)

    def along_last(self) -> list[ExampleMeans]:
        """The same for each index of the last axis alone: of values that were stacked to be taken in together."""
        *shape, size = self.shape
        totals = self._total.reshape(len(self._example), -1, size)
        found: list[ExampleMeans] = []
        for i in range(size):
            part = ExampleMeans(tuple(shape))
            part._example, part._count, part._total = self._example, self._count, totals[..., i]
            found.append(part)
        return found

    def _absorb(self, other: Self) -> None:
        self._take(other._example, other._count, other._total)

    @property
    def examples(self) -> int:
        """How many examples have been counted."""
        return len(self._example)

    @property
    def mean(self) -> Float[Tensor, "*unit"]:
        """The mean over all tokens, of the accumulator's shape; NaN where nothing was counted."""
        return self._total.sum(0).reshape(self.shape) / self._count.sum()

    def result(self, *, empty: bool = False) -> ExampleMeansResult:
        """Sums and counts by example.

        Args:
            empty: a result of no examples is one too, such as of a group with too little text: its mean is NaN.

        Raises:
            DataError: when nothing was counted, but for `empty`.
        """
        if not empty and not len(self._example):
            raise error(DataError, "ExampleMeans has counted nothing", do="call update with at least one row")
        total = self._total.clone().reshape(len(self._example), *self.shape)
        return ExampleMeansResult(self._example.clone(), self._count.clone(), total)

    def state(self) -> dict[str, Tensor]:
        """Examples, counts, sums and shape."""
        parts = {"example": self._example.clone(), "count": self._count.clone(), "total": self._total.clone()}
        return {**parts, "shape": torch.tensor(self.shape, dtype=torch.int64)}

    @classmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        new = cls(tuple(int(axis) for axis in state["shape"]))
        new._example, new._count = state["example"], state["count"]
        new._total = state["total"].reshape(len(new._example), new._total.shape[1])
        return new

    def _settings(self) -> tuple[object, ...]:
        return (self.shape,)
