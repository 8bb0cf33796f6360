"""Statistics of means over examples: how far one could move with other examples, and whether it differs from 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

_ENUMERATED = 12
"""Up to this many examples, all sign vectors are enumerated."""

_RESAMPLED = 2**22
"""Values of all samples together that one batch of resamples may hold."""


def mean_interval(
    values: Tensor, *, weights: Tensor | None = None, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over examples with a percentile bootstrap interval.

    Formula:  quantiles (1 - level)/2 and (1 + level)/2 of mean(values[resample]), examples drawn with replacement;
              with weights, where values are sums over as much as the weights say, of sum(values) / sum(weights).
    Source:   Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979; SciPy's `bootstrap`. Departs: none.
    Cost:     draws x values, in float64 on the CPU.
    Check:    covers the true mean of normal samples at the stated level; tests/unit/test_tasks_score.py.

    Args:
        values: [example, ...].
        weights: [example] how much each example counts; its value is then a sum over that much.
        level: coverage of the interval.
        draws: number of resamples.
        seed: of the resampling.

    Returns:
        Mean, low and high, each [...], float64, on the device of `values`. With one example, low and high are NaN.
    """
    flat = values.double().reshape(values.shape[0], values.shape[1:].numel())
    n = flat.shape[0]
    weight = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    weight = weight.to(flat.device).unsqueeze(1)
    mean = flat.sum(0) / weight.sum()
    if n < 2:
        nothing = torch.full_like(mean, torch.nan)
        return mean.reshape(values.shape[1:]), nothing.reshape(values.shape[1:]), nothing.reshape(values.shape[1:])
    low, high = _percentile_interval(_ratio, [flat, weight.expand_as(flat)], level, draws, seed)
    shape = values.shape[1:]
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape)


def _ratio(x: Float[ndarray, ...], weight: Float[ndarray, ...], axis: int) -> Float[ndarray, ...]:
    return x.sum(axis=axis) / weight.sum(axis=axis)


def _percentile_interval(
    statistic: Callable[..., Any], samples: list[Tensor], level: float, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Low and high [unit] of a statistic of samples [example, unit], of which the same examples are drawn together.

    Resamples of which the statistic is NaN are left out.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    arrays = [x.detach().cpu().numpy() for x in samples]
    batch = max(1, _RESAMPLED // sum(x.size for x in arrays))
    options: dict[str, Any] = {"n_resamples": draws, "confidence_level": level, "method": "percentile", "rng": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of an interval that is NaN, as ours may be
        found: Any = bootstrap(arrays, statistic, paired=True, axis=0, vectorized=True, batch=batch, **options)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(torch.from_numpy(found.bootstrap_distribution), edges, dim=-1)
    return low.to(samples[0].device), high.to(samples[0].device)


def sign_flip(values: Tensor, *, draws: int = 10000, seed: int = 0) -> Tensor:
    """Two-sided p-value of the mean under random signs of the examples.

    Formula:  p = share of sign vectors s with |mean(s x)| >= |mean(x)|, over all 2^n of them where n <= 12; else
              p = (1 + those among `draws` random ones) / (1 + draws).
    Source:   Fisher, "The Design of Experiments", 1935, section 21; the added 1 after Phipson and Smyth, "Permutation
              P-values Should Never Be Zero", 2010. Departs: none. SciPy's `permutation_test` gives the same p-values;
              it copies the values for every sign vector, which takes some ten times as long for [16, 1560] values.
    Cost:     min(2^n, draws) x values, as one matrix product in float64.
    Check:    P(p <= a) <= a on symmetric data, for every a; equal to SciPy's where enumerated;
              tests/laws/test_statistics.py.

    Args:
        values: [example, ...], such as one effect an example; independent, and symmetric about 0 under the null.
        draws: number of random sign vectors, where there are more than 12 examples.
        seed: of the signs.

    Returns:
        p [...], float64, above 0 and at most 1. With n examples it is at least 2 / 2^n: NaN for fewer than two.
    """
    shape, n = values.shape[1:], values.shape[0]
    flat = values.double().reshape(n, -1)
    if n < 2:
        return torch.full(shape, torch.nan, dtype=torch.float64)
    if n <= _ENUMERATED:
        bits = torch.arange(2**n).unsqueeze(1) >> torch.arange(n) & 1
    else:
        bits = torch.randint(2, (draws, n), generator=torch.Generator().manual_seed(seed))
    signs = (2 * bits - 1).double().to(flat.device)
    size = flat.sum(0).abs()
    as_large = (signs @ flat).abs() >= size - 1e-9 * flat.abs().sum(0)  # equal up to the order of summing
    hits = as_large.double().sum(0)
    p = hits / len(bits) if n <= _ENUMERATED else (hits + 1) / (draws + 1)
    p = torch.where(flat.isnan().any(0), torch.nan, p)
    return p.reshape(shape)


def slope_interval(
    x: Tensor, y: Tensor, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope of y on x over examples, by least squares with an intercept, with a percentile bootstrap interval.

    Formula:  slope = cov(x, y) / var(x), over pairs drawn with replacement; resamples in which x is constant are left
              out.
    Source:   Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 9 (pairs); SciPy's `bootstrap`.
              Departs: none.
    Cost:     draws x values, in float64 on the CPU.
    Check:    exact on a line, covers the slope of noisy lines; tests/laws/test_statistics.py.

    Args:
        x: [example, ...].
        y: [example, ...].
        level: coverage of the interval.
        draws: number of resamples.
        seed: of the resampling.

    Returns:
        Slope, low and high, each [...], float64; NaN with fewer than three examples, or where x is constant.
    """
    shape, n = x.shape[1:], x.shape[0]
    a, b = (v.double().reshape(n, -1) for v in (x, y))
    if n < 3:
        nothing = torch.full(shape, torch.nan, dtype=torch.float64)
        return nothing, nothing.clone(), nothing.clone()
    slope = torch.from_numpy(_slope(a.detach().cpu().numpy(), b.detach().cpu().numpy(), axis=0)).to(a.device)
    low, high = _percentile_interval(_slope, [a, b], level, draws, seed)
    return slope.reshape(shape), low.reshape(shape), high.reshape(shape)


def _slope(x: Float[ndarray, ...], y: Float[ndarray, ...], axis: int) -> Float[ndarray, ...]:
    a, b = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    spread = (a * a).sum(axis=axis)
    varies = spread > 1e-24 * (x * x).sum(axis=axis)
    return np.where(varies, (a * b).sum(axis=axis) / np.where(varies, spread, 1.0), np.nan)
