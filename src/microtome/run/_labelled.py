"""Captured tensors as one labelled dataset: variables that select alike share an axis, others have one of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Captured:
    """One variable to be.

    Attributes:
        array: its values, with the plain names of its axes.
        pos: the axis of its positions.
        columns: the columns [batch, n] along it; None for all that there are.
    """

    array: xr.DataArray
    pos: str
    columns: Tensor | None


def joined(parts: Mapping[str, Captured], attrs: Mapping[str, object]) -> tuple[xr.Dataset, dict[str, Tensor | None]]:
    """One dataset of several variables, and the columns of each of its axes of positions.

    Where variables select differently along an axis, the longest selection, or the first of equals, keeps its name;
    the others are numbered: `pos_2`, `pos_3`. Each axis has its own coordinate, so nothing is padded or repeated.
    """
    import xarray as xr

    kinds: dict[str, list[tuple[int, list[object] | None, Tensor | None]]] = {}
    for part in parts.values():
        for dim in map(str, part.array.dims):
            kind = _kind(part, dim)
            if not any(_same(kind, known) for known in kinds.setdefault(dim, [])):
                kinds[dim].append(kind)
    for found in kinds.values():
        found.sort(key=lambda kind: -kind[0])  # a stable sort: the first of equals stays first
    variables: dict[str, xr.DataArray] = {}
    columns: dict[str, Tensor | None] = {}
    for name, part in parts.items():
        names: dict[str, str] = {}
        for dim in map(str, part.array.dims):
            place = next(i for i, known in enumerate(kinds[dim]) if _same(_kind(part, dim), known))
            names[dim] = dim if place == 0 else f"{dim}_{place + 1}"
        variables[name] = part.array.rename({old: new for old, new in names.items() if old != new})
        columns.setdefault(names[part.pos], part.columns)
    return xr.Dataset(variables, attrs=dict(attrs)), columns


def _kind(part: Captured, dim: str) -> tuple[int, list[object] | None, Tensor | None]:
    """What a variable selects along an axis: how much, its labels, and the columns where rows may differ in them."""
    labels = part.array[dim].values.tolist() if dim in part.array.coords else None
    return part.array.sizes[dim], labels, part.columns if dim == part.pos else None


def _same(
    one: tuple[int, list[object] | None, Tensor | None], other: tuple[int, list[object] | None, Tensor | None]
) -> bool:
    if one[:2] != other[:2]:
        return False
    a, b = one[2], other[2]
    return a is b if a is None or b is None else torch.equal(a, b)
