"""Attention patterns of short passages as data files: one file per layer, which the pages of its heads load.

A weight w in [0, 1] is stored as the byte round(255 w), and so known to within 0.2 %. The bytes of a layer stand in the
order [passage][head, query, key], as base64.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import DataError, error
from microtome.shown import shown
from microtome.view._page_data import literal, script

LEVELS = 255
"""The byte of a weight of 1."""


@shown
@dataclass(frozen=True)
class Passage:
    """A short text whose attention patterns are shown.

    Attributes:
        title, meaning: what it is called, and what there is to see in it.
        tokens: its tokens, as words.
    """

    title: str
    meaning: str
    tokens: tuple[str, ...]


@shown
@dataclass(frozen=True, eq=False)
class Patterns:
    """What every head attends to in some passages.

    Attributes:
        passages: that were read.
        layers: by layer, for each passage the weights [head, query, key].
        missing: by layer without patterns, why.
    """

    passages: tuple[Passage, ...]
    layers: Mapping[int, Sequence[np.ndarray]]
    missing: Mapping[int, str]


def write_patterns(data: Path, patterns: Patterns | None) -> str:
    """Write the patterns of each layer into the folder of the data files, and return what the first page needs to know.

    Raises:
        DataError: a pattern has not one weight for every two tokens of its passage.
        OSError: the folder cannot be written.
    """
    if patterns is None:
        return "null"
    if patterns.layers:
        (data / "patterns").mkdir(parents=True, exist_ok=True)
    for layer, found in patterns.layers.items():
        for passage, weights in zip(patterns.passages, found, strict=True):
            n = len(passage.tokens)
            if weights.shape[1:] != (n, n):
                what = f"the patterns of layer {layer} do not fit their passage"
                raise error(DataError, what, got=str(weights.shape), allowed=f"[head, {n}, {n}]")
        texts = [base64.b64encode(quantised(weights).tobytes()).decode("ascii") for weights in found]
        name = f"patterns/{layer}"
        (data / f"{name}.js").write_text(script(name, literal(texts)), encoding="ascii")
    told: dict[str, Any] = {
        "passages": [{"title": p.title, "meaning": p.meaning, "tokens": p.tokens} for p in patterns.passages],
        "heads": {layer: found[0].shape[0] for layer, found in patterns.layers.items() if len(found)},
        "missing": dict(patterns.missing),
    }
    return literal(told)


def quantised(weights: np.ndarray) -> np.ndarray:
    """Weights in [0, 1] as bytes; a weight that is no number is 0."""
    return np.rint(np.clip(np.nan_to_num(weights), 0, 1) * LEVELS).astype(np.uint8)
