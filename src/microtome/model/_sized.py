"""Values with the size of what was summed to them, so that a gap is judged by what rounding can leave there.

A sum of large terms may be as small as nothing: x @ W rounds by a few units in the last place of |x| @ |W|, however
small the result is. A gap is therefore compared with that, element by element, and never divided by the result itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import NormWeights, at_least_float32

ROUNDED_TO = 127
"""What the largest element of what a quantised layer reads becomes as an integer of 8 bits."""
CHUNK = 2**24
"""Most elements of a matrix whose absolute values are held at once."""


@dataclass(frozen=True)
class Sized:
    """A value, and the sum of the absolute values of its terms; both in float32 at least."""

    value: Tensor
    size: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Sized:
        """A value that was not summed."""
        x = at_least_float32(x)
        return cls(x, x.abs())

    def __add__(self, other: Sized | Tensor | None) -> Sized:
        if other is None:
            return self
        other = Sized.of(other) if isinstance(other, Tensor) else other
        return Sized(self.value + other.value, self.size + other.size)

    def __mul__(self, factor: float) -> Sized:
        return Sized(self.value * factor, self.size * abs(factor))

    def __getitem__(self, at: Any) -> Sized:
        return Sized(self.value[at], self.size[at])

    def sum(self, axis: int) -> Sized:
        """The sum along an axis."""
        return Sized(self.value.sum(axis), self.size.sum(axis))

    def repeated(self, times: int) -> Sized:
        """Heads [batch, pos, head, d_head], each as often as query heads use it."""
        return Sized(*(x.repeat_interleave(times, dim=2) for x in (self.value, self.size)))


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Sized:
    """x [..., i] @ matrix [i, j] + bias [j], of size |x| @ |matrix| + |bias|; as many columns at once as fit."""
    x = at_least_float32(x)
    values: list[Tensor] = []
    sizes: list[Tensor] = []
    for columns in matrix.split(max(1, CHUNK // matrix.shape[0]), dim=1):
        part = at_least_float32(columns)
        values.append(x @ part)
        sizes.append(x.abs() @ part.abs())
    return Sized(torch.cat(values, dim=-1), torch.cat(sizes, dim=-1)) + bias


def normed(norm: NormWeights, x: Sized, value: Tensor) -> Sized:
    """A norm's output `value` with its size, for what it read.

    What rounding left in x passes each element as it is, and all of them through the divisor.
    """
    centred = at_least_float32(norm.centre(x.value))
    terms = x.size + x.size.mean(-1, keepdim=True) if norm.norm.centred else x.size
    divisor = norm.scale(x.value).unsqueeze(-1)
    spread = terms.pow(2).mean(-1, keepdim=True).sqrt() / divisor
    gain = norm.gain.abs() if isinstance(norm.gain, Tensor) else abs(norm.gain)
    size = (terms + centred.abs() * spread) / divisor * gain
    return Sized(at_least_float32(value), size if norm.bias is None else size + norm.bias.abs())


def ratio(gap: Tensor, size: Tensor) -> float:
    """The largest gap [...] in units of its size [...]: nothing in units of nothing is nothing."""
    held = torch.where(gap == 0, torch.zeros_like(gap), gap / size)
    return float(held.max())
