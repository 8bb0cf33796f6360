"""Text to run a model on: named documents with groups and a checksum.

Every machine has some: `standard_library_text` (English prose about Python) and `standard_library_code`. Any text file,
JSON lines or Parquet file is read by `read_text`, the last two a document at a time, so that they may be larger than
memory.

Cost:  one pass over the bytes for the checksum; a file of lines or columns is read again on each iteration.
Check: tests/unit/test_stream_corpus.py.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, cast

from microtome.errors import DataError, error, nearest
from microtome.files import TEXTS, text_file
from microtome.shown import brief, shown

SUFFIXES = TEXTS
CODE_MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "fractions", "functools", "gzip", "heapq", "inspect", "mailbox", "pathlib",
    "pprint", "queue", "random", "shutil", "statistics", "string", "tarfile", "textwrap", "threading", "zipfile",
)  # fmt: skip


@shown
@dataclass(frozen=True)
class Corpus:
    """Documents, in order.

    Args:
        name: what to call it in results.
        documents: texts; a tuple, or something that can be iterated more than once.
        groups: one name for all documents, or one name per document.
        sha256: checksum of the text, or of the file that it is read from.
    """

    name: str
    documents: Iterable[str]
    groups: tuple[str, ...]
    sha256: str

    @classmethod
    def of(cls, name: str, documents: Iterable[str], groups: str | Iterable[str] | None = None) -> Corpus:
        """A corpus of texts in memory.

        Args:
            name: what to call it in results.
            documents: texts.
            groups: one name for all (`name` by default), or one name per document.

        Raises:
            DataError: when there are no documents, or not as many groups as documents.
        """
        texts = tuple(documents)
        names = (name,) if groups is None else (groups,) if isinstance(groups, str) else tuple(groups)
        if not any(text.strip() for text in texts):
            raise error(DataError, f'corpus "{name}" has no text', got=f"{len(texts)} documents")
        if len(names) not in (1, len(texts)):
            got, allowed = f"{len(names)} groups for {len(texts)} documents", "one for all, or one per document"
            raise error(DataError, f'corpus "{name}": the groups do not fit', got=got, allowed=allowed)
        return cls(name, texts, names, _sha256(texts))

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)

    def _facts(self) -> dict[str, str]:
        """How much there is of it, and how it begins; a file that is read as it goes is not read for that."""
        texts = self.documents
        held = (
            f"{len(texts):,} texts of {sum(map(len, texts)):,} characters, {brief(texts[0])}"
            if isinstance(texts, tuple)
            else brief(texts)
        )
        groups = dict.fromkeys(self.groups)
        return {"name": brief(self.name), "documents": held, "groups": brief(tuple(groups)), "sha256": self.sha256[:16]}

    def group_of(self, document: int) -> str:
        """The group of a document, by its number from 0."""
        return self.groups[0] if len(self.groups) == 1 else self.groups[document]


def joined(name: str, corpora: Iterable[Corpus]) -> Corpus:
    """One corpus in memory with the documents of several, in order, each keeping its group.

    Args:
        name: what to call it.
        corpora: at least one corpus.

    Returns:
        A corpus whose groups are one name per document.
    """
    parts = [(corpus, tuple(corpus)) for corpus in corpora]
    groups = [corpus.group_of(number) for corpus, texts in parts for number in range(len(texts))]
    return Corpus.of(name, chain.from_iterable(texts for _, texts in parts), groups)


def standard_library_text() -> Corpus:
    """English prose about Python: the documentation topics that ship with it, in the order of their names.

    About 465,000 characters, or 110,000 tokens; they differ a little between versions of Python, and so does `sha256`.

    Raises:
        DataError: when this Python was built without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as cause:
        do = "install the full standard library, or use read_text"
        raise error(DataError, 'this Python has no documentation topics ("pydoc_data.topics")', do=do) from cause
    return Corpus.of("standard-library-text", (topics[name] for name in sorted(topics)), "prose")


def standard_library_code(modules: Iterable[str] = CODE_MODULES) -> Corpus:
    """Python source code: modules of the standard library, by name, but those without source.

    Raises:
        DataError: when none of the modules has source here.
    """
    sources = (_source(module) for module in sorted(set(modules)))
    texts = [source for source in sources if source]
    if not texts:
        raise error(DataError, "no source code of the standard library is installed here", do="use read_text")
    return Corpus.of("standard-library-code", texts, "code")


def _source(module: str) -> str | None:
    """The source of a module, without importing it; None when there is none."""
    spec = find_spec(module)
    get_source = getattr(spec.loader, "get_source", None) if spec is not None else None
    return get_source(module) if get_source is not None else None


