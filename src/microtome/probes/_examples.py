"""Examples to probe for: what a row says, and where; read from a table, from rows, or from columns.

A row is a text (or token ids) with its label, and if it has them its group, its type, and the place in it that is
probed. Of preferences it is two texts, the chosen and the rejected one. Every value is checked as it is read, and what
cannot be read is named by its row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from microtome.errors import DataError, error, nearest
from microtome.stream import SUFFIXES, Table, table

OPTIONAL = ("group", "type", "user", "position", "span")
"""Columns that a table may have; each is read where it is there."""
NAMED = ("text", "label", "group")
"""What a row without names holds, in order; of preferences "chosen" and "rejected" in place of text and label."""
Value = tuple[str, object]
"""Where a value stands, and the value."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts with labels, a row each.

    Attributes:
        name: what to call them.
        texts: each a text or a tuple of token ids.
        labels: each the name of a class, or the numbers of a signal; empty for preferences.
        groups: the group of each row; None where none is named.
        types: what the control task gives one label to; None where none is named.
        users: who prefers, of preferences; None where none is named.
        places: where each row is probed: a position, a text in it, or None for where the address says.
        where: how each row is called in errors.
    """

    name: str
    texts: tuple[Any, ...]
    labels: tuple[Any, ...]
    groups: tuple[str, ...] | None = None
    types: tuple[str, ...] | None = None
    users: tuple[str, ...] | None = None
    places: tuple[str | int | None, ...] = ()
    where: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class _Columns:
    """Columns by name, however they were given."""

    name: str
    names: tuple[str, ...]
    get: Callable[[str, str], list[Value]]


def read_examples(
    data: Any, *, field: str = "text", label: str = "label", group: str | None = None, signal: bool = False
) -> Examples:
    """Examples from a file, rows or columns.

    Args:
        data: a `.csv`, `.tsv`, `.jsonl` or `.parquet` file; rows, each a mapping or (text, label) or (text, label,
            group); or columns by name, such as a table of pandas.
        field: the column with the text.
        label: that with the label; of a signal several with commas between them are its repetitions.
        group: that with the group; "group" by default, where there is one.
        signal: whether labels are numbers.

    Raises:
        DataError: a file cannot be read, a column is missing, or a value is none: which, and in what row.
    """
    columns = _columns(data)
    texts = [(where, _text(value, where)) for where, value in columns.get(field, "text")]
    wanted = [label] if label in columns.names or not signal else [part.strip() for part in label.split(",")]
    read = _signal if signal else _class
    found = [[read(value, where) for where, value in columns.get(name, "label")] for name in wanted]
    labels = [row[0] if len(row) == 1 else tuple(x for part in row for x in part) for row in zip(*found, strict=True)]
    return _examples(columns, texts, tuple(labels), group)


def read_pairs(data: Any, *, group: str | None = None) -> tuple[Examples, Examples]:
    """The chosen and the rejected texts of preferences, row by row, from what `read_examples` takes.

    Raises:
        DataError: as `read_examples`; or both texts of a row are the same.
    """
    columns = _columns(data, ("chosen", "rejected", "group"))
    both: list[Examples] = []
    for name in ("chosen", "rejected"):
        texts = [(where, _text(value, where)) for where, value in columns.get(name, name)]
        both.append(_examples(columns, texts, (), group))
    for one, other, where in zip(both[0].texts, both[1].texts, both[0].where, strict=True):
        if one == other:
            raise error(DataError, f"{where}: both texts of the pair are the same", do="leave the row out")
    return both[0], both[1]


def _examples(columns: _Columns, texts: list[tuple[str, Any]], labels: tuple[Any, ...], group: str | None) -> Examples:
    if not texts:
        raise error(DataError, f"{columns.name} has no rows", do="give one row per example")
    given = ("group" if "group" in columns.names else None) if group is None else group
    names = {"group": given} | {name: name for name in OPTIONAL[1:] if name in columns.names}
    other = {name: columns.get(at, name) for name, at in names.items() if at is not None}
    groups, types, users = (
        tuple(_name(value, where, name) for where, value in other[name]) if name in other else None
        for name in ("group", "type", "user")
    )
    places: list[str | int | None] = [None] * len(texts)
    if "position" in other:
        places = [_position(value, where) for where, value in other["position"]]
    if "span" in other:
        spans = [str(value) if value not in (None, "") else None for _, value in other["span"]]
        places = [place if span is None else span for place, span in zip(places, spans, strict=True)]
    where = tuple(place for place, _ in texts)
    return Examples(columns.name, tuple(x for _, x in texts), labels, groups, types, users, tuple(places), where)


def _columns(data: Any, names: Sequence[str] = NAMED) -> _Columns:
    """What was given, as columns.

    Raises:
        DataError: it is no file, rows or columns.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(cast("str", data))
        file = table(path)
        return _Columns(f'"{path}"', tuple(file.names()), lambda name, what: _of_file(file, name, what))
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # a table of pandas
        data = data.to_dict("list")
    if isinstance(data, Mapping):
        given = {str(k): list(cast("Iterable[Any]", v)) for k, v in cast("Mapping[Any, Any]", data).items()}
        sizes = {name: len(column) for name, column in given.items()}
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{name}: {n}" for name, n in sizes.items())
            raise error(DataError, "the columns have different lengths", got=got, do="give one value per row")
        return _Columns("the data", tuple(given), lambda name, what: _of_columns(given, name, what))
    rows: list[Any] = list(cast("Iterable[Any]", data)) if isinstance(data, Iterable) else []
    if not rows or not all(isinstance(row, Mapping | tuple | list) for row in rows):
        got = "nothing" if isinstance(data, Iterable) and not rows else type(rows[0] if rows else data).__name__
        allowed = f"a file ({', '.join(SUFFIXES[1:])}), rows such as {{'text': ..., 'label': ...}}, or columns"
        raise error(DataError, "cannot read this as examples", got=got, allowed=allowed, do="give one of these")
    made = [_row(row, names, i) for i, row in enumerate(rows)]
    there = tuple(name for name in made[0])
    return _Columns("the data", there, lambda name, what: _of_rows(made, name, what))


