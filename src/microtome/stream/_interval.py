"""Statistics of means over examples: how far one could move with other examples, and whether it differs from 0."""

from __future__ import annotations

import torch
from torch import Tensor

_ENUMERATED = 12
"""Up to so many examples all sign vectors are tried."""


def mean_interval(
    values: Tensor, *, weights: Tensor | None = None, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over examples with a percentile bootstrap interval.

    Formula:  quantiles (1 - level)/2 and (1 + level)/2 of mean(values[resample]), examples drawn with replacement;
              with weights, where values are sums over as much as the weights say, of sum(values) / sum(weights).
    Source:   Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979. Departs: none.
    Cost:     draws x values, as one matrix product in float64.
    Check:    covers the true mean of normal samples at the stated level; tests/unit/test_tasks_score.py.

    Args:
        values: [example, ...].
        weights: [example] how much each example counts; its value is then a sum over that much.
        level: coverage.
        draws: how many resamples.
        seed: of the resampling.

    Returns:
        Mean, low and high, each [...], float64. With one example, low and high are NaN: nothing is known.
    """
    flat = values.double().reshape(values.shape[0], values.shape[1:].numel())
    n = flat.shape[0]
    weight = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    weight = weight.to(flat.device).unsqueeze(1)
    mean = flat.sum(0) / weight.sum()
    if n < 2:
        nothing = torch.full_like(mean, torch.nan)
        return mean.reshape(values.shape[1:]), nothing.reshape(values.shape[1:]), nothing.reshape(values.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(draws, n, dtype=torch.float64)
    )
    counts = counts.to(flat.device)
    means = (counts @ flat) / (counts @ weight)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=flat.device)
    low, high = torch.quantile(means, edges, dim=0)
    shape = values.shape[1:]
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape)


def sign_flip(values: Tensor, *, draws: int = 10000, seed: int = 0) -> Tensor:
    """How likely so large a mean is if each example's sign were a coin's: a two-sided p-value.

    Formula:  p = share of sign vectors s with |mean(s x)| >= |mean(x)|, over all 2^n of them where n <= 12; else
              p = (1 + those among `draws` random ones) / (1 + draws).
    Source:   Fisher, "The Design of Experiments", 1935, section 21; the added 1 after Phipson and Smyth, "Permutation
              P-values Should Never Be Zero", 2010. Departs: none.
    Cost:     min(2^n, draws) x values, as one matrix product in float64.
    Check:    P(p <= a) <= a on symmetric data, for every a; exact where enumerated; tests/laws/test_statistics.py.

    Args:
        values: [example, ...], such as one effect an example; independent, and symmetric about 0 if there is none.
        draws: how many random sign vectors, where there are more than 12 examples.
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
    as_large = (signs @ flat).abs() >= size - 1e-9 * flat.abs().sum(0)  # equal but for the order of summing
    hits = as_large.double().sum(0)
    p = hits / len(bits) if n <= _ENUMERATED else (hits + 1) / (draws + 1)
    p = torch.where(flat.isnan().any(0), torch.nan, p)
    return p.reshape(shape)


def slope_interval(
    x: Tensor, y: Tensor, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope of y on x over examples, by least squares with an intercept, with a percentile bootstrap interval.

    Formula:  slope = (mean xy - mean x mean y) / (mean xx - mean x mean x), over examples drawn with replacement.
    Source:   Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 9 (pairs). Departs: none.
    Cost:     draws x values, as one matrix product in float64.
    Check:    exact on a line, covers the slope of noisy lines; tests/laws/test_statistics.py.

    Args:
        x: [example, ...].
        y: [example, ...].
        level: coverage.
        draws: how many resamples.
        seed: of the resampling.

    Returns:
        Slope, low and high, each [...], float64; NaN with fewer than three examples, or where x does not vary.
    """
    shape, n = x.shape[1:], x.shape[0]
    a, b = (v.double().reshape(n, -1) for v in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    if n < 3:
        nothing = torch.full(shape, torch.nan, dtype=torch.float64)
        return nothing, nothing.clone(), nothing.clone()
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(draws, n, dtype=torch.float64)
    shares = torch.cat([ones[:1], torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, picks, ones)]) / n
    shares = shares.to(a.device)
    spread = shares @ (a * a) - (shares @ a) ** 2
    slopes = (shares @ (a * b) - (shares @ a) * (shares @ b)) / spread
    slopes = torch.where(spread > 1e-12 * (a * a).mean(0), slopes, torch.nan)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=a.device)
    low, high = torch.nanquantile(slopes[1:], edges, dim=0)
    return slopes[0].reshape(shape), low.reshape(shape), high.reshape(shape)
