"""Datasets become tables: one row per layer, head or neuron, each column with what its measure declares of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xarray as xr

from microtome.method import DIMS, Method
from microtome.model import Model

TABLES = {"layer": "layers", "head": "heads", "neuron": "neurons", "expert_neuron": "expert_neurons"}
"""The table of each unit that measures are of; what is of the whole model stands in the manifest."""

ENDINGS = ("", "_lo", "_hi", "_diff", "_diff_lo", "_diff_hi")
"""The variables of a column that are columns of a table: itself, what it is above its control, and their intervals."""

KEYS = {
    "relation": "name of the relation between words",
    "neurons_of": "name of the group whose neurons are switched off",
    "group_name": "name of the group of the text",
    "layer": "number of the block, from 0",
    "head": "number of the query head, from 0",
    "kv_head": "the key/value head that it uses",
    "expert": "number of the expert, from 0",
    "neuron": "number of the neuron, from 0",
}


def tables(model: Model, found: Sequence[tuple[Method, xr.Dataset]]) -> dict[str, pa.Table]:
    """A table a unit, from the measures of it; of neurons of experts only in mixtures."""
    of = {unit: [(m, d) for m, d in found if m.of == unit] for unit in TABLES}
    return {name: _table(model, unit, of[unit]) for unit, name in TABLES.items() if of[unit] or unit != "expert_neuron"}


def joined_columns(old: pa.Table | None, new: pa.Table | None) -> pa.Table:
    """The columns of two tables of the same units, those of the new one in place of old ones of the same name.

    A unit that only one of them has is missing in the columns of the other.
    """
    if old is None or new is None or not new.num_rows or not old.num_rows:
        chosen = new if old is None or (new is not None and new.num_rows) else old
        assert chosen is not None
        return chosen
    keys = [name for name in KEYS if name in old.column_names and name != "kv_head"]
    named = any(pa.types.is_string(old.schema.field(key).type) for key in keys)
    places = [list(zip(*(table.column(key).to_pylist() for key in keys), strict=True)) for table in (old, new)]
    every = list(dict.fromkeys((*places[0], *places[1])))
    every = every if named else sorted(every)  # names stay in their order
    found: dict[str, tuple[pa.Field, pa.ChunkedArray]] = {}
    for table, there in zip((old, new), places, strict=True):
        row = {place: i for i, place in enumerate(there)}
        order = pa.array([row.get(place) for place in every], pa.int64())
        for field, column in zip(table.schema, table.columns, strict=True):
            if field.name not in (*keys, "kv_head") or field.name not in found:
                found[field.name] = (field, column.take(order))
    for position, key in enumerate(keys):
        field, column = found[key]
        found[key] = (field, pa.chunked_array([pa.array([place[position] for place in every], column.type)]))
    return pa.table([column for _, column in found.values()], schema=pa.schema([field for field, _ in found.values()]))


def described(table: pa.Table) -> dict[str, dict[str, Any]]:
    """What each column of a table says of itself: unit, meaning, and what else it declares."""
    found: dict[str, dict[str, Any]] = {}
    for field in table.schema:
        metadata: Mapping[bytes, bytes] = field.metadata or {}
        found[field.name] = {key.decode(): _read(value.decode(), key) for key, value in metadata.items()}
    return found


def _read(text: str, key: bytes) -> Any:
    return json.loads(text) if key in (b"range", b"log", b"bins") else text


def _table(model: Model, unit: str, found: Sequence[tuple[Method, xr.Dataset]]) -> pa.Table:
    dims = DIMS[unit]
    labels = _labels(dims, [data for _, data in found])
    columns = _keys(model, labels)
    attrs: dict[str, dict[str, Any]] = {key: {"unit": "1", "meaning": KEYS[key]} for key in columns}
    for method, data in found:
        placed = data.reindex({dim: x for dim, x in labels.items() if not np.array_equal(data[dim], x)})
        for name in named_columns(method, data, dims):
            columns[name] = flat(placed[name], dims)
            attrs[name] = dict(data[name].attrs)
    return table_of(columns, attrs)


def named_columns(method: Method, data: xr.Dataset, dims: Sequence[str]) -> list[str]:
    """The variables of a measure that have a value, or a list of them, for each unit."""
    named = [c.name + ending for c in method.columns for ending in ENDINGS]
    return [name for name in named if name in data and set(dims) <= set(data[name].dims)]


def table_of(columns: Mapping[str, npt.NDArray[Any]], attrs: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """A table of columns [row] or [row, ...], null for what is no number, each with what is said of it."""
    arrays = {name: _array(values) for name, values in columns.items()}
    fields = [pa.field(name, array.type, metadata=_metadata(attrs[name])) for name, array in arrays.items()]
    return pa.table(list(arrays.values()), schema=pa.schema(fields))


def _labels(dims: Sequence[str], parts: Sequence[xr.Dataset]) -> dict[str, npt.NDArray[Any]]:
    """By axis, every unit that some measure has a value of; none where there is no measure."""
    nothing = np.arange(0)
    return {
        dim: np.unique(np.concatenate([nothing, *(np.asarray(data[dim].values) for data in parts)])) for dim in dims
    }


def _keys(model: Model, labels: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The columns that name a row."""
    grid = np.meshgrid(*labels.values(), indexing="ij")
    keys: dict[str, Any] = {dim: x.reshape(-1).astype(np.int32) for dim, x in zip(labels, grid, strict=True)}
    if "head" in keys:
        keys["kv_head"] = keys["head"] // (model.anatomy.n_heads // model.anatomy.n_kv_heads)
    return keys


def flat(array: xr.DataArray, dims: Sequence[str]) -> npt.NDArray[Any]:
    """One row per unit; axes after those of the unit stay, as lists."""
    extra = [dim for dim in array.dims if dim not in dims]
    values = np.asarray(array.transpose(*dims, *extra).values)
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    values = values.astype(np.int32) if values.dtype == np.int64 else values
    rows = values.reshape(-1, *values.shape[len(dims) :])
    # A value for each group keeps its place, by which it is known, though nothing be known of a group.
    return rows if rows.ndim == 1 or extra[0] == "group" else rows[:, _filled(rows)]


def _filled(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The places of the lists up to the last one that any row fills: a text of few rows leaves the last ones empty.

    An empty one before it stays, since a value is known by its place: the third of a class is the third in each list.
    """
    there = np.isfinite(rows) if rows.dtype.kind == "f" else rows >= 0
    filled = np.flatnonzero(there.any(axis=(0, *range(2, rows.ndim))))
    return np.arange(filled[-1] + 1 if len(filled) else 0)


def _metadata(attrs: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else _json(value) for key, value in attrs.items() if value != ""}


def _json(value: Any) -> str:
    """A value as JSON, which has no infinity: the open end of a range is null."""
    ends = [None if np.isinf(end) else end for end in value] if isinstance(value, list) else value
    return json.dumps(ends)


def _array(values: npt.NDArray[Any]) -> pa.Array:
    if values.dtype.kind == "O":
        return pa.array(values.tolist(), pa.string())
    every = np.ma.getdata(values).reshape(-1)
    missing = np.ma.getmaskarray(values).reshape(-1)  # a whole number that is not known
    missing = missing | ~np.isfinite(every) if values.dtype.kind == "f" else missing
    made = pa.array(every, mask=missing) if missing.any() else pa.array(every)
    for axis in reversed(range(1, values.ndim)):
        starts = np.arange(math.prod(values.shape[:axis]) + 1, dtype=np.int32) * values.shape[axis]
        made = pa.ListArray.from_arrays(starts.astype(np.int32), made)
    return made
