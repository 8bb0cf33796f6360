"""Files, folders and data sets as a corpus, each document with its group.

A table (`.jsonl`, `.parquet`, `.csv`, `.tsv`) is read a document at a time, so that it may be larger than memory; the
groups of its documents, one name each, are held.

Cost:  one pass over the bytes for the checksum, and one over the column of groups where there is one; a table is read
       again on each iteration.
Check: tests/unit/test_stream_corpus.py, tests/unit/test_stream_groups.py.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from microtome.errors import DataError, error
from microtome.files import TEXTS, text_place, whole_file
from microtome.stream._corpus import Corpus, joined
from microtome.stream._tables import JsonLines, ParquetTable, Separated, Table, decoded, whole_text

SUFFIXES = TEXTS
DATASETS = "datasets:"
"""What the name of a data set begins with, such as "datasets:wikitext/wikitext-2-raw-v1:train"."""
TABLES: dict[str, type[Table]] = {".jsonl": JsonLines, ".parquet": ParquetTable, ".csv": Separated, ".tsv": Separated}
ALLOWED = "a corpus, a path, texts, or a mapping from groups to these"


def read_text(
    path: str | os.PathLike[str], *, field: str = "text", paragraphs: bool = False, group: str | None = None
) -> Corpus:
    """A corpus from a file, or from a folder of files.

    Args:
        path: `.txt` (one document), `.jsonl` (a JSON object a line), `.parquet`, `.csv` or `.tsv` (with a head line),
            in UTF-8; or a folder, whose files of these kinds are read in the order of their paths.
        field: the key or column with the text, of all but `.txt`.
        paragraphs: makes each blank-line-separated part of a `.txt` file a document.
        group: the key or column whose value is the group of a document, of all but `.txt`.

    Returns:
        A corpus named as the file, whose `sha256` is the file's. Without `group` it is of one group with the same name;
        a folder has a group for each folder in it, and for each file that lies in it directly.

    Raises:
        DataError: the file is missing, empty, binary or of another type, its bytes are not UTF-8, or a document has no
            such field. Of a table only the first text is read here, the others when iterated.
    """
    path = text_place(path)
    try:
        if path.is_dir():
            return _folder(path, field, paragraphs, group)
        documents = _documents(path, field, paragraphs)
        if not any(text.strip() for text in documents):
            raise error(DataError, f'"{path}" has no text', got=f"{path.stat().st_size} bytes")
        groups = (path.stem,)
        if group is not None:
            if not isinstance(documents, Table):
                allowed = ", ".join(TABLES)
                raise error(DataError, f'"{path}" has no column "{group}"', got=path.suffix, allowed=allowed)
            groups = tuple(documents.groups(group))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise error(DataError, f'cannot read "{path}" ({cause.strerror or cause})') from cause
    return Corpus(path.stem, documents, groups, sha256)


def _documents(path: Path, field: str, paragraphs: bool) -> tuple[str, ...] | Table:
    """The documents of a file: in memory for `.txt`, read again on each iteration for the others."""
    table = TABLES.get(path.suffix.lower())
    if table is not None:
        return table(path, field)
    text = decoded(path.read_bytes(), f'"{path}"').replace("\r\n", "\n")
    if not paragraphs:
        return (text,)
    return tuple(part.strip("\n") for part in re.split(r"\n(?:[ \t]*\n)+", text) if part.strip())


def table(path: str | os.PathLike[str], field: str = "text") -> Table:
    """The rows of a `.jsonl`, `.parquet`, `.csv` or `.tsv` file, column by column.

    Raises:
        DataError: it is missing, or of another type. What is in it is checked as it is read.
    """
    file = whole_file(path, tuple(TABLES), "as a table")
    return TABLES[file.suffix.lower()](file, field)


@dataclass(frozen=True)
class Files:
    """The documents of several files in turn; files of lines or columns are read again on each iteration."""

    parts: tuple[Corpus, ...]

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            yield from part


def _folder(folder: Path, field: str, paragraphs: bool, group: str | None) -> Corpus:
    """The files of a folder, hidden ones left out.

    Raises:
        DataError: it holds none that can be read as text, or one of them cannot be read.
    """
    inside = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    found = [p for p in inside if p.suffix.lower() in TEXTS and not any(part.startswith(".") for part in p.parts)]
    if not found:
        got = f"{len(inside)} other files" if inside else "an empty folder"
        raise error(DataError, f'"{folder}" holds no text', got=got, allowed=", ".join(TEXTS))
    parts: list[Corpus] = []
    groups: list[str] = []
    sha = hashlib.sha256()
    for file in found:
        own = group if file.suffix.lower() in TABLES else None
        part = read_text(folder / file, field=field, paragraphs=paragraphs, group=own)
        name = file.parts[0] if len(file.parts) > 1 else file.stem
        groups += part.groups if own is not None else [name] * sum(1 for _ in part)
        sha.update(f"{file.as_posix()} {part.sha256}\n".encode())
        parts.append(part)
    return Corpus(folder.name or str(folder), Files(tuple(parts)), tuple(groups), sha.hexdigest())


@dataclass(frozen=True)
class Records:
    """The texts of one column of a data set of the package `datasets`."""

    records: Any
    field: str
    name: str

    def __iter__(self) -> Iterator[str]:
        for number, value in enumerate(self._column(self.field)):
            yield whole_text(value, f'{self.name} row {number}, column "{self.field}"')

    def groups(self, column: str) -> tuple[str, ...]:
        """The value of another column, for each row."""
        return tuple(str(value) for value in self._column(column))

    def _column(self, column: str) -> Iterator[Any]:
        names = list(self.records.column_names)
        if column not in names:
            what = f'{self.name} has no column "{column}"'
            raise error(DataError, what, got=", ".join(names), do="name one of these")
        return (record[column] for record in self.records)


def read_dataset(name: str, *, field: str = "text", group: str | None = None) -> Corpus:
    """A corpus from a data set of the package `datasets`.

    Args:
        name: as `datasets.load_dataset` takes it, with a configuration and a part if it has them:
            "NAME", "NAME:PART", "NAME:CONFIGURATION:PART"; the part is "train" by default.
        field: the column with the text.
        group: the column whose value is the group of a document.

    Raises:
        DataError: the package is not there, or cannot load it; or it has no such column.
    """
    try:
        package: Any = importlib.import_module("datasets")
    except ImportError as cause:
        do = "pip install datasets, or give a file"
        raise error(DataError, f'the data set "{name}" needs the package datasets, which is not here', do=do) from cause
    path, *rest = name.split(":")
    if not path or len(rest) > 2:
        allowed = "NAME, NAME:PART or NAME:CONFIGURATION:PART"
        raise error(DataError, "cannot read the name of a data set", got=f'"{name}"', allowed=allowed)
    part = rest[-1] if rest else "train"
    try:
        records = package.load_dataset(path, rest[0] if len(rest) == 2 else None, split=part)
    except Exception as cause:
        reason = " ".join(str(cause).split())
        raise error(DataError, f'cannot load the data set "{name}"', got=reason, do="check its name") from cause
    return _of_records(records, name, field, group)


def _of_records(records: Any, name: str, field: str, group: str | None) -> Corpus:
    """A corpus of a data set that is loaded; its checksum is over its texts."""
    documents = Records(records, field, f'data set "{name}"')
    sha = hashlib.sha256()
    for text in documents:
        data = text.encode()
        sha.update(len(data).to_bytes(8, "big") + data)
    groups = (name,) if group is None else documents.groups(group)
    return Corpus(name, documents, groups, sha.hexdigest())


def corpus_of(text: Any, *, field: str = "text", group: str | None = None) -> Corpus:
    """A corpus from what was given as text: a corpus, a path, texts, or a mapping from groups to any of these.

    A text counts as a path if it is a `Path` or ends as the files do that can be read; as a data set if it begins with
    "datasets:", or is one of that package.

    Args:
        text: what was given.
        field: the key or column with the text, of tables.
        group: the key or column with the group, of tables.

    Raises:
        DataError: a file cannot be read, or it is no text.
    """
    if isinstance(text, Corpus):
        return text
    if isinstance(text, Mapping):
        given = cast("Mapping[Any, Any]", text).items()
        parts = {str(name): corpus_of(part, field=field, group=group) for name, part in given}
        return joined(", ".join(parts), [Corpus.of(name, tuple(part), name) for name, part in parts.items()])
    if isinstance(text, str) and text.startswith(DATASETS):
        return read_dataset(text.removeprefix(DATASETS), field=field, group=group)
    if isinstance(text, Path) or (isinstance(text, str) and text.lower().endswith(SUFFIXES)):
        return read_text(text, field=field, group=group)
    if hasattr(text, "column_names") and hasattr(text, "__getitem__"):
        return _of_records(text, str(getattr(text, "builder_name", None) or "data set"), field, group)
    texts: tuple[Any, ...] = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, Iterable) else ()
    if not texts or not all(isinstance(part, str) for part in texts):
        raise unreadable(text)
    return Corpus.of("text", texts)


def unreadable(text: object, allowed: str = ALLOWED) -> DataError:
    """The error for what is no text."""
    got = type(text).__name__
    return error(DataError, "cannot read this as text", got=got, allowed=allowed, do="give one of these")
