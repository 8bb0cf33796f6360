"""Folds by group: which rows a probe is tested on that it has not seen, nor anything of their group.

Formula:  rows of one group are in one fold; classes are as even over folds as groups allow.
          A score is the mean over rows; its interval is over groups, of which each has the sum of its rows' scores
          (`microtome.stream.mean_interval` with the numbers of rows as weights; of shares `_problem.with_shares`), and
          sqrt(1 + (K - 1)/K) times as wide, with K folds: two rows of different folds each help to fit the probe that
          tests the other, and at chance they are right or wrong together, so that variances of the mean add
          up to that of pairs again.
Check:    the interval holds the accuracy of such probes in at least 93 % of draws, at chance and above it;
          tests/laws/test_probes.py. Without the factor it was 84 to 97 %.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.errors import DataError, error

Keys = Sequence[tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Folds:
    """A partition of rows for cross-validation.

    Attributes:
        groups: [row] the number of each row's group, from 0.
        fold: [row] the number of the fold that it is tested in.
        named: whether the groups were given, or are rows that are the same.
    """

    groups: np.ndarray
    fold: np.ndarray
    named: bool

    def __len__(self) -> int:
        return int(self.fold.max()) + 1

    @property
    def spread(self) -> float:
        """How much wider intervals are than those of independent scores; see above."""
        return (1 + (len(self) - 1) / len(self)) ** 0.5

    @property
    def sizes(self) -> Tensor:
        """[group] how many rows each group has."""
        return torch.from_numpy(np.bincount(self.groups)).double()

    def split(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows to fit on and rows to test on, a pair a fold."""
        return [(np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)) for k in range(len(self))]

    def summed(self, values: Float[Tensor, "*of row"]) -> Float[Tensor, " group *of"]:
        """The sum over each group's rows of values [..., row], with the groups first."""
        rows = values.double().movedim(-1, 0)
        out = rows.new_zeros((int(self.groups.max()) + 1, *rows.shape[1:]))
        return out.index_add_(0, torch.from_numpy(self.groups), rows)


def groups_of(keys: Keys, groups: Sequence[str] | None, where: Sequence[str]) -> np.ndarray:
    """[row] the number of each row's group; without names, rows that are the same are one group.

    Raises:
        DataError: rows that are the same up to where they are probed stand in different groups.
    """
    if groups is None:
        numbers: dict[Any, int] = {}
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    first: dict[Any, int] = {}
    for i, key in enumerate(keys):
        other = first.setdefault(key, i)
        if groups[other] != groups[i]:
            what = f"groups leak: {where[other]} and {where[i]} are the same up to where they are probed"
            got = f'groups "{groups[other]}" and "{groups[i]}"'
            raise error(DataError, what, got=got, do="give equal rows one group, or leave the groups out")
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    return np.array([names[name] for name in groups])


def folds_of(groups: np.ndarray, labels: np.ndarray | None, folds: int, seed: int, *, named: bool) -> Folds:
    """Folds by group; of classes, as even over folds as they can be.

    Args:
        groups: [row] numbers of groups.
        labels: [row] numbers of classes; None for signals.
        folds: how many.
        seed: of the order in which equal choices are made.
        named: whether the groups were given.

    Raises:
        DataError: there are fewer groups than folds, or a class that no fold can both fit and test.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    count = int(groups.max()) + 1
    if count < folds:
        kind = "groups" if named else "rows that differ"
        do = "give more examples, or fewer folds"
        raise error(DataError, f"too few {kind} for {folds} folds", got=count, allowed=f"{folds} or more", do=do)
    if labels is not None and (most := int(np.bincount(labels).max())) < folds:
        do = "give more examples, or fewer folds"
        raise error(
            DataError, f"too few rows of each class for {folds} folds", got=most, allowed=f"{folds} or more", do=do
        )
    rows, fold = np.zeros((len(groups), 1)), np.zeros(len(groups), dtype=np.int64)
    if labels is None:
        splits = GroupKFold(folds).split(rows, groups=groups)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few rows of a class: said below, where it matters
            splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(rows, labels, groups))
    for number, (_, test) in enumerate(splits):
        fold[test] = number
    return Folds(groups, fold, named)


def require_classes(labels: np.ndarray, classes: Sequence[str], groups: np.ndarray, folds: Folds | None = None) -> None:
    """Refuse labels of which no probe can be fitted and tested.

    Raises:
        DataError: there is one class, one of the classes is of one group alone, or is in no row of a fit.
    """
    if len(classes) < 2:
        got = f'"{classes[0]}" alone' if classes else "none"
        raise error(DataError, "labels of one class: nothing can be told apart", got=got, do="give two classes or more")
    for number, name in enumerate(classes):
        count = len(set(groups[labels == number].tolist()))
        if count < 2:
            what = f'the class "{name}" is in one group alone, so it cannot be fitted and tested'
            raise error(
                DataError, what, got=f"{int((labels == number).sum())} rows", do="give more rows, or leave it out"
            )
    if folds is None:
        return
    for fit, test in folds.split():
        if lacks := set(range(len(classes))) - set(labels[fit].tolist()):
            name = classes[min(lacks)]
            what = f'too few groups for {len(folds)} folds: a fold leaves no row of the class "{name}" to fit'
            raise error(DataError, what, got=f"{len(test)} rows tested", do="give more groups, or other folds")


def numbered(labels: Sequence[str]) -> tuple[Int[np.ndarray, " row"], tuple[str, ...]]:
    """[row] numbers of classes, and the classes in order of their names."""
    classes = tuple(sorted(set(labels)))
    at = {name: number for number, name in enumerate(classes)}
    return np.array([at[label] for label in labels]), classes


def shuffled(labels: np.ndarray, types: Sequence[Any], seed: int) -> np.ndarray:
    """Labels of the control task: each type has one, at random, in the proportions that the labels have.

    Source:   Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks", 2019 (arXiv 1909.03368).
              Departs: labels are dealt in their proportions, not drawn, so that every class is there.

    Raises:
        DataError: there is one type alone.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(types))}
    if len(names) < 2:
        what = "the control task needs types: one label for each word or text, at random"
        raise error(DataError, what, got="one type alone", do="name a type for each row, or leave the column out")
    dealt = np.sort(labels)[((np.arange(len(names)) + 0.5) * len(labels) / len(names)).astype(np.int64)]
    dealt = np.random.default_rng((seed, 1)).permutation(dealt)
    if len(set(dealt.tolist())) < 2:  # one class is so rare that it is dealt to none
        rare = Counter(labels.tolist()).most_common()[-1][0]
        dealt[int(np.random.default_rng((seed, 2)).integers(len(dealt)))] = rare
    return np.array([dealt[names[name]] for name in types])
