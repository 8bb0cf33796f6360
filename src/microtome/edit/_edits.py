"""Edits: what is done to a run, as values.

A site edit names an address and gives the new value of the tensor there. It gets the part
``[batch, pos, unit, ...]`` of that tensor at the rows, positions and units that were named (attention scores and
patterns as ``[batch, q_pos, head, k_pos]``), and a value must broadcast against that. Edits are frozen, compare and
hash by content, print shortly, and are saved as safetensors. They never change what they are given, and the model is
unchanged after the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from microtome.anatomy import Address, Site, parse
from microtome.edit._frame import Frame
from microtome.edit._validate import validate
from microtome.errors import EditError, error
from microtome.shown import brief, in_notebooks, shown

Values = Tensor | float | int


def digest_of(value: object) -> bytes:
    """The bytes that represent a value in the hash of an edit."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        return f"{flat.dtype}{tuple(flat.shape)}".encode() + flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    if callable(value):
        return f"{id(value)}".encode()
    return repr(value).encode()


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    return brief(value)


@in_notebooks
@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """The base of all edits."""

    def digest(self) -> str:
        """A hash of the kind of edit and all it holds."""
        parts = [type(self).__name__.encode()] + [
            f.name.encode() + digest_of(getattr(self, f.name)) for f in fields(self)
        ]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return int(self.digest()[:15], 16)

    def __repr__(self) -> str:
        shown = [
            _short(getattr(self, f.name)) if i == 0 else f"{f.name}={_short(getattr(self, f.name))}"
            for i, f in enumerate(fields(self))
            if getattr(self, f.name) is not f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, eq=False, repr=False)
class SiteEdit(Edit):
    """An edit of one site.

    Attributes:
        site: address, with the units and positions to change.
        rows: rows of the batch to change; all by default.
    """

    site: str
    rows: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        parse(self.site)
        validate(self)

    @property
    def address(self) -> Address:
        """The parsed address."""
        return parse(self.site)

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The new value of the selected part x [batch, pos, unit, ...]."""
        raise TypeError(f"{type(self).__name__} is not an edit that can be applied")


@shown
@dataclass(frozen=True)
class Selection:
    """The part of a tensor that an edit changes.

    Attributes:
        site: the site.
        units: [n] the selected units, or None for all.
        frame: the rows and columns of the forward, cut to those selected.
    """

    site: Site
    units: Tensor | None
    frame: Frame

    def real(self, x: Tensor) -> Tensor | None:
        """[batch, pos] True where the selected part x [batch, pos, ...] lies on real tokens; None if it all does."""
        return self.frame.real(x.shape[1], x.device) if self.frame.padded else None

    def cut(self, x: Tensor) -> Tensor:
        """The selected part of a tensor [batch, pos, unit, ...]."""
        x = self.frame.take(x)
        return x if self.units is None else x[:, :, self.units]

    def cut_source(self, x: Tensor) -> Tensor:
        """The corresponding part of a whole tensor of another run [batch, pos, unit, ...]."""
        x = self.frame.take_source(x)
        return x if self.units is None else x[:, :, self.units]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """A copy of x [batch, pos, unit, ...] whose selected part is new."""
        x, index = x.clone(), self.frame.index(x)
        if self.units is None:
            x[index] = new
        else:
            x[index[0].unsqueeze(2), index[1].unsqueeze(2), self.units] = new
        return x


def fitted(value: Values, x: Tensor, where: Selection) -> Values:
    """A value with the dtype and device of the selected part x.

    Raises:
        EditError: it does not broadcast against x.
    """
    if not isinstance(value, Tensor):
        return value
    if where.frame.split and value.dim() >= x.dim() - 1 and value.shape[1 - x.dim()] > 1:
        raise _needs_all_positions(f"a value for each position of {where.site}")
    if where.frame.lacks_rows(None) and value.dim() == x.dim() and value.shape[0] > 1:
        raise _needs_all_rows(f"a value for each row of {where.site}")
    try:
        torch.broadcast_to(value, x.shape)
    except RuntimeError:
        raise error(
            EditError,
            f"a value does not fit {where.site}",
            got=f"shape {list(value.shape)}",
            allowed=f"what broadcasts to {list(x.shape)} [batch, pos, unit, ...]",
            do="change the value's shape, or the units and positions of the address",
        ) from None
    return value.to(device=x.device, dtype=x.dtype)


def _needs_all_positions(what: str) -> EditError:
    return error(
        EditError,
        f"{what} cannot be used in a generation that reads its prompt in parts, or several new tokens at once",
        do="generate without prefill_chunk_size, assistant and prompt lookup, or give one value for all positions",
    )


def _needs_all_rows(what: str) -> EditError:
    return error(
        EditError,
        f"{what} cannot be used on prompts of different lengths in a model that cannot pad them on the left: they are "
        "generated one after the other",
        do="give one edit for each prompt, with rows=(0,) and so on, or generate each prompt by itself",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Set(SiteEdit):
    """Replace x by `value`."""

    value: Values = 0.0

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """Value, broadcast to x."""
        value = fitted(self.value, x, where)
        return value.expand_as(x) if isinstance(value, Tensor) else torch.full_like(x, float(value))


@dataclass(frozen=True, eq=False, repr=False)
class Add(SiteEdit):
    """Add a value: x + strength * value."""

    value: Values = 0.0
    strength: float = 1.0

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The sum."""
        return x + self.strength * fitted(self.value, x, where)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(SiteEdit):
    """Multiply by a factor."""

    factor: Values = 1.0

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The product."""
        return x * fitted(self.factor, x, where)


@dataclass(frozen=True, eq=False, repr=False)
class Zero(SiteEdit):
    """Replace x by zeros."""

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """Zeros like x."""
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, repr=False)
class Mean(SiteEdit):
    """Replace x by a mean: the one given, or that of the selected rows and positions of the same run.

    Pads take no part in it, nor do scores that a mask forbids.
    """

    mean: Tensor | None = None

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The mean, the same for every row and position."""
        if self.mean is None:
            if where.frame.split:
                raise _needs_all_positions(f"the mean of the same run at {where.site}")
            if where.frame.lacks_rows(self.rows):
                raise _needs_all_rows(f"the mean of the same run at {where.site}")
            return _mean(x, where).expand_as(x)
        value = fitted(self.mean, x, where)
        assert isinstance(value, Tensor)
        return value.expand_as(x)


