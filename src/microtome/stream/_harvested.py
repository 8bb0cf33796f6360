"""A harvest, open for reading: by token, by site, or shuffled.

Nothing is read before it is asked for: shards are mapped into memory.

Check: tests/unit/test_stream_reader.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from microtome.errors import ArgumentError, DataError, SiteError, error, nearest
from microtome.shown import shown
from microtome.stream._records import Record, index_name, manifest_of, records_of, values_name
from microtome.stream._shard import ReadShard, sum_of
from microtome.stream._shuffle import shuffled_batches
from microtome.stream._store import Store, store_of

AGAIN = "run the same harvest again: it is made anew"


@shown
class Harvest:
    """The activations that `harvest` wrote.

    Args:
        place: the folder or URL.
        options: of the file system, as `fsspec.filesystem` takes them. Shards that do not lie on this machine are
            copied here when they are first read, and deleted with this object.

    Attributes:
        manifest: what was asked for, and the model and text it was made of.
        sites: by name, the axes of one token.
        dtype: how values are kept.
        complete: whether it is; of one that is not, the shards that are whole are read.

    Raises:
        DataError: no harvest lies there, or a shard is missing or damaged: it is named.

    >>> held = mt.stream.Harvest("harvest")
    >>> held["12.resid_post"][0:100], held.index.slice(0, 100)
    """

    def __init__(self, place: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None) -> None:
        self._store = store_of(place, options)
        sizes = self._store.sizes()
        manifest = manifest_of(self._store, sizes)
        if manifest is None:
            what, do = f"no harvest lies in {self._store.place}", "check the place"
            raise error(DataError, what, got=f"{len(sizes)} other files" if sizes else "nothing", do=do)
        self.manifest, self.complete = manifest, bool(manifest["complete"])
        self.sites = {name: tuple(shape) for name, shape in manifest["asked"]["sites"].items()}
        self.dtype = str(manifest["asked"]["dtype"])
        if self.complete:
            self._records = [Record.read(data) for data in manifest["shards"]]
        else:
            found = records_of(self._store, sizes, manifest["digest"])
            self._records = [found[number] for number in sorted(found)]
        faults = [fault for record in self._records for fault in record.faults(sizes)]
        if faults:
            raise error(DataError, f"{self._store.place}: {'; '.join(faults[:3])}", do=AGAIN)
        self._open: dict[int, ReadShard] = {}

    def _facts(self) -> dict[str, str]:
        """What it holds."""
        sites = f"{len(self.sites)}: {', '.join(self.sites)}"
        return {
            "place": self._store.place, "sites": sites if len(sites) < 120 else f"{sites[:117]}...",
            "dtype": self.dtype, "tokens": f"{len(self):,} in {len(self._records)} shards",
            "complete": "" if self.complete else "no",
        }  # fmt: skip

    def __len__(self) -> int:
        """How many tokens."""
        return int(self._ends[-1])

    def __getitem__(self, site: str) -> Activations:
        """The activations of one site."""
        self._require(site)
        return Activations(self, site)

    @cached_property
    def index(self) -> pa.Table:
        """A row for each token: document, group, position, token, offset; in the order of the values."""
        tables: list[pa.Table] = []
        for record in self._records:
            name = index_name(record.shard)
            try:
                table = pq.read_table(pa.BufferReader(self._store.read(name)))
            except (pa.ArrowException, OSError) as problem:
                raise error(DataError, f"{self._store.place}: {name} is damaged ({problem})", do=AGAIN) from problem
            if table.num_rows != record.tokens:
                what = f"{self._store.place}: {name} is damaged"
                raise error(DataError, what, got=f"{table.num_rows} rows", allowed=f"{record.tokens}", do=AGAIN)
            tables.append(table)
        return pa.concat_tables(tables).unify_dictionaries()

    def verify(self) -> None:
        """Compare the checksum of every file.

        Raises:
            DataError: files are damaged; they are named.
        """
        faults = [fault for record in self._records for fault in self.faults_of(self._store, record)]
        if faults:
            raise error(DataError, f"{self._store.place}: {'; '.join(faults[:5])}", do=AGAIN)

    @staticmethod
    def faults_of(store: Store, record: Record) -> list[str]:
        """The files of a shard whose checksum differs, in words; copies of files from elsewhere do not stay."""
        faults: list[str] = []
        wanted = {values_name(record.shard): record.crc32, index_name(record.shard): record.index_crc32}
        for name, crc32 in wanted.items():
            if f"{sum_of(store.here(name)):08x}" != crc32:
                faults.append(f"{name} is damaged: its checksum differs")
            store.forget(name)
        return faults

    def shuffled(
        self,
        *sites: str,
        batch: int = 4_096,
        buffer: int = 2**16,
        seed: int = 0,
        numbers: bool = False,
    ) -> Iterator[Any]:
        """Every token once, in an order by seed, in batches.

        Blocks of 256 tokens are read in random order into one half of a buffer, in place, while batches are drawn at
        random and without replacement from the other half. Which tokens come together in a half is as random as the
        order of the blocks.

        Args:
            sites: which; all by default.
            batch: tokens a batch; the last one may have fewer.
            buffer: tokens that are held in memory, at least two batches.
            seed: of the order.
            numbers: whether each batch comes with the numbers of its tokens [batch], rows of `index`.

        Yields:
            Of one site its values [batch, ...]; of several a mapping from sites to these. As they are kept, but of int8
            as float32.

        Raises:
            ArgumentError: a number is too small.
        """
        names = sites or tuple(self.sites)
        for name in names:
            self._require(name)
        if batch < 1 or buffer < 2 * batch:
            got, allowed = f"batch {batch}, buffer {buffer}", "a batch of 1 or more, and a buffer of two batches"
            raise error(ArgumentError, "the shuffled reader needs room", got=got, allowed=allowed)
        shards = [self.shard(number) for number in range(len(self._records))]
        return shuffled_batches(shards, names, batch=batch, half=buffer // 2, seed=seed, numbers=numbers)

    def take(self, site: str, numbers: Tensor | np.ndarray | Sequence[int] | slice) -> Tensor:
        """The values of some tokens at a site [token, ...], in the order asked for.

        Raises:
            DataError: there are no such tokens.
        """
        self._require(site)
        if isinstance(numbers, slice):
            wanted = np.arange(*numbers.indices(len(self)))
        else:
            wanted = np.asarray(numbers, dtype=np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= -len(self) and wanted.max() < len(self)):
            got = int(wanted[(wanted < -len(self)) | (wanted >= len(self))][0])
            raise error(DataError, "no such token in this harvest", got=got, allowed=f"0 to {len(self) - 1}")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        shards = np.searchsorted(self._ends, wanted, side="right")
        made: Tensor | None = None
        for number in np.unique(shards).tolist():
            at = np.flatnonzero(shards == number)
            found = self.shard(number).take(site, wanted[at] - self._firsts[number])
            made = found.new_empty((len(wanted), *self.sites[site])) if made is None else made
            made[torch.from_numpy(at)] = found
        return torch.empty((0, *self.sites[site])) if made is None else made

    def shard(self, number: int) -> ReadShard:
        """A shard by its place, mapped into memory."""
        if number not in self._open:
            record = self._records[number]
            self._open[number] = ReadShard(self._store.here(values_name(record.shard)), record.bytes)
        return self._open[number]

    @property
    def bytes(self) -> int:
        """How much its values take."""
        return sum(record.bytes for record in self._records)

    @property
    def shards(self) -> tuple[int, ...]:
        """The tokens of each shard."""
        return tuple(record.tokens for record in self._records)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([0, *self.shards])[1:] if self.shards else np.zeros(1, dtype=np.int64)

    @cached_property
    def _firsts(self) -> np.ndarray:
        return self._ends - np.array(self.shards or [0])

    def _require(self, site: str) -> None:
        if site not in self.sites:
            near = nearest(site, list(self.sites))
            what = f'no "{site}" in this harvest.{near}'.removesuffix(".")
            raise error(SiteError, what, allowed=", ".join(list(self.sites)[:8]), do="name one of these")


@shown
class Activations:
    """The activations of one site: `held[100:200]`, `held[numbers]` give tensors [token, ...].

    Attributes:
        shape: [token, ...].
    """

    def __init__(self, of: Harvest, site: str) -> None:
        self._of, self._site = of, site
        self.shape = (len(of), *of.sites[site])

    def _facts(self) -> dict[str, str]:
        """What it is."""
        return {"site": self._site, "shape": str(list(self.shape)), "dtype": self._of.dtype}

    def __len__(self) -> int:
        """How many tokens."""
        return self.shape[0]

    def __getitem__(self, numbers: int | slice | Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """The values of a token [...], or of some [token, ...]."""
        if isinstance(numbers, int):
            return self._of.take(self._site, [numbers])[0]
        return self._of.take(self._site, numbers)
