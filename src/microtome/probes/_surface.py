"""What is decoded without a model: the majority class, and words and letters counted."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FEATURES = 2**15
LETTERS = (3, 4)
"""Lengths of the runs of letters that are counted."""


def surface(prefixes: Sequence[tuple[int, ...]], texts: Sequence[str] | None) -> object:
    """[row, feature] hashed counts: tokens, neighbouring pairs, the last token, and runs of 3 and 4 letters.

    Args:
        prefixes: the tokens of each row up to where it is probed.
        texts: the same as text; None where there is no tokenizer.
    """
    from sklearn.feature_extraction import FeatureHasher

    rows: list[list[str]] = []
    for i, ids in enumerate(prefixes):
        found = [f"t{token}" for token in ids] + [f"p{a},{b}" for a, b in itertools.pairwise(ids)]
        found.append(f"last{ids[-1]}")
        if texts is not None:
            text = f" {texts[i].lower()} "
            found += [f"l{text[j : j + n]}" for n in LETTERS for j in range(len(text) - n + 1)]
        rows.append(found)
    return FeatureHasher(FEATURES, input_type="string").transform(rows)


def surface_predictions(features: object, y: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """[row] the class that a logistic regression on counts names, each row held out."""
    from typing import Any

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    x: Any = normalize(features)
    found = np.zeros(len(y), dtype=np.int64)
    for fit, test in splits:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found[test] = LogisticRegression(C=10.0, max_iter=200).fit(x[fit], y[fit]).predict(x[test])
    return torch.from_numpy(found)


def majority_predictions(y: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """[row] the class that most rows of the other folds have."""
    found = np.zeros(len(y), dtype=np.int64)
    for fit, test in splits:
        found[test] = np.bincount(y[fit]).argmax()
    return torch.from_numpy(found)
