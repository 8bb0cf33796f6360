"""Tables of texts, a row at a time: JSON lines, Parquet, and values separated by commas or tabs.

Every row is checked as it is read: what cannot be read is named by file and line, or row and column.
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from microtome.errors import DataError, error, nearest

_LONGEST = 2**31 - 1  # characters of one value of a separated file; Python allows 131,072 unless told


@dataclass(frozen=True)
class Table(ABC):
    """The texts of one column of a file."""

    path: Path
    field: str

    def __iter__(self) -> Iterator[str]:
        for where, value in self.column(self.field, "text"):
            yield whole_text(value, where)

    def groups(self, name: str) -> Iterator[str]:
        """The value of another column, for each text."""
        for where, value in self.column(name, "group"):
            if value is None or isinstance(value, dict | list):
                raise error(DataError, f"{where} names no group", got="nothing" if value is None else repr(value)[:40])
            yield sys.intern(str(value))

    @abstractmethod
    def names(self) -> list[str]:
        """The columns, or the keys of the first row."""

    @abstractmethod
    def column(self, name: str, what: str) -> Iterator[tuple[str, object]]:
        """Where each value of a column stands, and the value; `what` it is, "text" or "group", for errors."""


class JsonLines(Table):
    """The texts of a `.jsonl` file, a line at a time; blank lines are left out."""

    def column(self, name: str, what: str) -> Iterator[tuple[str, object]]:
        """The values of a key."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f'"{self.path}" line {number}'
                text = decoded(line, where)
                if text.strip():
                    yield f'{where}, field "{name}"', self._value(text, where, name, what)

    def names(self) -> list[str]:
        """The keys of the first row."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f'"{self.path}" line {number}'
                text = decoded(line, where)
                if text.strip():
                    return list(self._record(text, where))
        return []

    def _record(self, line: str, where: str) -> dict[str, object]:
        """The object of one line."""
        try:
            record: Any = json.loads(line)
        except ValueError as cause:
            raise error(DataError, f"{where} is not JSON ({cause})", allowed="one JSON object per line") from cause
        if not isinstance(record, dict):
            raise error(DataError, f"{where} is not a JSON object", got=type(record).__name__)
        return cast("dict[str, object]", record)

    def _value(self, line: str, where: str, name: str, what: str) -> object:
        """The value of a key in one line."""
        fields = self._record(line, where)
        if name not in fields:
            raise _no_field(f'{where} has no field "{name}"', name, list(fields), what)
        return fields[name]


class ParquetTable(Table):
    """The texts of one column of a Parquet file, a batch of rows at a time."""

    def names(self) -> list[str]:
        """The columns."""
        pa: Any = importlib.import_module("pyarrow")
        pq: Any = importlib.import_module("pyarrow.parquet")
        try:
            return list(pq.read_schema(self.path).names)
        except (pa.ArrowException, OSError) as cause:
            raise error(DataError, f'"{self.path}" cannot be read as Parquet ({cause})') from cause

    def column(self, name: str, what: str) -> Iterator[tuple[str, object]]:
        """The values of a column."""
        pa: Any = importlib.import_module("pyarrow")  # imported late: only Parquet files need it
        pq: Any = importlib.import_module("pyarrow.parquet")
        row = 0
        try:
            with pq.ParquetFile(self.path) as file:
                names: list[str] = file.schema_arrow.names
                if name not in names:
                    raise _no_field(f'"{self.path}" has no column "{name}"', name, names, what)
                for batch in file.iter_batches(batch_size=256, columns=[name]):
                    for value in batch.column(0).to_pylist():
                        yield f'"{self.path}" row {row}, column "{name}"', value
                        row += 1
        except (pa.ArrowException, UnicodeDecodeError) as cause:
            raise error(DataError, f'"{self.path}" cannot be read as Parquet ({cause})') from cause


class Separated(Table):
    """The texts of one column of a `.csv` or `.tsv` file, whose first line names the columns."""

    def names(self) -> list[str]:
        """The columns."""
        with self.path.open("rb") as file:
            return next(self._rows(file), [])

    def column(self, name: str, what: str) -> Iterator[tuple[str, object]]:
        """The values of a column."""
        usual = csv.field_size_limit(_LONGEST)  # of the whole process
        with self.path.open("rb") as file:
            rows = self._rows(file)
            try:
                names = next(rows, [])
                if name not in names:
                    raise _no_field(f'"{self.path}" has no column "{name}"', name, names, what)
                at = names.index(name)
                for values in rows:
                    where = f'"{self.path}" line {rows.line_num}'
                    if values and len(values) != len(names):
                        what, allowed = f"{where} has another number of columns", f"{len(names)}, as the first line"
                        raise error(DataError, what, got=len(values), allowed=allowed, do="quote text with separators")
                    if values:
                        yield f'{where}, column "{name}"', values[at]
            except csv.Error as cause:
                raise error(DataError, f'"{self.path}" line {rows.line_num} cannot be read ({cause})') from cause
            finally:
                csv.field_size_limit(usual)

    def _rows(self, file: Any) -> Any:
        mark = "\t" if self.path.suffix.lower() == ".tsv" else ","
        return csv.reader(self._lines(file), delimiter=mark, strict=True)

    def _lines(self, file: Any) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            yield decoded(line, f'"{self.path}" line {number}')


def _no_field(what: str, field: str, there: list[str], kind: str) -> DataError:
    """The error for a missing field or column: names the ones there are."""
    near = nearest(field, there)
    names = "`field`" if kind == "text" else f"`{kind}`"
    return error(DataError, what + (f".{near}" if near else ""), got=", ".join(there) or "none",
                 do=f"pass the one with the {kind} as {names}")  # fmt: skip


def whole_text(value: object, where: str) -> str:
    """A text that can be written as UTF-8, or an error."""
    if not isinstance(value, str):
        raise error(DataError, f"{where} is not text", got=type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError as cause:
        raise error(DataError, f"{where} has half a surrogate pair at character {cause.start}") from cause
    return _not_binary(value, where)


def decoded(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte order mark."""
    try:
        return _not_binary(data.removeprefix(b"\xef\xbb\xbf").decode(), where)
    except UnicodeDecodeError as cause:
        got = f"byte 0x{cause.object[cause.start]:02x} at {cause.start}"
        raise error(DataError, f"{where} is not UTF-8", got=got, do="convert it to UTF-8") from cause


def _not_binary(text: str, where: str) -> str:
    """A text, unless it holds NUL, which no text does."""
    if "\0" in text:
        got = f"a NUL at character {text.index(chr(0))}"
        raise error(DataError, f"{where} is binary, not text", got=got, do="give a text in UTF-8")
    return text
