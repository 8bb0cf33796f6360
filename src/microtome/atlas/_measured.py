"""The tables and the manifest of an atlas: what its measures give, put in place of what was there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from microtome.atlas._groups import (
    DAMAGE,
    GROUPED,
    damage_table,
    group_tables,
    kept_by_group,
    least_of,
    placed,
    whole_lists,
    with_counts,
    with_names,
)
from microtome.atlas._manifest import manifest_of, peak_memory
from microtome.atlas._relations import pairs_of, relations_table
from microtome.atlas._tables import joined_columns, tables
from microtome.atlas._texts import Reading
from microtome.method.runner import Measured, run_measures
from microtome.model import Model

OF_RELATIONS = "head_functions"
"""The measure whose pairs of words the table `relations` counts."""

OF_DAMAGE = {
    "question": "How much does each group of the text need the neurons that were chosen for each?",
    "source": "Tang et al., Language-Specific Neurons, 2024, arXiv 2402.16438",
    "check": "tests/laws/test_damage.py",
    "looked_at": "text, 8 rows of each group, at most 128 tokens of each",
}
"""What the manifest says of the damage matrix, which is no measure."""


def measured_atlas(
    model: Model,
    reading: Reading,
    chosen: Sequence[str],
    options: Mapping[str, Any],
    old: Mapping[str, pa.Table] | None = None,
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The tables of an atlas and its manifest.

    Args:
        model: an open model.
        reading: the text.
        chosen: the measures, and "damage".
        options: arguments of measures.
        old: the tables of the atlas to which these measures are added.
    """
    started = time.perf_counter()
    before = {} if old is None else dict(old)
    names = _measures(chosen, before)
    least = least_of(options)
    measured = Measured({}, {}, {}, {}, {})
    if names or not chosen:  # of no measure at all the runner says that one is needed
        kept = kept_by_group(model, names)
        measured = run_measures(model, names, text=reading.text, options=options, lenient=True, by_group=kept)
    found = [(m, placed(d, reading.groups)) for m, d in measured.datasets.items() if m.of != "model"]
    new = tables(model, found) | group_tables(reading, measured, least)
    made = {name: joined_columns(before.get(name), new.get(name)) for name in dict.fromkeys((*before, *new))}
    seconds = dict(measured.seconds)
    if "group_selected" in made["neurons"].column_names:
        made["neurons"] = with_names(whole_lists(made["neurons"], reading.groups), reading.groups)
        made["groups"] = with_counts(made["groups"], made["neurons"])
    why = ""
    if DAMAGE in chosen:
        since = time.perf_counter()
        made[DAMAGE], why = damage_table(model, reading, made["neurons"], least)
        seconds["switching neurons off"] = round(time.perf_counter() - since, 2)
    ran = {method.name for method in measured.datasets}
    pairs = pairs_of(model) if OF_RELATIONS in ran else {}  # drawn by the seed: else those tried before stand
    if (relations := relations_table(made["heads"], pairs)) is not None:
        made["relations"] = relations
    cost = {**seconds, "seconds": round(time.perf_counter() - started, 2), "peak_memory_bytes": peak_memory()}
    manifest = manifest_of(model, reading, measured, cost, made)
    if pairs:
        manifest["relations"] = {name: [list(pair) for pair in of] for name, of in pairs.items()}
    if DAMAGE in chosen:
        manifest["measures" if not why else "left_out"][DAMAGE] = why or dict(OF_DAMAGE)
    return made, manifest


def _measures(chosen: Sequence[str], before: Mapping[str, pa.Table]) -> list[str]:
    """The measures to run: the damage of sets of neurons needs the one that chooses them, unless that was done."""
    names = [name for name in dict.fromkeys(chosen) if name != DAMAGE]
    done = "neurons" in before and "group_selected" in before["neurons"].column_names
    return [*names, GROUPED] if DAMAGE in chosen and GROUPED not in names and not done else names
