"""What a harvest says of itself: one record a shard, and the manifest.

manifest.json            what was asked for; at the end also the records of all shards
shard-00000.safetensors  the values, [token, ...] by site
tokens-00000.parquet     the index of its tokens
shard-00000.json         the record: written last, so that a shard with a record is whole
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from microtome.errors import DataError, error
from microtome.stream._documents import Position, Row
from microtome.stream._store import Store

KIND = "microtome harvest"
FORMAT = 1
MANIFEST = "manifest.json"
OWN = re.compile(r"manifest\.json|(shard-\d{5,}\.(safetensors|json))|(tokens-\d{5,}\.parquet)")
INDEX = pa.schema([
    ("document", pa.int64()), ("group", pa.dictionary(pa.int32(), pa.string())), ("position", pa.int32()),
    ("token", pa.int32()), ("offset", pa.int64()),
])  # fmt: skip
"""The columns of the index: the number of the document in what the text was read from; its group; the place of the
token in the document; the id; the character of the document at which its text begins, null where that is unknown."""


def values_name(shard: int) -> str:
    """The file of a shard's values."""
    return f"shard-{shard:05}.safetensors"


def index_name(shard: int) -> str:
    """The file of a shard's index."""
    return f"tokens-{shard:05}.parquet"


def record_name(shard: int) -> str:
    """The file of a shard's record."""
    return f"shard-{shard:05}.json"


@dataclass(frozen=True)
class Record:
    """What is known of a shard that is whole.

    Attributes:
        shard: its number.
        asked: the digest of what was asked for.
        tokens, rows, documents, split: how many it has; documents count where they begin, split those of several rows.
        start, next: where in the corpus it begins, and where the next one does, as [document, token].
        bytes, crc32: of its values.
        index_bytes, index_crc32: of its index.
    """

    shard: int
    asked: str
    tokens: int
    rows: int
    documents: int
    split: int
    start: tuple[int, int]
    next: tuple[int, int]
    bytes: int
    crc32: str
    index_bytes: int
    index_crc32: str

    def text(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Record:
        """From JSON."""
        given: dict[str, Any] = {**data, "start": tuple(data["start"]), "next": tuple(data["next"])}
        return cls(**given)

    @property
    def go_on(self) -> Position:
        """Where the next shard begins."""
        return Position(*self.next)

    def faults(self, sizes: Mapping[str, int]) -> list[str]:
        """The files of this shard that are missing or of another size, in words."""
        wanted = {values_name(self.shard): self.bytes, index_name(self.shard): self.index_bytes}
        return [
            f"{name} is missing" if name not in sizes else f"{name} is damaged: {sizes[name]} of {size} bytes"
            for name, size in wanted.items()
            if sizes.get(name) != size
        ]


def index_of(rows: Sequence[Row]) -> bytes:
    """The index of rows, one after the other, as a Parquet file."""
    groups = list(dict.fromkeys(row.group for row in rows))
    number = {name: i for i, name in enumerate(groups)}
    sizes = np.array([len(row.tokens) for row in rows])
    inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    offsets = np.fromiter(chain.from_iterable(row.offsets for row in rows), np.int64)
    columns = [
        pa.array(np.repeat(np.array([row.source for row in rows], np.int64), sizes)),
        pa.DictionaryArray.from_arrays(
            np.repeat(np.array([number[row.group] for row in rows], np.int32), sizes), pa.array(groups, pa.string())
        ),
        pa.array((np.repeat([row.place.token for row in rows], sizes) + inside).astype(np.int32)),
        pa.array(np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int32)),
        pa.array(offsets, mask=offsets < 0),
    ]
    made = io.BytesIO()
    pq.write_table(pa.table(columns, schema=INDEX), made)
    return made.getvalue()


def records_of(store: Store, sizes: Mapping[str, int], asked: str | None = None) -> dict[int, Record]:
    """The records of the shards that are there, by number; only those of what was asked for, if that is given.

    Raises:
        DataError: one cannot be read.
    """
    found: dict[int, Record] = {}
    for name in sorted(sizes):
        if re.fullmatch(r"shard-\d{5,}\.json", name):
            try:
                record = Record.read(json.loads(store.read(name)))
            except (ValueError, TypeError, KeyError) as problem:
                what, do = f"{store.place}: {name} is damaged", "delete it, and run the same harvest again"
                raise error(DataError, what, got=str(problem), do=do) from problem
            if asked is None or record.asked == asked:
                found[record.shard] = record
    return found


def manifest_of(store: Store, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The manifest that is there, or None.

    Raises:
        DataError: it is none of a harvest, or of a newer version.
    """
    if MANIFEST not in sizes:
        return None
    try:
        manifest: dict[str, Any] = json.loads(store.read(MANIFEST))
        kind, form = manifest["kind"], manifest["format"]
    except (ValueError, TypeError, KeyError) as problem:
        raise error(DataError, f"{store.place} holds no harvest", got=f"{MANIFEST}: {problem}") from problem
    if kind != KIND or not isinstance(form, int):
        raise error(DataError, f"{store.place} holds no harvest", got=str(kind), allowed=KIND)
    if form > FORMAT:
        do = "read it with that version of Microtome"
        raise error(DataError, f"{store.place} is of a newer version", got=f"form {form}", allowed=f"{FORMAT}", do=do)
    return manifest


def digest_of(asked: Mapping[str, Any]) -> str:
    """16 hex digits of what was asked for."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