def orthonormal(basis: Shaped[Tensor, "*vector unit"]) -> Float[Tensor, "unit rank"]:
    """Columns [d, rank] that span the rows of a basis [n, d] or [d], of which some may depend on others."""
    rows = basis.detach().reshape(-1, basis.shape[-1])
    if not bool(rows.isfinite().all()):
        raise error(EditError, "a basis holds numbers that are not finite", do="leave out what is NaN or infinite")
    _, size, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    eps = torch.finfo(rows.dtype).eps if rows.dtype.is_floating_point else 0.0
    return directions[size > size.max() * eps * max(rows.shape)].T


def _mean(x: Tensor, where: Selection) -> Tensor:
    """The mean over rows and positions that are real and, for scores, allowed."""
    counted = where.real(x)
    counted = None if counted is None else counted.reshape(*counted.shape, *[1] * (x.dim() - 2))
    if where.site.name == "attn.scores":
        counted = ~forbidden(x) if counted is None else counted & ~forbidden(x)
    if counted is None:
        return x.mean(dim=(0, 1), keepdim=True)
    counted = counted.expand_as(x)
    total = x.where(counted, x.new_zeros(())).sum((0, 1), keepdim=True)
    return total / counted.sum((0, 1), keepdim=True).clamp(min=1)


def check_width(name: str, width: int, x: Tensor, where: Selection) -> None:
    """Refuse vectors that are not as wide as the site.

    Raises:
        EditError: they are not.
    """
    if width != x.shape[-1]:
        raise error(
            EditError,
            f"{name} does not fit {where.site}",
            got=f"last axis of {width}",
            allowed=f"{x.shape[-1]}",
            do="use vectors of the site's own width",
        )


