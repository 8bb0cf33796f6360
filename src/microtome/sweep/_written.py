"""Patches of many cells at one site, written by one operation: cell by cell they are many small ones, each a launch.

Formula:  x[row, column, unit] = source[row', column', unit] for all cells at once, where row' and column' are those of
          the cell's prompt in the other run.
Check:    equal to the patches one by one, to the bit; tests/laws/test_sweep.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from microtome.anatomy import Address, Site
from microtome.edit import Frame, Patch, SiteEdit


@dataclass(frozen=True)
class Act:
    """One edit in one layer: the site it names, the one where it is applied, its address, and its part of the frame."""

    edit: SiteEdit
    named: Site
    site: Site
    address: Address
    frame: Frame
    standing: bool = False


@dataclass(frozen=True, eq=False)
class Written:
    """The patches at one site that take from one tensor.

    Attributes:
        source: [batch, pos, unit, ...] the whole site of the other run.
        at: rows, columns and, unless all are taken, units that are written.
        of: rows, columns and units of the source.
        end: how many columns a prompt has.
    """

    source: Tensor
    at: tuple[Int[Tensor, " n"], ...]
    of: tuple[Int[Tensor, " n"], ...]
    end: int

    def fits(self, x: Tensor) -> bool:
        """Whether a tensor has the axes of the source behind its positions."""
        return x.shape[2:] == self.source.shape[2:]

    def put(self, x: Tensor) -> None:
        """Write into x [row, pos, unit, ...], which lacks the columns that a prefix holds."""
        rows, columns, *units = (part.to(x.device, non_blocking=True) for part in self.at)
        of = tuple(part.to(self.source.device, non_blocking=True) for part in self.of)
        x[(rows, columns - max(self.end - x.shape[1], 0), *units)] = self.source[of].to(x)


def written(acts: Sequence[tuple[int, Act]]) -> tuple[list[Written], list[int]]:
    """The acts at one site that are written together, and the places among them of those that are not.

    A row that several acts change has their order to keep; other edits, and parts of a subspace, depend on what is
    there.
    """
    times = Counter(row for row, _ in acts)
    groups: dict[tuple[int, bool], tuple[Tensor, int, list[list[int]]]] = {}
    others: list[int] = []
    for place, (row, act) in enumerate(acts):
        found = _source(act) if times[row] == 1 else None
        if found is None:
            others.append(place)
            continue
        source, of, shift = found
        units = None if act.address.units.is_all else act.address.units.resolve(source.shape[2])
        columns = range(act.frame.width) if act.frame.columns is None else act.frame.columns[0].tolist()
        key = id(source), units is None
        into = groups.setdefault(key, (source, act.frame.end, []))[2]
        into += [[row, c, of, c + shift, unit] for c in columns for unit in units or (0,)]
    made: list[Written] = []
    for (_, whole), (source, end, index) in groups.items():
        row, column, of, at, unit = torch.tensor(index).unbind(1)
        units = () if whole else (unit,)
        made.append(Written(source, (row, column, *units), (of, at, *units), end))
    return made, others


def _source(act: Act) -> tuple[Tensor, int, int] | None:
    """Tensor, row and first column that a patch takes from; None where it is not written together with others."""
    edit, dims = act.edit, act.named.spec.dims
    if type(edit) is not Patch or edit.basis is not None or act.standing or dims[1] != "pos" or len(dims) < 3:
        return None
    source, row, first, length = edit.taken(act.named, act.frame)
    last = act.frame.width - 1 if act.frame.columns is None else int(act.frame.columns.max())
    units = act.address.units
    if last >= length or (not units.is_all and units.resolve(source.shape[2]) is None):
        return None  # refused where it is applied
    return source, row, first
