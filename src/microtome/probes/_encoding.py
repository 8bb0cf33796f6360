"""Ridge regression from states to a signal from outside, such as a recording, with delays and a noise ceiling.

Formula:  y_t = sum over delays d of W_d x_{t-d} + b within each group, whose rows are in the order of time (0 before
          its first); the least of squared errors plus alpha |W|^2, alpha from 10^-2 .. 10^6 by leave-one-out error on
          the rows fitted on; states and signal standardised there.
          r = mean over rows held out of the product of prediction and signal, both standardised in each fold: the
          correlation, folds weighted by rows.
          ceiling: with R repetitions of the signal, r between their mean and what they share is sqrt(rho),
          rho = R m / (1 + (R - 1) m), m the mean correlation of two repetitions; nothing where there is one.
Source:   Antonello et al., "Scaling laws for language encoding models in fMRI", 2023 (arXiv 2305.11863). Departs:
          delays are in rows, and the ceiling is by Spearman and Brown.
Check:    tests/laws/test_probes.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.probes._folds import Folds

ALPHAS = tuple(10.0**k for k in range(-2, 7))


def delayed(x: Float[Tensor, "row width"], groups: np.ndarray, delays: Sequence[int]) -> Float[Tensor, "row wide"]:
    """[row, delays x width] each row's state and those before it in its group, zeros where there is none."""
    parts: list[Tensor] = []
    place, seen = np.zeros(len(groups), dtype=np.int64), dict[int, list[int]]()
    for row, group in enumerate(groups.tolist()):
        place[row] = len(seen.setdefault(group, []))
        seen[group].append(row)
    for delay in delays:
        before = [
            seen[g][p - delay] if p >= delay else -1 for g, p in zip(groups.tolist(), place.tolist(), strict=True)
        ]
        at = torch.tensor(before)
        parts.append(torch.where(at.unsqueeze(1) >= 0, x[at.clamp(min=0)], torch.zeros_like(x)))
    return torch.cat(parts, 1)


def ridge(x: Float[Tensor, "row wide"], y: Float[Tensor, " row"]) -> tuple[Float[Tensor, " wide"], float]:
    """Weights and offset of a ridge regression, in the units of both sides."""
    from sklearn.linear_model import RidgeCV

    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-9, scale, torch.ones_like(scale))
    level, spread = float(y.mean()), max(float(y.std(correction=0)), 1e-12)
    model = RidgeCV(alphas=ALPHAS, fit_intercept=False).fit(
        ((x - mean) / scale).numpy(), ((y - level) / spread).numpy()
    )
    weight = torch.from_numpy(np.asarray(model.coef_, dtype=np.float64)) * spread / scale
    return weight, level - float(weight @ mean)


def agreement(x: Float[Tensor, "row wide"], y: Float[Tensor, " row"], folds: Folds) -> Float[Tensor, " row"]:
    """[row] the product of prediction and signal, standardised in each fold: its mean is the correlation."""
    found = torch.zeros(len(y), dtype=torch.float64)
    for fit, test in folds.split():
        weight, bias = ridge(x[fit], y[fit])
        a, b = x[test] @ weight + bias, y[test]
        a, b = ((v - v.mean()) / v.std(correction=0).clamp(min=1e-12) for v in (a, b))
        found[test] = a * b
    return found


def noise_ceiling(signals: Float[Tensor, "row repeat"]) -> float:
    """The largest correlation that a prediction can have with the mean of repetitions; NaN where there is one alone."""
    n = signals.shape[1]
    if n < 2:
        return float("nan")
    correlations = torch.corrcoef(signals.T)
    m = float((correlations.sum() - n) / (n * (n - 1)))
    return max(0.0, n * m / (1 + (n - 1) * m)) ** 0.5


def turned(y: Float[Tensor, " row"], groups: np.ndarray, seed: int) -> Float[Tensor, " row"]:
    """The signal out of step with what it was recorded at: turned round by a random part of each group.

    Groups of fewer than 4 rows, which cannot be turned far, are shuffled together so that no row keeps its own; where
    they are fewer than 4 rows in all, with those of the shortest group that could be turned.
    """
    rng, found = np.random.default_rng((seed, 4)), y.clone()
    members = sorted((np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)), key=len)
    short: list[np.ndarray] = []
    while members and (len(members[0]) < 4 or 0 < sum(map(len, short)) < 4):
        short.append(members.pop(0))
    if short:
        rows = rng.permutation(np.concatenate(short))
        found[rows] = y[np.roll(rows, 1)]
    for rows in members:
        step = int(rng.integers(len(rows) // 4, max(len(rows) - len(rows) // 4, len(rows) // 4 + 1)))
        found[rows] = y[np.roll(rows, step)]
    return found
