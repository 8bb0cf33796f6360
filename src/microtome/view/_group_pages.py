"""The data files of an atlas that are of groups of its text, and of what users called its units.

assets/data/groups.js   the tables `groups`, `group_layers` and `damage`
assets/data/groups/     one file per group: its neurons, those that were chosen for it first
assets/data/labels.js   names and notes of users; written again whenever one is set
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from microtome.files import atomic
from microtome.view._page_data import encode, literal, script

TABLES = ("groups", "group_layers", "damage")
MOST = 1000
"""Neurons that the page of a group lists."""
OTHERS = 100
"""Neurons that it lists besides those that were chosen for the group: which fire more there than elsewhere."""

DIGITS = 6
NEURON_DIGITS = 4
OF_GROUP = ("group_firing", "group_firing_elsewhere", "group_effect", "group_effect_elsewhere", "group_ap")
"""Columns of the neurons with a value a group."""


def write_groups(data: Path, tables: Mapping[str, pa.Table], neurons: pa.Table) -> None:
    """Write what the pages of groups show.

    Args:
        data: the folder of data files.
        tables: those of the atlas; what is not there is null.
        neurons: the table of neurons, of which columns hold lists of one value a group where groups were compared.
    """
    parts = {name: encode(tables[name], DIGITS) if name in tables else "null" for name in TABLES}
    _save(data, "groups", "{" + ",\n".join(f"{literal(name)}:{value}" for name, value in parts.items()) + "}")
    if "groups" not in tables or "group_selected" not in neurons.column_names:
        return
    (data / "groups").mkdir(exist_ok=True)
    for number in range(tables["groups"].num_rows):
        _save(data, f"groups/{number}", encode(neurons_of(neurons, number), NEURON_DIGITS))


def neurons_of(neurons: pa.Table, number: int) -> pa.Table:
    """The neurons of one group: those that were chosen for it, lowest entropy first, and some others."""
    of = {name: _place(neurons, name, number) for name in ("group_selected", *OF_GROUP) if name in neurons.column_names}
    chosen, more = of["group_selected"] == 1, of["group_firing"] - of["group_firing_elsewhere"]
    lape = np.asarray(neurons.column("lape").to_numpy(), dtype=np.float64)
    if not np.isfinite(of["group_selected"]).any():
        return neurons.slice(0, 0).select(["layer", "neuron", "lape"])
    first = np.flatnonzero(chosen)[np.argsort(lape[chosen], kind="stable")][:MOST]
    others = np.flatnonzero(~chosen & np.isfinite(more))
    rows = np.concatenate([first, others[np.argsort(-more[others], kind="stable")][:OTHERS]])
    kept = neurons.select([n for n in ("layer", "neuron", "lape") if n in neurons.column_names]).take(pa.array(rows))
    kept = kept.append_column("rank", pa.array(np.arange(1, len(rows) + 1, dtype=np.int32)))
    kept = kept.append_column("chosen", pa.array(chosen[rows]))
    for name in OF_GROUP:
        kept = kept.append_column(name, pa.array(of[name][rows]))
    return kept


def write_labels(folder: Path, labels: Mapping[str, Mapping[str, str]]) -> Path:
    """Write what a user called units of the model for the pages of an atlas; it is no part of what was measured.

    Args:
        folder: of the atlas, which may stand finished: its pages have the old file or the new one.
        labels: by site, a label and a note.

    Raises:
        OutputError: the file cannot be written.
    """
    told = {site: {key: of.get(key, "") for key in ("label", "note")} for site, of in labels.items()}
    place = folder / "assets" / "data" / "labels.js"
    with atomic(place, "the labels to") as partial:
        partial.write_text(script("labels", literal(told)), encoding="ascii")
    return place


def _place(neurons: pa.Table, name: str, number: int) -> np.ndarray:
    """The values of one group of a column of lists."""
    lists = neurons.column(name).combine_chunks()
    every = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
    return every.reshape(len(neurons), -1)[:, number]


def _save(data: Path, name: str, value: str) -> None:
    (data / f"{name}.js").write_text(script(name, value), encoding="ascii")