@dataclass(frozen=True, eq=False, repr=False)
class Project(SiteEdit):
    """Project out of a subspace, or onto it.

    Attributes:
        basis: [rank, d] or [d]; need be neither orthonormal nor independent, and is not changed.
        onto: keep only the part inside the subspace, instead of removing it.
    """

    basis: Tensor | None = None
    onto: bool = False

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """x minus its part in the span of the basis, or that part."""
        if self.basis is None:
            raise error(EditError, f"Project on {where.site} has no basis", do="give basis= [rank, d]")
        check_width("a basis", self.basis.shape[-1], x, where)
        q = orthonormal(self.basis).to(device=x.device, dtype=x.dtype)
        inside = (x @ q) @ q.T
        return inside if self.onto else x - inside


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(SiteEdit):
    """Multiply each vector by a matrix: x @ matrix.T, for a rotation [d, d]."""

    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        matrix = self.matrix
        if matrix is None or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            got = "nothing" if matrix is None else str(list(matrix.shape))
            raise error(EditError, f"Rotate on {self.site} needs a square matrix", got=got, do="give matrix= [d, d]")
        eye = torch.eye(matrix.shape[0], dtype=torch.float64, device=matrix.device)
        gap = float((matrix.double() @ matrix.double().T - eye).abs().max())
        if gap > 1e-3:
            raise error(
                EditError,
                f"the matrix of Rotate on {self.site} is not a rotation",
                got=f"|M Mᵀ - 1| up to {gap:.3g}",
                allowed="1e-3",
                do="use Apply for other maps",
            )

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The rotated vectors."""
        assert self.matrix is not None
        check_width("a rotation", self.matrix.shape[-1], x, where)
        return x @ self.matrix.to(device=x.device, dtype=x.dtype).T


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(SiteEdit):
    """Keep values between two bounds."""

    low: float | None = None
    high: float | None = None

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """x, clamped."""
        return x if self.low is None and self.high is None else x.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False, repr=False)
class Apply(SiteEdit):
    """Apply a function of your own to the selected part. It cannot be saved."""

    function: Callable[[Tensor], Tensor] | None = None

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """What the function returns, with the dtype and device of x; it must keep the shape."""
        if self.function is None:
            raise error(EditError, f"Apply on {where.site} has no function", do="give function=")
        if where.frame.split:
            raise _needs_all_positions(f"Apply on {where.site}")
        if where.frame.lacks_rows(self.rows):
            raise _needs_all_rows(f"Apply on {where.site}")
        new: Any = self.function(x.clone())
        shape = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        if shape != list(x.shape):
            raise error(
                EditError,
                f"the function of Apply on {where.site} changed the shape",
                got=str(shape),
                allowed=str(list(x.shape)),
                do="return a tensor like the one given",
            )
        if new.is_complex() and not x.is_complex():
            raise error(
                EditError, f"the function of Apply on {where.site} returned complex numbers", do="return real ones"
            )
        return new.to(x)


def canonical(x: Tensor, site: Site) -> Tensor:
    """A site's tensor as [batch, pos, unit, ...]: scores and patterns have their head axis moved behind q_pos."""
    return x.transpose(1, 2) if site.spec.dims[1] == "head" else x


def forbidden(scores: Float[Tensor, "*of"]) -> Bool[Tensor, "*of"]:
    """True where a mask forbids attention: minus infinity, or the lowest number, which some families scale later."""
    return scores <= torch.finfo(scores.dtype).min / 64


def apply(edit: SiteEdit, x: Tensor, where: Selection) -> Tensor:
    """The whole tensor of a site, x in its own axes, with one edit applied. x itself is not changed.

    In scores, what was forbidden stays so: an edit may take away keys, but never gives sight of those behind a mask.
    """
    new = _applied(edit, x, where)
    if where.site.name != "attn.scores":
        return new
    return torch.where(forbidden(x) & ~(new < x), x, new)


def _applied(edit: SiteEdit, x: Tensor, where: Selection) -> Tensor:
    full = canonical(x, where.site)
    if where.frame.whole and where.units is None:
        return canonical(edit.change(full, where), where.site)
    return canonical(where.put(full, edit.change(where.cut(full), where)), where.site)
