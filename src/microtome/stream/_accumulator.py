"""What every accumulator is: something fed in pieces, merged in any order, and saved with a checksum.

Law:   for any split of the data, `merge` of the parts in any order equals one accumulator fed with everything: exactly
       for counts and top-k, to 1e-12 of the scale of the data for float64 statistics.
Cost:  `merge` costs one pass over the state; `save` and `load` one pass and one hash.
Check: tests/laws/test_accumulators.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from jaxtyping import Int, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from microtome.errors import DataError, error
from microtome.files import atomic
from microtome.shown import brief, shown

FORMAT = "microtome-accumulator-1"
_HOST = torch.empty(0).cpu().device
KINDS: dict[str, type[Accumulator]] = {}
_BLOCK = 2**18  # values a block: float64 copies of one block stay in a core's cache
_LARGE = 2**27  # the same on an accelerator, where every block is several launches: 1 GiB of float64


@shown
class Accumulator(ABC):
    """A statistic that is fed in pieces: `update`, `merge`, `result`, `save`, `load`.

    State is never changed in place, so that an accumulator fed in `torch.inference_mode` can be fed outside it too.
    Each kind has its own `update(values, ...)` and `result()`. `merge(other)` changes and returns the accumulator it is
    called on, and never changes `other`.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kind = cls.__name__
        KINDS[cls.kind] = cls

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that it knows, settings included, as named tensors that share no memory with it."""

    @classmethod
    @abstractmethod
    def _restore(cls, state: dict[str, Tensor]) -> Self:
        """The accumulator that `state` describes; may raise KeyError, RuntimeError, TypeError or ValueError."""

    @abstractmethod
    def _settings(self) -> tuple[object, ...]:
        """What two accumulators must share to be merged, comparable with `==`."""

    @abstractmethod
    def _absorb(self, other: Any) -> None:
        """Take in `other`, whose kind and settings are known to fit."""

    def merge(self, other: Self) -> Self:
        """Take in what `other` has counted, and return this accumulator.

        Args:
            other: an accumulator of the same kind and settings; it is not changed.

        Returns:
            This accumulator, changed in place.

        Raises:
            DataError: when the kinds or the settings differ.
        """
        if type(other) is not type(self) or other._settings() != self._settings():
            got = other._title() if type(other) is type(self) else type(other).__name__
            allowed = "the same kind with the same settings"
            raise error(DataError, f"cannot merge into {self._title()}", got=got, allowed=allowed)
        self._rest()
        other._rest()
        self._absorb(other)
        return self

    def _follow(self, values: Tensor) -> None:
        """Keep the state where values are, so that no update waits for the device; on the host if it has no float64."""
        if not values.is_cpu and counts_in_double(values.device):
            self._move(values.device)

    def _rest(self) -> None:
        """Bring the state back to the host, where results and states are given."""
        self._move(_HOST)

    def _move(self, device: torch.device) -> None:
        for name, held in vars(self).items():
            if isinstance(held, Tensor) and held.device != device:
                setattr(self, name, held.to(device))

    def _facts(self) -> dict[str, str]:
        """Its settings, and what it keeps: counts, and tensors by their shapes."""
        kept = {name.lstrip("_"): brief(value) for name, value in vars(self).items() if isinstance(value, int | Tensor)}
        return {"settings": brief(self._settings())} | kept

    def _title(self) -> str:
        """Kind and settings, cut to a readable length."""
        text = self.kind + str(self._settings())
        return text if len(text) <= 120 else text[:117] + "..."

    def copy(self) -> Self:
        """A copy that shares no memory with this accumulator."""
        return self.from_state(self.state())

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The accumulator whose `state()` this is, sharing no memory with it.

        Raises:
            DataError: when tensors are missing, or have shapes that cannot be.
        """
        try:
            return cls._restore({name: tensor.detach().clone() for name, tensor in state.items()})
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as cause:
            raise error(DataError, f"this state does not describe {cls.__name__}", got=sorted(state)) from cause

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state as safetensors with its checksum: to a temporary name in the same folder, then renamed.

        Args:
            path: the file to write; an existing file is replaced, and stays whole if the writing fails.

        Returns:
            The path written.

        Raises:
            OutputError: when the file cannot be written.
        """
        path = Path(path)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state().items()}
        metadata = {"format": FORMAT, "kind": self.kind, "sha256": digest(self.kind, state)}
        with atomic(path) as partial:
            partial.write_bytes(save(state, metadata))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. `Accumulator.load` reads any kind; `Moments.load` only a `Moments`.

        Args:
            path: the file.

        Returns:
            An accumulator equal to the one saved.

        Raises:
            DataError: when the file is missing, damaged, or holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise error(DataError, f'no accumulator file "{path}"', do="check the path")
        try:
            opened: Any = safe_open(path, framework="pt")
            with opened as file:
                metadata: dict[str, str] = file.metadata() or {}
                state: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
        except (SafetensorError, OSError, ValueError, RuntimeError) as cause:
            raise error(DataError, f'"{path}" is damaged ({cause})', do="delete it and compute it again") from cause
        kind = KINDS.get(metadata.get("kind", ""))
        if metadata.get("format") != FORMAT or kind is None:
            raise error(DataError, f'"{path}" holds no accumulator', got=metadata or "no metadata", allowed=FORMAT)
        if metadata.get("sha256") != digest(kind.kind, state):
            raise error(DataError, f'"{path}" is damaged: its checksum differs', do="delete it and compute it again")
        if not issubclass(kind, cls):
            raise error(DataError, f'"{path}" holds another kind of accumulator', got=kind.kind, allowed=cls.__name__)
        return kind.from_state(state)


A = TypeVar("A", bound=Accumulator)


def merged(parts: Iterable[A]) -> A:
    """One accumulator with everything that `parts` have counted; the parts are not changed.

    Args:
        parts: at least one accumulator, all of one kind and the same settings.

    Returns:
        A new accumulator.

    Raises:
        DataError: when there is no part, or they do not fit.
    """
    whole: A | None = None
    for part in parts:
        whole = part.copy() if whole is None else whole.merge(part)
    if whole is None:
        raise error(DataError, "there is nothing to merge", got="no accumulator", allowed="one or more")
    return whole


def as_shape(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """`7` or `(4, 64)` as a tuple, refused when an axis is not a positive integer."""
    axes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(axis < 1 for axis in axes):
        raise error(DataError, "an accumulator needs axes of one unit or more", got=axes)
    return axes


def unit_rows(values: Tensor, shape: tuple[int, ...], mask: Tensor | None, where: str) -> Shaped[Tensor, "row unit"]:
    """Values [..., *shape] as a table [row, unit] of the rows that `mask` selects, shape and finiteness checked."""
    lead = values.ndim - len(shape)
    if lead < 0 or tuple(values.shape[lead:]) != shape:
        allowed = f"[{', '.join(['...', *map(str, shape)])}]"
        raise error(DataError, f"{where}: values have the wrong shape", got=tuple(values.shape), allowed=allowed)
    if values.is_complex() or values.dtype == torch.bool:
        raise error(DataError, f"{where}: values must be real numbers", got=values.dtype)
    rows = values.detach().reshape(values.shape[:lead].numel(), torch.Size(shape).numel())
    if mask is not None:
        check_mask(mask, tuple(values.shape[:lead]), where)
        flags = mask.detach().reshape(-1)
        rows = rows if bool(flags.all()) else rows[flags.to(rows.device, non_blocking=True)]
    require_finite(rows, shape, where)
    return rows


def check_mask(mask: Tensor, shape: tuple[int, ...], where: str) -> None:
    """Refuse a mask that is not boolean, or not of the leading axes."""
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        got, allowed = f"{mask.dtype} {tuple(mask.shape)}", f"torch.bool {shape}"
        raise error(DataError, f"{where}: the mask does not fit", got=got, allowed=allowed)


def require_finite(rows: Shaped[Tensor, "row unit"], shape: tuple[int, ...], where: str) -> None:
    """Refuse NaN and infinity, naming the first unit that has one. Costs one sum when all is well."""
    if math.isfinite(rows.sum().item()):
        return
    bad = ~torch.isfinite(rows)
    if not bool(bad.any()):  # the sum itself overflowed
        return
    unit = int(bad.any(dim=0).nonzero()[0])
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(unit), shape)) if len(shape) > 1 else unit
    row = int(bad[:, unit].nonzero()[0])
    what = f"{where}: {int(bad.sum())} of {bad.numel()} values are not finite, the first in unit {at}"
    raise error(
        DataError, what, got=rows[row, unit].item(), do="mask those rows, or correct the run that produced them"
    )


@cache
def counts_in_double(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).is_floating_point()
    except (TypeError, RuntimeError):
        return False


def blocks(rows: Shaped[Tensor, "row unit"], values: int | None = None) -> Iterator[Tensor]:
    """Rows in blocks of about `values` values each, at least one row; by default as suits the device."""
    values = (_BLOCK if rows.is_cpu else _LARGE) if values is None else values
    step = max(1, values // max(1, rows.shape[1]))
    return (rows[first : first + step] for first in range(0, rows.shape[0], step))


def int_scalar(value: int) -> Int[Tensor, ""]:
    """A count as a state tensor."""
    return torch.tensor(value, dtype=torch.int64)


def pack_names(names: tuple[str, ...]) -> UInt8[Tensor, " byte"]:
    """Names as a state tensor: the bytes of their JSON."""
    return torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)


def unpack_names(packed: Tensor) -> tuple[str, ...]:
    """The inverse of `pack_names`."""
    return tuple(str(name) for name in json.loads(packed.cpu().numpy().tobytes()))


def digest(kind: str, state: dict[str, Tensor]) -> str:
    """SHA-256 over the kind and every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(kind.encode())
    for name in sorted(state):
        # A single value may have any stride and yet be contiguous; a clone has that of its shape.
        tensor = state[name].clone(memory_format=torch.contiguous_format)
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
