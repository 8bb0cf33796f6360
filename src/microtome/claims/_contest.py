"""One contest: scores of a method beside the truth of the same cells.

Formula:  rank correlation = Spearman's of |score| and |effect| over the cells; recall = share of the k cells of the
          largest |effect| that are among the k of the largest |score|; cost = floating-point operations of the method
          over those of one forward of the same prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
Cells = Float[ndarray, " cell"]


@dataclass(frozen=True)
class Outcome:
    """How well scores agree with exact effects.

    Attributes:
        rank_correlation: of sizes, over all cells that were measured.
        recall: of the largest effects among the largest scores.
        random: the recall of scores in a random order.
    """

    rank_correlation: float
    recall: float
    random: float


def contest(scores: Cells, effects: Cells, k: int) -> Outcome:
    """Scores of cells beside their exact effects; cells where either is NaN are none."""
    there = np.isfinite(scores) & np.isfinite(effects)
    mine, true = np.abs(scores[there]), np.abs(effects[there])
    k = min(k, len(true))
    if not k:
        return Outcome(float("nan"), float("nan"), float("nan"))
    best, wanted = set(top(mine, k).tolist()), set(top(true, k).tolist())
    constant = len(true) < 2 or np.ptp(mine) == 0 or np.ptp(true) == 0
    ranked: Any = None if constant else spearmanr(mine, true)
    return Outcome(float("nan") if constant else float(ranked.statistic), len(best & wanted) / k, k / len(true))


def top(sizes: Cells, k: int) -> Int[ndarray, " k"]:
    """The places of the k largest, of equals the first."""
    return np.argsort(-sizes, kind="stable")[:k]


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What work gives, and its seconds."""
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def operations(work: Callable[[], T]) -> tuple[T, int]:
    """What work gives, and its floating-point operations, forward and backward, as PyTorch counts them: products."""
    with FlopCounterMode(display=False) as counter:
        found = work()
    return found, counter.get_total_flops()
