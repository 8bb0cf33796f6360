"""One shard of a harvest: a safetensors file, written in place as values come, mapped into memory to be read.

Formula:  int8: q = round(x / s) with s = max |x| / 127 over the units of one token; the error is at most s / 2.
Cost:     one write and one CRC-32 of every byte while it is in the cache. It is flushed at the end: to flush beside
          more writing takes longer.
Check:    the CRC-32 that is put together from pieces is that of the file; safetensors reads the file;
          tests/unit/test_stream_shards.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import DataError, error

DTYPES: dict[str, tuple[torch.dtype, str, Any]] = {
    "float32": (torch.float32, "F32", np.float32),
    "bfloat16": (torch.bfloat16, "BF16", np.uint16),  # NumPy has no such type: its bits
    "float16": (torch.float16, "F16", np.float16),
    "int8": (torch.int8, "I8", np.int8),
}
"""By name: the type of PyTorch, that of safetensors, and that of NumPy."""
SCALE = ".scale"
_PIECE = 2**17  # bytes of one write: for much longer ones the system looks for memory in one piece, which is rare
_NAMES = {code: name for name, (_, code, _) in DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """What lies where in a shard.

    Attributes:
        sites: by name, the axes of one token.
        dtype: how values are kept.
    """

    sites: Mapping[str, tuple[int, ...]]
    dtype: str

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """By name, type and axes of one token; scales stand first, so that all lie at multiples of their size."""
        scales = {f"{name}{SCALE}": ("float32", ()) for name in self.sites} if self.dtype == "int8" else {}
        return scales | {name: (self.dtype, shape) for name, shape in self.sites.items()}

    def token_bytes(self, name: str) -> int:
        """The bytes of one token of a tensor."""
        dtype, shape = self.tensors[name]
        return DTYPES[dtype][0].itemsize * math.prod(shape)

    @property
    def bytes_a_token(self) -> int:
        """The bytes of one token of all tensors."""
        return sum(map(self.token_bytes, self.tensors))

    def head(self, tokens: int) -> bytes:
        """What stands before the values of a safetensors file."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, first in self.places(tokens).items():
            dtype, shape = self.tensors[name]
            ends = [first, first + tokens * self.token_bytes(name)]
            entries[name] = {"dtype": DTYPES[dtype][1], "shape": [tokens, *shape], "data_offsets": ends}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 4096)  # values begin at a page
        return len(text).to_bytes(8, "little") + text

    def places(self, tokens: int) -> dict[str, int]:
        """By name, where the values of a tensor begin, behind the head."""
        found, at = dict[str, int](), 0
        for name in self.tensors:
            found[name] = at
            at += tokens * self.token_bytes(name)
        return found


class Shard:
    """A shard that is being written; its tokens come in order, those of each site for itself."""

    def __init__(self, path: Path, layout: Layout, tokens: int) -> None:
        self.layout, self.tokens = layout, tokens
        head = layout.head(tokens)
        self._places = {name: len(head) + at for name, at in layout.places(tokens).items()}
        self.bytes = len(head) + tokens * layout.bytes_a_token
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._written = dict.fromkeys(layout.tensors, 0)
        self._sums = dict.fromkeys(layout.tensors, 0)
        self._head_sum = zlib.crc32(head)
        try:
            if shutil.disk_usage(path.parent).free < self.bytes:  # a full disk is met now, and not after the work
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self._file, self.bytes)
            _write(self._file, head, 0)
        except BaseException:
            self.close()
            raise

    def put(self, name: str, values: Tensor) -> None:
        """The values [token, ...] of the next tokens at a site.

        Raises:
            ValueError: a value cannot be kept in this type.
        """
        if self.layout.dtype == "int8":
            units = tuple(range(1, values.dim()))
            scale = values.float().abs()
            scale = (scale.amax(units) if units else scale) / 127
            scale = scale.where(scale > 0, 1.0)
            values = (values.float() / scale.reshape(-1, *[1] * len(units))).round()
            self._append(f"{name}{SCALE}", scale.cpu())
        kept = values.to(DTYPES[self.layout.dtype][0])
        if self.layout.dtype == "float16" and not math.isfinite(kept.float().sum().item()):
            raise ValueError(f"{values.abs().max().item():.6g}")
        self._append(name, kept.cpu())

    def _append(self, name: str, values: Tensor) -> None:
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy().data.cast("B")
        _write(self._file, data, self._places[name] + self._written[name])
        self._written[name] += len(data)
        self._sums[name] = combined(self._sums[name], zlib.crc32(data), len(data))

    def finish(self) -> int:
        """Close it, and give the CRC-32 of the file."""
        for name, written in self._written.items():
            if written != self.tokens * self.layout.token_bytes(name):
                self.close()
                raise error(DataError, f"{name} gave too few tokens", got=written, allowed=self.tokens)
        total = self._head_sum
        for name in self.layout.tensors:
            total = combined(total, self._sums[name], self._written[name])
        self.close()
        return total

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _write(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view[:_PIECE], at)
        view, at = view[done:], at + done


