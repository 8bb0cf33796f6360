"""Datasets become tables: one row a layer, a head or a neuron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from microtome.atlas._columns import HEADS, LAYERS, NEURONS, meaning
from microtome.model import Model

if TYPE_CHECKING:
    import xarray as xr


def layer_table(*data: xr.Dataset) -> pa.Table:
    """A row a layer, from datasets over (layer)."""
    columns = _columns(data, ("layer",))
    layers = np.asarray(data[0]["layer"].values)
    return _table({"layer": layers.astype(np.int32)} | columns, LAYERS)


def head_table(model: Model, *data: xr.Dataset) -> pa.Table:
    """A row a head, from datasets over (layer, head)."""
    a = model.anatomy
    layer, head = np.divmod(np.arange(a.n_layers * a.n_heads, dtype=np.int32), a.n_heads)
    kv_head = head // (a.n_heads // a.n_kv_heads)
    return _table({"layer": layer, "head": head, "kv_head": kv_head} | _columns(data, ("layer", "head")), HEADS)


def neuron_table(*data: xr.Dataset) -> pa.Table:
    """A row a neuron, from datasets over (layer, neuron) and (layer, neuron, rank)."""
    layers = np.asarray(data[0]["layer"].values)
    n = int(data[0].sizes["neuron"]) if "neuron" in data[0].sizes else 0
    keys = {
        "layer": np.repeat(layers, n).astype(np.int32),
        "neuron": np.tile(np.arange(n), len(layers)).astype(np.int32),
    }
    return _table(keys | _columns(data, ("layer", "neuron")), NEURONS)


def _columns(data: tuple[xr.Dataset, ...], keys: tuple[str, ...]) -> dict[str, Any]:
    """Variables over `keys` flattened to one axis; those with one axis more as lists."""
    found: dict[str, Any] = {}
    for part in data:
        for name, array in part.data_vars.items():
            if tuple(array.dims[: len(keys)]) != keys:
                continue
            values = np.asarray(array.values)
            values = values.astype(np.float32) if values.dtype == np.float64 else values
            values = values.astype(np.int32) if values.dtype == np.int64 else values
            found[str(name)] = values.reshape(-1, *values.shape[len(keys) :])
    return found


def _table(columns: dict[str, Any], meanings: dict[str, tuple[str, str]]) -> pa.Table:
    order = {name: i for i, name in enumerate(meanings)}
    names = sorted(columns, key=lambda n: (order[n.removesuffix("_lo").removesuffix("_hi")], n))
    arrays = {name: _array(columns[name]) for name in names}
    fields = [pa.field(name, arrays[name].type, metadata=dict(meaning(meanings, name))) for name in names]
    return pa.table(list(arrays.values()), schema=pa.schema(fields))


def _array(values: npt.NDArray[Any]) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    if values.dtype.kind == "f":
        finite = np.isfinite(values.reshape(-1))
        flat = flat if finite.all() else pa.array(values.reshape(-1), mask=~finite)
    if values.ndim == 1:
        return flat
    return pa.ListArray.from_arrays(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32), flat)
