"""What makes a shard of a harvest of its rows: their forwards, its values, its index, its record."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.errors import DataError, error
from microtome.model import Model
from microtome.stream._batches import bos_id
from microtome.stream._documents import Row, batched, table_of
from microtome.stream._places import Kept, require_finite, watching
from microtome.stream._records import Record, index_name, index_of, record_name, values_name
from microtome.stream._shard import Layout, Shard
from microtome.stream._store import Store, making


@dataclass(frozen=True)
class Writer:
    """What makes a shard of its rows: the model, what is kept, and where it goes."""

    model: Model
    kept: Sequence[Kept]
    layout: Layout
    store: Store
    batch: int
    digest: str

    def write(self, number: int, rows: Sequence[Row]) -> Record:
        """Make one shard: its values, its index, its record.

        Raises:
            DataError: a value is not finite, or does not fit; the site and the document are named.
            OutputError: it cannot be written.
        """
        batches = batched(rows, self.batch)
        ordered = [rows[i] for batch in batches for i in batch]
        tokens = sum(len(row.tokens) for row in rows)
        with making(self.store, values_name(number)) as path:
            shard = Shard(path, self.layout, tokens)
            try:
                for batch in batches:
                    self._forward(shard, [rows[i] for i in batch])
                crc32 = shard.finish()
            finally:
                shard.close()
        index = index_of(ordered)
        self.store.write(index_name(number), index)
        begun = {row.place.document for row in rows if row.place.token == 0}
        split = {row.place.document for row in rows if row.long and row.place.token == 0}
        record = Record(
            number, self.digest, tokens, len(rows), len(begun), len(split),
            (rows[0].place.document, rows[0].place.token), (rows[-1].next.document, rows[-1].next.token),
            shard.bytes, f"{crc32:08x}", len(index), f"{zlib.crc32(index):08x}",
        )  # fmt: skip
        self.store.write(record_name(number), record.text())
        return record

    def _forward(self, shard: Shard, rows: Sequence[Row]) -> None:
        bos = bos_id(self.model.tokenizer)
        lead = [] if bos is None else [bos]

        def take(kept: Kept, x: Tensor) -> None:
            require_finite(kept, x, rows)
            try:
                shard.put(kept.name, x.flatten(0, 1))
            except ValueError as problem:
                first, last = min(row.source for row in rows), max(row.source for row in rows)
                what = f"{kept.name} does not fit into {self.layout.dtype} in documents {first} to {last}"
                raise error(DataError, what, got=str(problem), do='choose "bfloat16"') from problem

        observe = watching(self.kept, len(lead), take)
        with torch.no_grad():
            self.model.run(table_of(rows, lead), observe=observe, logits="logits" in observe)
