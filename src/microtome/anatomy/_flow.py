"""What one forward passed between modules, and what that says of the form of a block.

Tensors are told apart by where they lie in memory, so that the module that wrote what another one reads is found
without any name; sums are found by trying them on the values. What is found here is a guess: the proof checks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome.shown import shown

FITS = 1e-3
"""Largest residual of a sum, relative to what is explained, with which its terms are taken for what was added.

Of numbers that are coarser than that it is one rounding of them; the proof has the last word.
"""

SAMPLE = 4096
"""Elements on which a sum is tried before it is tried on all."""


@shown
@dataclass(frozen=True)
class Seen:
    """A tensor that passed: where it lay, and what it was."""

    key: tuple[Any, ...]
    value: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        """A tensor as it is now."""
        return cls((x.data_ptr(), tuple(x.shape), x.storage_offset()), x.detach().clone())


@shown
@dataclass(frozen=True)
class Call:
    """One call of a module: which, what it read, and what it wrote, the hidden states first."""

    path: str
    reads: tuple[Seen, ...]
    writes: tuple[Seen, ...]

    @property
    def read(self) -> Seen | None:
        """The first tensor that it read."""
        return self.reads[0] if self.reads else None

    @property
    def wrote(self) -> Seen | None:
        """The first tensor that it wrote."""
        return self.writes[0] if self.writes else None


@shown
@dataclass
class Flow:
    """The calls of one forward, in the order in which they ended; `alive` keeps the tensors where they lie."""

    calls: list[Call] = field(default_factory=list[Call])
    alive: list[Any] = field(default_factory=list[Any])

    def first(self, path: str | None) -> Call | None:
        """The first call of a module."""
        return next((call for call in self.calls if call.path == path), None)

    def which(self, call: Call) -> tuple[int, int] | None:
        """Which call of its module a call is, from 0, and how many there are; None where it is the only one."""
        calls = [other for other in self.calls if other.path == call.path]
        return None if len(calls) == 1 else (next(n for n, other in enumerate(calls) if other is call), len(calls))

    def inside(self, path: str) -> list[Call]:
        """All calls within a module, not its own."""
        return [call for call in self.calls if call.path.startswith(path + ".")]

    def children(self, path: str) -> list[Call]:
        """The calls that a module's own code makes."""
        return [call for call in self.inside(path) if "." not in call.path[len(path) + 1 :]]

    def made(self, path: str) -> dict[int, Seen]:
        """By the number of the child that reads it first, what a module's own code made like that which it reads."""
        whole, found = self.first(path), dict[int, Seen]()
        if whole is None or whole.read is None:
            return found
        known = {whole.read.key}
        for n, call in enumerate(self.children(path)):
            wide = (seen for seen in call.reads if seen.value.shape == whole.read.value.shape)
            new = next((seen for seen in wide if seen.key not in known), None)
            if new is not None:
                found[n] = new
            known.update(seen.key for seen in (*call.reads, *call.writes))
        return found


def tensors(value: Any, depth: int = 2) -> Iterable[Tensor]:
    """The floating tensors of at least two axes among arguments or outputs, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim() >= 2:
            yield value
    elif isinstance(value, tuple | list) and depth:
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from tensors(item, depth - 1)


def fits_of(*some: Tensor, fits: float = FITS) -> float:
    """The residual that is allowed of numbers as coarse as the coarsest of some."""
    return max(fits, *(torch.finfo(x.dtype).eps for x in some))


def multiples(y: Tensor, *terms: Tensor, fits: float = FITS) -> list[float] | None:
    """The numbers by which terms sum to y; None where they do not."""
    if any(term.shape != y.shape for term in terms):
        return None
    fits = fits_of(y, *terms, fits=fits)
    goal, *columns = (x.double().flatten() for x in (y, *terms))
    step = goal.numel() // SAMPLE | 1  # odd, so that it meets all dimensions
    if step > 1 and _fitted(goal[::step], [x[::step] for x in columns], 10 * fits) is None:
        return None  # most are not, which a few of the elements show
    found = _fitted(goal, columns, fits)
    if found is None:
        return None
    return [1.0 if abs(float(x) - 1.0) < 1e-4 else float(x) for x in found]


def _fitted(goal: Tensor, terms: Sequence[Tensor], fits: float) -> Tensor | None:
    columns = torch.stack(list(terms), dim=1)
    if not bool(torch.isfinite(goal).all()) or not bool(torch.isfinite(columns).all()):
        return None
    found = torch.linalg.lstsq(columns, goal.unsqueeze(1), driver="gelsd").solution[:, 0]
    return found if float((goal - columns @ found).norm()) <= fits * float(goal.norm()) else None


def factors_of(y: Tensor, x: Tensor, term: Tensor) -> Tensor | None:
    """The factor of every dimension of x [..., dim], by which x and a term sum to y; None where they do not."""
    if not x.shape == y.shape == term.shape:
        return None
    goal, whole = ((t.double().flatten(0, -2)) for t in (y.double() - term.double(), x))
    factor = (goal * whole).sum(0) / whole.pow(2).sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return factor if float((goal - factor * whole).norm()) <= fits_of(y, x, term) * float(goal.norm()) else None


def and_a_vector(y: Tensor, x: Tensor) -> tuple[float, Tensor] | None:
    """The number times which x [..., dim], and a vector [dim] besides, are y; None where there are none."""
    if x.shape != y.shape:
        return None
    goal, term = (t.double().flatten(0, -2) for t in (y, x))
    by = multiples(goal - goal.mean(0), term - term.mean(0))
    return None if by is None else (by[0], goal.mean(0) - by[0] * term.mean(0))


def same(one: Seen, other: Seen) -> bool:
    """Whether two tensors are one, or hold the same values."""
    return one.key == other.key or (one.value.shape == other.value.shape and bool((one.value == other.value).all()))


def chain(inside: Sequence[Call], start: Call) -> list[Call]:
    """A call, and those that one after the other read nothing but what the one before wrote, and keep its shape."""
    found = [start]
    while True:
        last = found[-1].wrote
        if last is None:
            return found
        after = inside[inside.index(found[-1]) + 1 :]
        follows = (c for c in after if c.read is not None and c.read.key == last.key and c.path != found[-1].path)
        then = next((c for c in follows if c.wrote is not None and c.wrote.value.shape == last.value.shape), None)
        if then is None or then.wrote is None or then.wrote.key == last.key:
            return found
        found.append(then)


def writer(inside: Sequence[Call], seen: Seen) -> Call | None:
    """The innermost module that wrote a tensor."""
    found = [c for c in inside if c.wrote is not None and c.wrote.key == seen.key]
    found = [c for c in found if c.read is None or c.read.key != seen.key]
    return max(found, key=lambda c: c.path.count("."), default=None)