def _row(row: Any, names: Sequence[str], i: int) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return {str(k): v for k, v in cast("Mapping[Any, Any]", row).items()}
    values = list(cast("Sequence[Any]", row))
    if not 2 <= len(values) <= len(names):
        allowed = f"({', '.join(names[:2])}) or ({', '.join(names)})"
        raise error(DataError, f"row {i} has no such length", got=len(values), allowed=allowed, do="give one of these")
    return dict(zip(names, values, strict=False))


def _of_file(file: Table, name: str, what: str) -> list[Value]:
    return list(file.column(name, what))


def _of_columns(columns: Mapping[str, list[Any]], name: str, what: str) -> list[Value]:
    if name not in columns:
        raise _missing("the data", name, list(columns), what)
    return [(f'row {i}, "{name}"', value) for i, value in enumerate(columns[name])]


def _of_rows(rows: Sequence[Mapping[str, Any]], name: str, what: str) -> list[Value]:
    for i, row in enumerate(rows):
        if name not in row:
            raise _missing(f"row {i}", name, list(row), what)
    return [(f'row {i}, "{name}"', row[name]) for i, row in enumerate(rows)]


def _missing(where: str, name: str, there: list[str], what: str) -> DataError:
    near, got = nearest(name, there), ", ".join(there) or "none"
    do = f"name the one with the {what}" if what in NAMED else "add it"
    return error(DataError, f'{where} has no column "{name}".{near}'.removesuffix("."), got=got, do=do)


def _text(value: object, where: str) -> Any:
    """A text, or token ids."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        ids = cast("Sequence[Any]", value)
        if all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            return tuple(ids)
    got = "nothing" if value in (None, "") or _is_nan(value) else type(value).__name__
    raise error(DataError, f"{where} is neither text nor token ids", got=got, do="fill it in, or leave the row out")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _plain(value: object) -> object:
    """A number of any library as Python's own."""
    item: Any = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", 0) == 0 else value


def _class(value: object, where: str) -> str:
    """The name of a class."""
    value = _plain(value)
    if value is None or value == "" or _is_nan(value):
        got = "nan" if _is_nan(value) else "nothing"
        raise error(DataError, f"{where} has no label", got=got, do="label it, or leave the row out")
    if isinstance(value, float) and not value.is_integer():
        do = 'name the class, or fit a signal with kind="ridge"'
        raise error(DataError, f"{where} is no class", got=f"{value:g}", allowed="a text or a whole number", do=do)
    if not isinstance(value, str | int | float):
        got = type(value).__name__
        raise error(DataError, f"{where} is no class", got=got, allowed="a text or a whole number", do="name the class")
    return str(int(value)) if isinstance(value, float) else str(value)


def _signal(value: object, where: str) -> tuple[float, ...]:
    """The numbers of a signal: one, or its repetitions."""
    value = _plain(value)
    several = (
        list(cast("Iterable[Any]", value)) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    )
    try:
        numbers = tuple(float(cast("Any", x)) for x in several)
    except (TypeError, ValueError):
        raise error(DataError, f"{where} is no number", got=repr(value)[:40], do="give a number per row") from None
    if not numbers or not all(math.isfinite(x) for x in numbers):
        raise error(DataError, f"{where} is not finite", got=repr(value)[:40], do="leave the row out")
    return numbers


def _name(value: object, where: str, what: str) -> str:
    value = _plain(value)
    if value is None or value == "" or _is_nan(value) or isinstance(value, dict | list):
        got = "nothing" if value in (None, "") else repr(value)[:40]
        raise error(DataError, f"{where} names no {what}", got=got, do=f"name the {what} of every row, or of none")
    return str(value)


def _position(value: object, where: str) -> int | None:
    value = _plain(value)
    if value in (None, "") or _is_nan(value):
        return None
    try:
        number = float(cast("Any", value))
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise error(DataError, f"{where} is no position", got=repr(value)[:40], allowed="a whole number of tokens")
    return int(number)
