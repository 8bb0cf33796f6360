"""Minimum description length: how many bits the labels take, given the states, by the online code.

Formula:  rows are sent in portions, up to .1 .2 .4 .8 1.6 3.2 6.25 12.5 25 50 100 % of them; the first with the uniform
          code, log2 K bits a row, each other with the probabilities of probes fitted on all portions before it:
          bits = n_1 log2 K - sum over later rows of log2 p(label | states, earlier rows).
          p is a mixture of the uniform distribution and of logistic regressions with l2 of 3, 30, 300 and 3,000 on
          standardised units. A part's weight for a portion is 1/5 at first, and later 0.8 times what the portions
          before leave it (its share of their probability) plus 0.2/5: what is best may change as rows are added.
Law:      bits <= uniform + log2 5 - 10 log2 0.84, less than 5 more, whatever the labels; labels at random take the
          uniform code; scaling the states changes nothing.
Source:   Voita and Titov, "Information-Theoretic Probing with Minimum Description Length", 2020 (arXiv 2003.12298).
          Departs: groups stay whole, so that portions end with a group; the strength of the prior is mixed over and not
          chosen on rows held out, so that all rows are coded.
Check:    tests/laws/test_probes.py.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from microtome.probes._readers import linear

PORTIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25.0, 50.0, 100.0)
"""Percent of the rows that each portion ends with."""
STRENGTHS = (3.0, 30.0, 300.0, 3_000.0)
SHARED = 0.2
"""The part of the weights that is dealt evenly after each portion (fixed share: Herbster and Warmuth, 1998)."""


def portions(groups: np.ndarray, seed: int) -> tuple[np.ndarray, list[int]]:
    """The order in which rows are sent, and where each portion ends; groups are whole."""
    order = np.random.default_rng((seed, 3)).permutation(int(groups.max()) + 1)
    members = [np.flatnonzero(groups == group) for group in order]
    ends_of_groups = np.cumsum([len(rows) for rows in members])
    n = len(groups)
    ends = [int(ends_of_groups[np.searchsorted(ends_of_groups, math.ceil(n * p / 100))]) for p in PORTIONS]
    return np.concatenate(members), sorted(set(ends))


def code_length(x: Tensor, y: np.ndarray, n: int, order: np.ndarray, ends: list[int]) -> float:
    """Bits of labels [row], of n classes, given states [row, width], float64."""
    rows = torch.from_numpy(order)
    x, labels = x[rows], torch.from_numpy(y[order])
    total = ends[0] * math.log2(n)
    parts = 1 + len(STRENGTHS)
    weights = torch.full((parts,), 1 / parts, dtype=torch.float64)
    for first, end in itertools.pairwise(ends):
        each = [torch.full((end - first,), -math.log2(n), dtype=torch.float64)]
        for l2 in STRENGTHS:
            logits = linear(l2)(x[:first], y[order[:first]], n).logits(x[first:end])
            log_p = logits.log_softmax(-1).gather(1, labels[first:end, None])[:, 0]
            each.append(log_p / math.log(2))
        sums = torch.stack(each).sum(1)  # log2 of what each gives the portion
        given = torch.logsumexp(weights.log() + sums * math.log(2), 0)
        weights = (weights.log() + sums * math.log(2) - given).exp()
        weights = (1 - SHARED) * weights + SHARED / parts
        total -= float(given) / math.log(2)
    return total
