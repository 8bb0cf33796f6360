"""What a change does to one weight: a sum, a sum of low rank, or values in place of what was there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.change._weight import Weight
from microtome.errors import ArgumentError, error
from microtome.shown import shown

PARTS = ("delta", "left", "right", "values")
"""Names of the tensors of a delta in a file."""


@shown
@dataclass(frozen=True, eq=False)
class LowRank:
    """A sum of outer products: left @ right.

    Attributes:
        left: [*units, in, rank]
        right: [*units, rank, out]
    """

    left: Float[Tensor, "*units in rank"]
    right: Float[Tensor, "*units rank out"]


@shown
@dataclass(frozen=True, eq=False)
class Values:
    """Values in place of what was there.

    Attributes:
        values: of the shape of the weight.
    """

    values: Tensor


Delta = Tensor | LowRank | Values


def require_fit(weight: Weight, delta: Delta) -> None:
    """Refuse a delta of another shape than its weight.

    Raises:
        ArgumentError: it is one.
    """
    shape = shape_of(delta)
    if shape != weight.shape:
        what = f"a change does not fit {weight.address}"
        raise error(ArgumentError, what, got=str(list(shape)), allowed=str(list(weight.shape)), do="change its shape")


def copied(delta: Delta) -> Delta:
    """The same in memory of its own: what is written may be what it was made from."""
    return of_parts({name: x.detach().clone() for name, x in parts_of(delta).items()})


def changed(weight: Weight, delta: Delta) -> Tensor:
    """The values of a weight after a change, rounded to its type once.

    Raises:
        ArgumentError: they are not finite.
    """
    before = weight.read()
    if isinstance(delta, Values):
        new = delta.values.detach().to(before)
    else:
        new = (before.double() + dense(delta).to(before.device, torch.float64)).to(before.dtype)
    bad = int((~new.isfinite()).sum())
    if bad:
        raise error(ArgumentError, f"a change makes values of {weight.address} that are not finite",
                    got=f"{bad} of {new.numel()}", do="make it smaller, or look for the NaN in it")  # fmt: skip
    return new


def dense(delta: Tensor | LowRank) -> Tensor:
    """What is added."""
    return (
        delta.left.detach().double() @ delta.right.detach().double() if isinstance(delta, LowRank) else delta.detach()
    )


def shape_of(delta: Delta) -> tuple[int, ...]:
    """The shape of the weight that a delta is of."""
    if isinstance(delta, LowRank):
        return (*delta.left.shape[:-1], delta.right.shape[-1])
    return tuple((delta.values if isinstance(delta, Values) else delta).shape)


def parts_of(delta: Delta) -> dict[str, Tensor]:
    """Its tensors, by the names that a file has."""
    if isinstance(delta, LowRank):
        return {"left": delta.left, "right": delta.right}
    return {"values": delta.values} if isinstance(delta, Values) else {"delta": delta}


def of_parts(parts: dict[str, Any]) -> Delta:
    """The delta of its tensors.

    Raises:
        ValueError: they are those of none.
    """
    names = sorted(parts)
    if names == ["left", "right"]:
        return LowRank(parts["left"], parts["right"])
    if names == ["values"]:
        return Values(parts["values"])
    if names == ["delta"]:
        return parts["delta"]
    raise ValueError(f"a change of {', '.join(names)}")


def random_like(weight: Weight, delta: Delta, generator: torch.Generator) -> Delta:
    """A random sum of the same norm: of Gaussian entries, of the same rank where that is low.

    Of `Values` it is as far from what the weight holds as they are.
    """
    if isinstance(delta, LowRank):
        left, right = (
            torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (delta.left, delta.right)
        )
        scale = float(dense(delta).norm()) / max(float((left @ right).norm()), 1e-300)
        return LowRank(left * scale, right)
    norm = norm_of(weight, delta)
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return drawn * (norm / max(float(drawn.norm()), 1e-300))


def norm_of(weight: Weight, delta: Delta) -> float:
    """The Frobenius norm of what a delta adds to a weight as it is now."""
    if isinstance(delta, Values):
        return float((delta.values.double().cpu() - weight.read().double().cpu()).norm())
    return float(dense(delta).double().norm())
