"""Tables and texts as the data files of an atlas's pages.

A page opened from disk may not fetch, so a data file is a script that hands one JSON value to the pages:

    atlas.receive("neurons/12", {"rows": 1536, "types": {"max": "float"}, "columns": {"max": [3.21, null]}});

A large value is handed on as `JSON.parse('...')`, which browsers read twice as quickly as the same value written out.
The JSON is pure ASCII and holds no `<`, so no token can end a script or a line early. Floats are rounded to a few
significant digits; what is null, NaN or infinite becomes null, which the pages show as a dash.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from microtome.errors import DataError, error

TOKEN_COLUMNS = ("promoted", "suppressed")
"""Columns of the neuron table that hold lists of vocabulary ids."""

LISTED = ("promoted",)
"""List columns that a list of neurons needs; the other list columns are only needed by the page of one neuron."""


LARGE = 100_000
"""Characters from which on a value is parsed as JSON, not as a script."""


def script(name: str, value: str) -> str:
    """The text of the data file `name`, from the JSON of its value."""
    if len(value) >= LARGE:
        quoted = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return f"atlas.receive({literal(name)}, JSON.parse('{quoted}'));\n"
    return f"atlas.receive({literal(name)}, {value});\n"


def literal(value: object) -> str:
    """JSON in ASCII without `<`, safe in any script; numbers that are not finite become null, other types text."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c")


def encode(table: pa.Table, digits: int, names: Sequence[str] | None = None) -> str:
    """The JSON of some columns of a table: its rows, the type of each column, and the columns as arrays."""
    names = table.column_names if names is None else names
    types = {name: _kind(table.schema.field(name).type) for name in names}
    columns = ",".join(f"{literal(name)}:{_encode_column(table.column(name), digits)}" for name in names)
    return f'{{"rows":{table.num_rows},"types":{literal(types)},"columns":{{{columns}}}}}'


def by_layer(table: pa.Table, unit: str) -> Iterator[tuple[int, pa.Table]]:
    """Each layer of a table with its rows, in the order of layers and units."""
    table = table.sort_by([("layer", "ascending"), (unit, "ascending")])
    layers, starts = np.unique(table.column("layer").to_numpy(), return_index=True)
    ends = [*starts.tolist(), table.num_rows][1:]
    for layer, start, end in zip(layers.tolist(), starts.tolist(), ends, strict=True):
        yield layer, table.slice(start, end - start)


def split_columns(table: pa.Table) -> tuple[list[str], list[str]]:
    """The columns that a list of neurons needs, and those that only the page of one neuron needs."""
    listed = [f.name for f in table.schema if f.name in LISTED or not _is_list(f.type)]
    return listed, [name for name in table.column_names if name not in listed]


