"""What an atlas says of the groups of its text: the tables `groups`, `group_layers` and `damage`.

    groups        one row per group: documents, tokens, loss and what else is of the whole model
    group_layers  one row per group and layer
    damage        one row per set of neurons and group: what the group loses without the neurons of the set

Two tables of groups and not one, since `SELECT * FROM groups` should give each group once: what is of a layer stands
where a user who asks for layers looks for it, beside a column `layer`. The key is called `group_name`, for `group` is a
word of SQL.

What is by neuron stands in the table `neurons`, as lists of one value a group in the order of the table `groups`; SQL
has them as rows in `group_neurons`.

Check: tests/laws/test_atlas_groups.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xarray as xr

from microtome.atlas._tables import KEYS, flat, named_columns, table_of
from microtome.atlas._texts import Reading
from microtome.errors import ArgumentError
from microtome.measurements import damage
from microtome.method import Measure, Method, Text, declared
from microtome.method.runner import Measured
from microtome.model import Model
from microtome.stream import TokenBatch, TokenBatches

GROUPED = "group_neurons"
"""The measure that chooses the neurons of groups."""

DAMAGE = "damage"
"""What is no measure, as it needs the neurons that one has chosen; the atlas runs it by this name."""

LARGEST = 2**20
"""Bytes that a measure may keep of a layer for its groups to be kept apart: a covariance of each would be too much."""

ROWS, WIDTH = 8, 128
"""Rows of each group, and tokens of these, on which neurons are switched off: of fewer rows there is no interval."""

_DAMAGE = {
    "damage": "mean increase of the group's loss without the neurons, in 8 rows of the text that they were chosen by",
    "damage_random": "the same without random neurons of the same layers and sizes",
    "damage_diff": "damage minus damage_random",
}


def kept_by_group(model: Model, names: Sequence[str]) -> list[str]:
    """The measures of whole models and of layers that give each group of a text besides."""
    found: list[str] = []
    for name in names:
        made = declared(name)
        if not isinstance(made, Measure) or made.method.of not in ("model", "layer") or not isinstance(made.on, Text):
            continue
        if not made.compares and _size(made, model) <= LARGEST:
            found.append(name)
    return found


def _size(made: Measure, model: Model) -> int:
    """Bytes that a measure keeps of a layer before it has seen anything."""
    statistic = made.statistic({})
    kept = statistic.start(model, None if made.method.of == "model" else 0)
    return sum(x.nbytes for one in kept.values() if hasattr(one, "state") for x in one.state().values())


def placed(data: xr.Dataset, groups: Sequence[str]) -> xr.Dataset:
    """A dataset with all groups in their order; those of which nothing was read are no numbers."""
    if "group" not in data.dims or list(data["group"].values) == list(groups):
        return data
    there = list(data["group"].values)
    order = {str(name): there.index(name) for name in there}
    first = data.isel(group=0)
    nothing = xr.full_like(first, {name: np.nan if x.dtype.kind == "f" else -1 for name, x in first.data_vars.items()})
    parts = [data.isel(group=order[g]) if g in order else nothing for g in groups]
    joined = xr.concat(parts, "group", coords="minimal", compat="override", data_vars="minimal")
    joined = joined.assign_coords(group=list(groups))
    return joined.assign({n: x for n, x in data.data_vars.items() if "group" not in x.dims})


def least_of(options: Mapping[str, Any]) -> int:
    """Tokens below which a group is undecided."""
    made = declared(GROUPED)
    assert isinstance(made, Measure)
    default = next(p.default for p in made.parameters if p.name == "least")
    return int(options.get("least", default))


def group_tables(reading: Reading, measured: Measured, least: int) -> dict[str, pa.Table]:
    """The tables `groups` and `group_layers`, the second where some measure of layers was kept by group."""
    names = reading.groups
    tokens = np.array([reading.tokens(name) for name in names], dtype=np.int32)
    columns: dict[str, Any] = {
        "group_name": np.array(names, dtype=object),
        "documents": np.array([reading.documents(name) for name in names], dtype=np.int32),
        "tokens": tokens,
    }
    attrs: dict[str, dict[str, Any]] = {
        "group_name": {"unit": "1", "meaning": KEYS["group_name"]},
        "documents": {"unit": "documents", "meaning": "documents of the group that were read, the last one in part"},
        "tokens": {
            "unit": "tokens",
            "meaning": f"tokens of the group that were read; of under {least} nothing is said",
        },
    }
    known = tokens >= least
    every = {**measured.by_group, **{m: d for m, d in measured.datasets.items() if "group" in d.dims}}
    _add(columns, attrs, every, names, ("group",), known)
    made = {"groups": table_of(columns, attrs)}
    by_layer = {m: d for m, d in every.items() if m.of == "layer" and "layer" in d.dims}
    return made | ({"group_layers": _layers(by_layer, names, known)} if by_layer else {})


def _add(
    columns: dict[str, Any], attrs: dict[str, dict[str, Any]], found: Mapping[Method, xr.Dataset],
    names: Sequence[str], dims: tuple[str, ...], known: np.ndarray,
) -> None:  # fmt: skip
    """Add what measures say of groups; nothing is known of a group of too few tokens."""
    for method, data in found.items():
        own = placed(data, names)
        for name in named_columns(method, own, dims):
            array = own[name]
            if set(array.dims) != set(dims):
                continue  # of other units too, such as neurons, or a list
            values = flat(array, dims)
            unknown = np.repeat(~known, len(values) // len(names))
            columns[name], attrs[name] = np.ma.masked_array(values, unknown), dict(data[name].attrs)


def _layers(found: Mapping[Method, xr.Dataset], names: Sequence[str], known: np.ndarray) -> pa.Table:
    layers = sorted({int(i) for data in found.values() for i in data["layer"].values})
    columns: dict[str, Any] = {
        "group_name": np.repeat(np.array(names, dtype=object), len(layers)),
        "layer": np.tile(np.array(layers, dtype=np.int32), len(names)),
    }
    attrs: dict[str, dict[str, Any]] = {key: {"unit": "1", "meaning": KEYS[key]} for key in columns}
    every = {method: data.reindex(layer=layers) for method, data in found.items()}
    _add(columns, attrs, every, names, ("group", "layer"), known)
    return table_of(columns, attrs)


def chosen_neurons(neurons: pa.Table, groups: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """By group, the (layer, neuron) that are chosen for it; a group that is undecided is left out."""
    if "group_selected" not in neurons.column_names:  # the model lacks the sites, or has no such neurons
        return {}
    lists = neurons.column("group_selected").combine_chunks()
    flags = np.ma.masked_invalid(lists.flatten().to_numpy(zero_copy_only=False)).reshape(len(neurons), len(groups))
    layer, neuron = (neurons.column(name).to_pylist() for name in ("layer", "neuron"))
    return {
        group: [(layer[row], neuron[row]) for row in np.flatnonzero(flags[:, number].filled(0) == 1).tolist()]
        for number, group in enumerate(groups)
        if not np.ma.getmaskarray(flags)[:, number].all()
    }


def whole_lists(neurons: pa.Table, groups: Sequence[str]) -> pa.Table:
    """The neurons with a list in every row: one of which nothing is known has a list of nulls, so that places agree."""
    for number, field in enumerate(neurons.schema):
        column = neurons.column(number)
        if field.name.startswith("group_") and pa.types.is_list(field.type) and column.null_count:
            nothing = [None] * len(groups)
            rows = pa.array([nothing if row is None else row for row in column.to_pylist()], field.type)
            neurons = neurons.set_column(number, field, rows)
    return neurons


def with_names(neurons: pa.Table, groups: Sequence[str]) -> pa.Table:
    """The neurons with a column `of_group`: the names of the groups that each is chosen for."""
    sets = chosen_neurons(neurons, groups)
    row = {
        place: i
        for i, place in enumerate(zip(*(neurons.column(k).to_pylist() for k in ("layer", "neuron")), strict=True))
    }
    named: list[list[str]] = [[] for _ in range(len(neurons))]
    for group, own in sets.items():
        for place in own:
            named[row[place]].append(group)
    meaning = "groups of the text that the neuron is chosen for, see group_selected"
    field = pa.field("of_group", pa.string(), metadata={"unit": "1", "meaning": meaning})
    return _put(neurons, field, pa.array([", ".join(own) or None for own in named], pa.string()))


def with_counts(groups: pa.Table, neurons: pa.Table) -> pa.Table:
    """The groups with a column `neurons`: how many are chosen for each."""
    names: list[str] = groups.column("group_name").to_pylist()
    sets = chosen_neurons(neurons, names)
    field = pa.field("neurons", pa.int32(), metadata={"unit": "neurons", "meaning": "neurons chosen for the group"})
    return _put(groups, field, pa.array([len(sets[name]) if name in sets else None for name in names], pa.int32()))


def _put(table: pa.Table, field: pa.Field, values: pa.Array) -> pa.Table:
    """A table with a column, in place of one of the same name."""
    if field.name in table.column_names:
        table = table.drop_columns([field.name])
    return table.append_column(field, values)


def damage_table(model: Model, reading: Reading, neurons: pa.Table, least: int) -> tuple[pa.Table, str]:
    """The table `damage`, and why it has no rows, if so.

    Each set of neurons against each group, and random sets of the same layers and sizes. What cannot be measured leaves
    the table without rows: the rest of the atlas stands.
    """
    known = [name for name in reading.groups if reading.tokens(name) >= least]
    sets = {name: own for name, own in chosen_neurons(neurons, reading.groups).items() if own}
    rows = {name: _some(part) for name, part in reading.read.items() if name in known}
    data, why = xr.Dataset(coords={"set": [], "group": []}), ""
    if not known:
        why = f"no group of the text has {least} tokens or more"
    elif not sets:
        why = "no neuron was chosen for any group"
    else:
        try:
            data = damage(model, sets, rows, rows=4)
        except ArgumentError as problem:  # a layer has too few neurons to draw controls from
            why = str(problem)
    return _damage_columns(data), why


def _damage_columns(data: xr.Dataset) -> pa.Table:
    """The rows of a damage matrix; none of an empty one."""
    grid = [(one, other) for one in data["set"].values for other in data["group"].values]
    columns: dict[str, Any] = {
        "neurons_of": np.array([str(one) for one, _ in grid], dtype=object),
        "group_name": np.array([str(other) for _, other in grid], dtype=object),
        "neurons": np.repeat(_values(data, "neurons").astype(np.int32), data.sizes["group"]),
    }
    attrs: dict[str, dict[str, Any]] = {
        key: {"unit": "1", "meaning": KEYS.get(key, "how many they are")} for key in columns
    }
    attrs["neurons"]["unit"] = "neurons"
    for name, meaning in _DAMAGE.items():
        told = {"unit": "nats", "meaning": meaning, "control": "damage_random" if name == "damage" else ""}
        for end in ("", "_lo", "_hi"):
            columns[name + end] = _values(data, name + end).astype(np.float32).reshape(-1)
            ends = {"_lo": "lower end of its 95 % interval", "_hi": "upper end of its 95 % interval"}
            attrs[name + end] = told if not end else {"unit": "nats", "meaning": ends[end]}
    return table_of(columns, attrs)


def _values(data: xr.Dataset, name: str) -> np.ndarray:
    return np.asarray(data[name].values) if name in data else np.zeros(0)


def _some(part: TokenBatches) -> list[TokenBatch]:
    """Rows spread evenly over a text, each cut to its first tokens."""
    found: list[TokenBatch] = []
    count = sum(len(batch.tokens) for batch in part)
    wanted = set(torch.linspace(0, count - 1, min(ROWS, count)).round().int().tolist())
    seen = 0
    for batch in part:
        keep = [row for row in range(len(batch.tokens)) if seen + row in wanted]
        seen += len(batch.tokens)
        if keep:
            some = {n: getattr(batch, n)[keep, :WIDTH] for n in ("tokens", "document", "position", "group")}
            found.append(replace(batch, start=batch.start[keep], **some))
    return found