def combined(first: int, second: int, length: int) -> int:
    """The CRC-32 of two texts one after the other, from that of each and the bytes of the second.

    As in zlib's `crc32_combine`: appending a byte of zeros is linear over GF(2), and the remainders are added.
    """
    if not length:
        return first
    return _times(_zeros(length), first) ^ second


@lru_cache(maxsize=4096)
def _zeros(length: int) -> tuple[int, ...]:
    """What `length` bytes of zeros do to a remainder, as the images of its 32 bits."""
    power = (0xEDB88320, *(1 << bit for bit in range(31)))  # one bit of zeros
    for _ in range(3):
        power = tuple(_times(power, image) for image in power)
    whole = tuple(1 << bit for bit in range(32))
    while length:
        if length & 1:
            whole = tuple(_times(power, image) for image in whole)
        length >>= 1
        power = tuple(_times(power, image) for image in power) if length else power
    return whole


def _times(matrix: tuple[int, ...], vector: int) -> int:
    found = 0
    for image in matrix:
        if not vector:
            break
        if vector & 1:
            found ^= image
        vector >>= 1
    return found


class ReadShard:
    """A shard that is whole, mapped into memory.

    Attributes:
        tokens: how many it has.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        try:
            there = path.stat().st_size
            if size is not None and there != size:
                what, do = f"{path} is truncated or grown", "run the same harvest again: it is made anew"
                raise error(DataError, what, got=f"{there} bytes", allowed=f"{size}", do=do)
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > there:
                    raise ValueError("its head is longer than the file")
                head: dict[str, Any] = json.loads(file.read(length))
            # "c": what a reader changes stays its own, and PyTorch takes no memory that cannot be written.
            self._bytes = np.memmap(path, np.uint8, "c", offset=8 + length)
        except (OSError, ValueError) as problem:
            do = "run the same harvest again: it is made anew"
            raise error(DataError, f"{path} is damaged ({problem})", do=do) from problem
        self._path, self._first = path, 8 + length
        self._entries = {name: e for name, e in head.items() if name != "__metadata__"}
        self.tokens = next(iter(self._entries.values()))["shape"][0] if self._entries else 0
        self._held: dict[str, np.ndarray] = {}

    def stored(self, name: str) -> np.ndarray:
        """A tensor as it is stored, [token, ...]; of bfloat16 the bits. Nothing is read before it is used."""
        if name not in self._held:
            entry = self._entries[name]
            first, end = entry["data_offsets"]
            kind = DTYPES[_NAMES[entry["dtype"]]][2]
            self._held[name] = self._bytes[first:end].view(kind).reshape(entry["shape"])
        return self._held[name]

    def take(self, name: str, tokens: slice | np.ndarray) -> Tensor:
        """The values of some tokens, as they are stored; of int8 as float32. Those of a slice are the mapped memory."""
        entry = self._entries[name]
        values = torch.from_numpy(self.stored(name)[tokens])
        if entry["dtype"] == "BF16":
            return values.view(torch.bfloat16)
        if entry["dtype"] != "I8":
            return values
        scale = torch.from_numpy(self.stored(f"{name}{SCALE}")[tokens])
        return values * scale.reshape(-1, *[1] * (values.dim() - 1))

    def empty(self, name: str, tokens: int) -> Tensor:
        """Room for some tokens of a tensor, as it is stored."""
        entry = self._entries[name]
        return torch.empty((tokens, *entry["shape"][1:]), dtype=DTYPES[_NAMES[entry["dtype"]]][0])

    def quantised(self, name: str) -> bool:
        """Whether a tensor has scales."""
        return self._entries[name]["dtype"] == "I8"

    def read_into(self, room: Tensor, name: str, first: int) -> None:
        """Read the tokens from `first` on into room for them; as `preadv` this is quicker than through mapped pages."""
        data = room.reshape(-1).view(torch.uint8).numpy().data.cast("B")
        size = len(data) // max(1, len(room))
        at = self._first + self._entries[name]["data_offsets"][0] + first * size
        while data:
            done = os.preadv(self._descriptor, [data], at)
            if not done:
                raise error(DataError, f"{self._path} is truncated", do="run the same harvest again: it is made anew")
            data, at = data[done:], at + done

    @cached_property
    def _descriptor(self) -> int:
        opened = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, opened)
        return opened


def sum_of(path: Path) -> int:
    """The CRC-32 of a file."""
    total, held = 0, bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(held):
            total = zlib.crc32(memoryview(held)[:count], total)
    return total
