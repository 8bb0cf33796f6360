"""Shards read in an order by seed, every token once.

Two windows, each half of a buffer: one is filled in place by a thread, with blocks of tokens from anywhere, while the
other is given in random order.

Cost:  every byte is read once and moved once; the two happen beside each other. benchmarks/harvest.py has the figures.
Check: every token comes once, in an order that the seed decides; tests/unit/test_stream_reader.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.stream._shard import SCALE, ReadShard

BLOCK = 256
"""Tokens that are read in one piece."""

Piece = tuple[int, int, int]
"""A shard, its first token, and how many."""


class _Window:
    """Room for some tokens of several tensors, which are read in place."""

    def __init__(self, shards: Sequence[ReadShard], names: Sequence[str], size: int, numbers: bool) -> None:
        self._shards, self._firsts = shards, np.cumsum([0, *(shard.tokens for shard in shards)])
        scales = [f"{name}{SCALE}" for name in names if shards[0].quantised(name)]
        self._held = {name: shards[0].empty(name, size) for name in (*names, *scales)}
        self._numbers = torch.empty(size if numbers else 0, dtype=torch.int64)
        self.count = 0

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Read some pieces."""
        self.count = 0
        for shard, first, count in pieces:
            end = self.count + count
            for name, room in self._held.items():
                self._shards[shard].read_into(room[self.count : end], name, first)
            if len(self._numbers):
                start = int(self._firsts[shard]) + first
                self._numbers[self.count : end] = torch.arange(start, start + count)
            self.count = end

    def take(self, places: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The values of the tokens in some places."""
        found = {name: self._held[name].index_select(0, places) for name in names}
        for name, values in found.items():
            scale = self._held.get(f"{name}{SCALE}")
            if scale is not None:
                scale = scale.index_select(0, places).reshape(-1, *[1] * (values.dim() - 1))
                found[name] = values * scale
        return found

    def numbers(self, places: Tensor) -> Tensor:
        """The numbers of the tokens in some places."""
        return self._numbers.index_select(0, places)


def shuffled_batches(
    shards: Sequence[ReadShard], names: Sequence[str], *, batch: int, half: int, seed: int, numbers: bool
) -> Iterator[Any]:
    """See `Harvest.shuffled`; `half` is how many tokens a window has."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(shard.tokens for shard in shards)
    if not total:
        return
    size = min(half // batch * batch, total)
    windows = [_Window(shards, names, size, numbers) for _ in range(2 if size < total else 1)]
    plan = _plan(shards, size, generator)
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(windows[0].fill, next(plan))
        for turn in range(-(-total // size)):
            waiting.result()
            window, following = windows[turn % 2], next(plan, None)
            if following is not None:
                waiting = reader.submit(windows[(turn + 1) % 2].fill, following)
            order = torch.randperm(window.count, generator=generator)
            for places in order.split(batch):
                found = window.take(places, names)
                values = found[names[0]] if len(names) == 1 else found
                yield (window.numbers(places), values) if numbers else values


def _plan(shards: Sequence[ReadShard], size: int, generator: torch.Generator) -> Iterator[list[Piece]]:
    """The pieces of each window: every block of every shard, in random order, cut where a window is full."""
    blocks = [
        (shard, first, min(BLOCK, held.tokens - first))
        for shard, held in enumerate(shards)
        for first in range(0, held.tokens, BLOCK)
    ]
    pieces, left = list[Piece](), size
    for at in torch.randperm(len(blocks), generator=generator).tolist():
        shard, first, count = blocks[at]
        while count:
            some = min(count, left)
            pieces.append((shard, first, some))
            first, count, left = first + some, count - some, left - some
            if not left:
                yield pieces
                pieces, left = [], size
    if pieces:
        yield pieces