def read_text(path: str | os.PathLike[str], *, field: str = "text", paragraphs: bool = False) -> Corpus:
    """A corpus from a file.

    Args:
        path: `.txt` (one document), `.jsonl` (a JSON object a line) or `.parquet`, in UTF-8.
        field: the field or column with the text, for the last two.
        paragraphs: makes each blank-line-separated part of a `.txt` file a document.

    Returns:
        A corpus named as the file, of one group with the same name, whose `sha256` is the file's.

    Raises:
        DataError: when the file is missing, empty or of another type, its bytes are not UTF-8, or a document has no
            such field. Of `.jsonl` and `.parquet` files only the first text is read here, the others when iterated.
    """
    path = text_file(path)
    try:
        documents = _documents(path, field, paragraphs)
        if not any(text.strip() for text in documents):
            raise error(DataError, f'"{path}" has no text', got=f"{path.stat().st_size} bytes")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise error(DataError, f'cannot read "{path}" ({cause.strerror or cause})') from cause
    return Corpus(path.stem, documents, (path.stem,), sha256)


def _documents(path: Path, field: str, paragraphs: bool) -> Iterable[str]:
    """The documents of a file: in memory for `.txt`, read again on each iteration for the others."""
    if path.suffix.lower() == ".jsonl":
        return JsonLines(path, field)
    if path.suffix.lower() == ".parquet":
        return ParquetColumn(path, field)
    text = _decode(path.read_bytes(), f'"{path}"').replace("\r\n", "\n")
    if not paragraphs:
        return (text,)
    return tuple(part.strip("\n") for part in re.split(r"\n(?:[ \t]*\n)+", text) if part.strip())


@dataclass(frozen=True)
class JsonLines:
    """The texts of a `.jsonl` file, a line at a time; blank lines are left out."""

    path: Path
    field: str

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f'"{self.path}" line {number}'
                text = _decode(line, where)
                if text.strip():
                    yield self._text(text, where)

    def _text(self, line: str, where: str) -> str:
        """The text of one line."""
        try:
            record: Any = json.loads(line)
        except ValueError as cause:
            raise error(DataError, f"{where} is not JSON ({cause})", allowed="one JSON object per line") from cause
        if not isinstance(record, dict):
            raise error(DataError, f"{where} is not a JSON object", got=type(record).__name__)
        fields = cast("dict[str, object]", record)
        if self.field not in fields:
            raise _no_field(f'{where} has no field "{self.field}"', self.field, list(fields))
        return _whole(fields[self.field], f'{where}, field "{self.field}"')


@dataclass(frozen=True)
class ParquetColumn:
    """The texts of one column of a Parquet file, a batch of rows at a time."""

    path: Path
    field: str

    def __iter__(self) -> Iterator[str]:
        pa: Any = importlib.import_module("pyarrow")  # imported late: only Parquet files need it
        pq: Any = importlib.import_module("pyarrow.parquet")
        row = 0
        try:
            with pq.ParquetFile(self.path) as file:
                names: list[str] = file.schema_arrow.names
                if self.field not in names:
                    raise _no_field(f'"{self.path}" has no column "{self.field}"', self.field, names)
                for batch in file.iter_batches(batch_size=256, columns=[self.field]):
                    for value in batch.column(0).to_pylist():
                        yield _whole(value, f'"{self.path}" row {row}, column "{self.field}"')
                        row += 1
        except (pa.ArrowException, UnicodeDecodeError) as cause:
            raise error(DataError, f'"{self.path}" cannot be read as Parquet ({cause})') from cause


def _no_field(what: str, field: str, there: list[str]) -> DataError:
    """The error for a missing field or column: names the ones there are."""
    near = nearest(field, there)
    return error(DataError, what + (f".{near}" if near else ""), got=", ".join(there) or "none",
                 do="pass the one with the text as `field`")  # fmt: skip


def _whole(value: object, where: str) -> str:
    """A text that can be written as UTF-8, or an error."""
    if not isinstance(value, str):
        raise error(DataError, f"{where} is not text", got=type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError as cause:
        raise error(DataError, f"{where} has half a surrogate pair at character {cause.start}") from cause
    return value


def _decode(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte order mark."""
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as cause:
        got = f"byte 0x{cause.object[cause.start]:02x} at {cause.start}"
        raise error(DataError, f"{where} is not UTF-8", got=got, do="convert it to UTF-8") from cause


def _sha256(texts: Iterable[str]) -> str:
    """SHA-256 over the length and the bytes of each text, so that no two lists of texts share it."""
    sha = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()
