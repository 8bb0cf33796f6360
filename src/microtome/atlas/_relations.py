"""The table `relations` of an atlas: one row per relation and head, of what heads compute by their weights.

It holds what the measure `head_functions` gives, as rows and not as columns, so that `WHERE relation = 'capital'` asks
for one relation and `GROUP BY relation` for all of them. Every head has its row: heads are few.

Check: tests/laws/test_atlas_groups.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from microtome.atlas._tables import KEYS, table_of
from microtome.measurements import relation_pairs
from microtome.model import Model

COLUMNS = {
    "maps": ("maps_{}", "share of the pairs whose target is among the largest logits that the head would add"),
    "maps_shuffled": ("maps_{}_shuffled", "the same for targets of other pairs"),
    "suppress": ("suppress_{}", "share of the pairs whose target is among the smallest logits that the head would add"),
    "suppress_shuffled": ("suppress_{}_shuffled", "the same for targets of other pairs"),
}
"""The columns, with those of the heads that they are from."""

SUCCESSOR = {"maps": "successor", "maps_shuffled": "successor_shuffled"}
"""The columns of the heads of the one relation that has others; what it suppresses is not measured."""


def relations_table(heads: pa.Table, pairs: dict[str, list[tuple[str, str]]]) -> pa.Table | None:
    """The table, or None where the heads were not measured for it.

    Args:
        heads: the table of heads.
        pairs: by relation, the pairs that were tried.
    """
    names = [name for name in pairs if _source(name, "maps") in heads.column_names]
    if not names:
        return None
    n = len(heads)
    columns: dict[str, Any] = {"relation": np.repeat(np.array(names, dtype=object), n)}
    for key in ("layer", "head"):
        columns[key] = np.tile(heads.column(key).to_numpy().astype(np.int32), len(names))
    columns["pairs"] = np.repeat(np.array([len(pairs[name]) for name in names], dtype=np.int32), n)
    attrs: dict[str, dict[str, Any]] = {key: {"unit": "1", "meaning": KEYS.get(key, "")} for key in columns}
    attrs["pairs"] = {"unit": "pairs", "meaning": "pairs of words of the relation that were tried"}
    for column, (_, meaning) in COLUMNS.items():
        control = f"{column}_shuffled" if f"{column}_shuffled" in COLUMNS else ""
        columns[column] = np.concatenate([_values(heads, _source(name, column)) for name in names])
        attrs[column] = {"unit": "share", "meaning": meaning, "control": control, "range": [0, 1]}
    return table_of(columns, attrs)


def _source(relation: str, column: str) -> str:
    """The column of the heads that a column is from; an empty name where there is none."""
    return SUCCESSOR.get(column, "") if relation == "successor" else COLUMNS[column][0].format(relation)


def _values(heads: pa.Table, name: str) -> np.ndarray:
    if name not in heads.column_names:
        return np.full(len(heads), np.nan, dtype=np.float32)
    return heads.column(name).to_numpy().astype(np.float32)


def pairs_of(model: Model) -> dict[str, list[tuple[str, str]]]:
    """By relation, the pairs that `head_functions` tries on a model, as words."""
    found = relation_pairs(model)
    words = model.to_words([token for pairs in found.values() for pair in pairs for token in pair])
    at = iter(words)
    return {name: [(next(at), next(at)) for _ in pairs] for name, pairs in found.items()}