def reindex_vocab(neurons: pa.Table, vocab: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """Replace vocabulary ids by places in a list of only the strings that are used, and return both.

    In lists of tokens of other measures -1 stands for none, and stays.
    """
    flat: dict[str, np.ndarray] = {}
    for name in _token_columns(neurons):
        problem = f'column "{name}" of the neuron table leaves the vocabulary'
        least = 0 if name in TOKEN_COLUMNS else -1
        flat[name] = _check_places(neurons.column(name), problem, len(vocab), least)
    every = np.concatenate(list(flat.values())) if flat else np.empty(0, dtype=np.int64)
    used = np.unique(every[every >= 0])
    for name, ids in flat.items():
        places = np.where(ids >= 0, np.searchsorted(used, ids), -1).astype(np.int32)
        lists = _replace_values(neurons.column(name), pa.array(places))
        neurons = neurons.set_column(neurons.column_names.index(name), name, lists)
    return neurons, [str(vocab[i]) for i in used.tolist()]


def hundredths(neurons: pa.Table, before: int) -> pa.Table:
    """Activations around peaks (columns `*_around`) as whole hundredths of the peak's size, for shades; cut at +-999.

    Args:
        neurons: whose columns hold for each example a list of values, the peak behind `before` others.
        before: tokens before a peak.
    """
    for name in (name for name in neurons.column_names if name.endswith("_around")):
        lists = neurons.column(name).combine_chunks()
        passages = lists.flatten()
        if not len(passages):
            continue
        values = np.array(passages.flatten(), dtype=np.float64).reshape(len(passages), -1)
        peak = np.abs(values[:, before : before + 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.clip(np.rint(100 * values / peak), -999, 999)
        missing = ~np.isfinite(shares)
        whole = pa.array(np.where(missing, 0, shares).astype(np.int16).reshape(-1), mask=missing.reshape(-1))
        width = values.shape[1]
        inner = pa.ListArray.from_arrays(np.arange(0, len(whole) + 1, width, dtype=np.int32), whole)
        outer = pa.ListArray.from_arrays(_starts(lists), inner, mask=lists.value_lengths().is_null())
        neurons = neurons.set_column(neurons.column_names.index(name), name, outer)
    return neurons


def _token_columns(neurons: pa.Table) -> list[str]:
    """The columns that hold lists of vocabulary ids: those of every atlas, and others whose unit says so."""
    found: list[str] = []
    for field in neurons.schema:
        metadata: Mapping[bytes, bytes] = field.metadata or {}
        named = field.name in TOKEN_COLUMNS or metadata.get(b"unit") == b"token"
        found += [field.name] if named and _is_list(field.type) else []
    return found


def strings_of(neurons: pa.Table, strings: Sequence[str]) -> dict[int, str]:
    """The strings that the token columns of some neurons point at, by place."""
    used: set[int] = set()
    for name in _token_columns(neurons):
        used.update(int(place) for place in _as_lists(neurons.column(name)).flatten().to_pylist())
    return {place: str(strings[place]) for place in sorted(used) if place >= 0}


def pack_tokens(tokens: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct strings of a text in order of appearance, and for each token the place of its string."""
    places: dict[str, int] = {}
    ids = [places.setdefault(token, len(places)) for token in tokens]
    return list(places), ids


def count_firing(neurons: pa.Table, bins: int = 20) -> dict[str, Any] | None:
    """How many neurons of each layer fire how often: the edges of bins over 0 to 1, and counts by layer.

    A neuron that never fires is counted separately, because it differs in kind from one that fires rarely.
    """
    if "firing_rate" not in neurons.column_names:
        return None
    edges = np.linspace(0.0, 1.0, bins + 1)
    layers = neurons.column("layer").to_numpy()
    rates = neurons.column("firing_rate").to_numpy().astype(np.float64)
    found: dict[str, Any] = {"edges": edges.round(6).tolist(), "layers": [], "never": [], "counts": []}
    for layer in np.unique(layers):
        rate = rates[layers == layer]
        found["layers"].append(int(layer))
        found["never"].append(int((rate == 0).sum()))
        found["counts"].append(np.histogram(rate[rate > 0], bins=edges)[0].tolist())
    return found


def count_classes(neurons: pa.Table, described: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each column whose numbers have names in the manifest, how many neurons of each layer have which."""
    found: list[dict[str, Any]] = []
    for name in neurons.column_names:
        names = described.get(name, {}).get("names")
        if not names or not neurons.num_rows:
            continue
        layers, values = (neurons.column(key).to_numpy().astype(np.float64) for key in ("layer", name))
        known = np.isfinite(values)
        layers, values = (of[known].astype(np.int64) for of in (layers, values))
        every = np.unique(layers)
        counts = [np.bincount(values[layers == layer], minlength=len(names)) for layer in every]
        found.append(
            {"name": name, "names": list(names), "layers": every.tolist(), "counts": [row.tolist() for row in counts]}
        )
    return found


def check_examples(neurons: pa.Table, tokens: int) -> None:
    """Raise DataError where an example points outside the text."""
    for name in ("example_index", "example_start"):
        if name not in neurons.column_names:
            continue
        _check_places(neurons.column(name), f'column "{name}" of the neuron table leaves the text', tokens)


def _finite(value: object) -> object:
    """The same value with null in place of every float that JSON cannot hold."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return value


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _kind(kind: pa.DataType) -> str:
    """The pages' name for a column type, by which they format and sort it."""
    if _is_list(kind):
        return "list"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    return "float" if pa.types.is_floating(kind) else "text"


def _encode_column(column: pa.ChunkedArray, digits: int) -> str:
    kind = column.type
    if not _is_list(kind):
        return f"[{','.join(_encode_values(column, digits))}]"
    lists = _as_lists(column)
    inner = lists.flatten()
    values = _encode_lists(inner, digits) if _is_list(inner.type) else _encode_values(inner, digits)
    return f"[{','.join(_joined(lists, values))}]"


def _encode_lists(lists: pa.ListArray, digits: int) -> list[str]:
    """Each list of an array of lists of numbers as JSON."""
    return _joined(lists, _encode_values(lists.flatten(), digits))


def _joined(lists: pa.ListArray, values: Sequence[str]) -> list[str]:
    """The JSON of each list, from that of the values of all of them."""
    rows: list[str] = []
    start = 0
    for length in lists.value_lengths().to_pylist():
        if length is None:
            rows.append("null")
            continue
        rows.append(f"[{','.join(values[start : start + length])}]")
        start += length
    return rows


def _encode_values(values: pa.Array | pa.ChunkedArray, digits: int) -> list[str]:
    """Each value as JSON. Floats are formatted all at once: a neuron table holds millions."""
    kind = values.type
    if pa.types.is_floating(kind):
        numbers = np.array(values, dtype=np.float64)
        numbers = np.where(np.isfinite(numbers), numbers, np.nan)
        text = ",".join([f"%.{digits}g"] * len(numbers)) % tuple(numbers.tolist())
        return text.replace("nan", "null").split(",") if text else []
    if pa.types.is_integer(kind):
        return ["null" if value is None else str(value) for value in values.to_pylist()]
    if pa.types.is_boolean(kind):
        return [literal(value) for value in values.to_pylist()]
    return [literal(None if value is None else str(value)) for value in values.to_pylist()]


def _as_lists(column: pa.ChunkedArray) -> pa.ListArray:
    """A column of lists of any kind as one array of lists."""
    lists = column.combine_chunks()
    return lists.cast(pa.list_(lists.type.value_type))


def _check_places(column: pa.ChunkedArray, problem: str, size: int, least: int = 0) -> np.ndarray:
    """The flat values of a list column of places in a list of `size`, or DataError if one is outside or missing."""
    flat = _as_lists(column).flatten()
    allowed = f"0 to {size - 1}" if size else "none, for it is empty"
    if flat.null_count:
        raise error(DataError, problem, got="null", allowed=allowed)
    places = np.array(flat, dtype=np.int64)
    if len(places) and not least <= places.min() <= places.max() < size:
        raise error(DataError, problem, got=f"{places.min()} to {places.max()}", allowed=allowed)
    return places


def _replace_values(column: pa.ChunkedArray, values: pa.Array) -> pa.Array:
    """Lists of the same lengths and nulls as those of `column`, with other values."""
    lists = _as_lists(column)
    return pa.ListArray.from_arrays(_starts(lists), values, mask=lists.value_lengths().is_null())


def _starts(lists: pa.ListArray) -> pa.Array:
    """Where each list begins among the values of all of them, and where the last one ends."""
    lengths = np.array(lists.value_lengths().fill_null(0))
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
