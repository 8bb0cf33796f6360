"""Statistics of means over examples: how far one could move with other examples, and whether it differs from 0.

All intervals of means, of ratios of sums and of differences are one: Student's t of the jackknife's pseudo-values, of
which each example has one, corrected for their skewness. `benchmarks/coverage.py` measures how often they hold what
they promise; tests/laws/test_coverage.py refuses less than 93 % and more than 97.5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_ENUMERATED = 12
"""Up to this many examples, all sign vectors are enumerated."""

LEAST = 8
"""Examples below which there is no interval: with fewer, none was found that covers skewed and zero-inflated data."""

OF_MEANS = f"95 % Student's t over examples, corrected for skewness (Hall, 1992); none below {LEAST} examples"
OF_SLOPES = f"95 % Student's t with HC3 errors over examples (MacKinnon and White, 1985); none below {LEAST} examples"
OF_SHARES = "95 % Agresti-Coull interval over examples"


EVEN = 0.9
"""The share of n - 1 degrees of freedom from which on examples weigh much the same."""


@dataclass(frozen=True, eq=False)
class _Estimate:
    """An estimate over examples.

    Attributes:
        value: [unit].
        each: [example, unit] the pseudo-value of every example; their mean is the estimate without its bias.
        freedom: [unit], or [1] for all, degrees of freedom of their variance.
    """

    value: Float[Tensor, " unit"]
    each: Float[Tensor, "example unit"]
    freedom: Float[Tensor, " unit_or_one"]

    def minus(self, other: _Estimate) -> _Estimate:
        """The difference, example by example."""
        freedom = torch.minimum(self.freedom, other.freedom)
        return _Estimate(self.value - other.value, self.each - other.each, freedom)


def mean_interval(
    values: Tensor, *, weights: Tensor | None = None, level: float = 0.95
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over examples with its interval: Student's t, corrected for skewness.

    Formula:  mean = sum_e x_e / n;  s, g their standard deviation and skewness, both with the unbiased factors;
              ends: mean - s W(t), mean - s W(-t), with t = +-q / sqrt(n), q the quantile (1 + level)/2 of Student's t
              with n - 1 degrees of freedom, and W(t) = 3 ((1 + g (t - g / 6n))^(1/3) - 1) / g. Where g is 0 these are
              mean +- s q / sqrt(n). Where examples weigh much the same (at least 0.9 of the degrees of freedom) either
              end is the farther one of this and of g = 0: the skewness of few examples is badly known.
              With weights, where values are sums over as much as the weights say, mean = sum x_e / sum w_e; then x_e
              above is the pseudo-value n mean - (n - 1) (mean without e), and there are (sum w^2)^2 / sum w^4 - 1
              degrees of freedom, which is n - 1 where all weigh the same.
    Source:   Hall, "On the Removal of Skewness by Transformation", 1992, the cubic transformation; Miller, "The
              Jackknife: A Review", 1974; Satterthwaite, "An Approximate Distribution of Estimates of Variance
              Components", 1946. Departs: quantiles of t in place of the normal's, and the unbiased skewness, without
              either of which fewer than 93 % are covered below some 20 examples.
    Cost:     a few operations a value, in float64.
    Check:    covers 93 to 97.5 % on normal, skewed and zero-inflated data at every default number of examples, with
              equal and unequal weights; tests/laws/test_coverage.py, table in docs/statistics.md.

    Args:
        values: [example, ...].
        weights: [example], or [example, ...] like the values, how much each example counts; its value is then a sum
            over that much.
        level: coverage of the interval.

    Returns:
        Mean, low and high, each [...], float64, on the device of `values`. With fewer than 8 examples, or where
        nearly all the weight is that of one, low and high are NaN.
    """
    return _shaped(values, _estimate(values, weights), level)


def difference_interval(
    values: Tensor,
    control: Tensor,
    *,
    weights: Tensor | None = None,
    control_weights: Tensor | None = None,
    level: float = 0.95,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean minus the mean of a control over the same examples, with its interval.

    Formula:  as `mean_interval`, of the differences of the two pseudo-values of each example.
    Source:   as `mean_interval`. Departs: none.
    Cost:     twice that of `mean_interval`.
    Check:    equal to `mean_interval` of the differences where all weigh the same; tests/laws/test_statistics.py.

    Args:
        values: [example, ...].
        control: [example, ...], of the same examples in the same order.
        weights: as in `mean_interval`.
        control_weights: the same of the control.
        level: coverage of the interval.

    Returns:
        Difference, low and high, as `mean_interval`.
    """
    both = _estimate(values, weights).minus(_estimate(control, control_weights))
    return _shaped(values, both, level)


def slope_interval(x: Tensor, y: Tensor, *, level: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """Slope of y on x over examples, by least squares with an intercept, with its interval.

    Formula:  slope = cov(x, y) / var(x);  ends: slope +- q sqrt(sum_e (a_e r_e / (1 - h_e))^2) / sum_e a_e^2, with
              a = x - mean x, r the residuals, h = 1/n + a^2 / sum a^2, q the quantile (1 + level)/2 of Student's t with
              n - 2 degrees of freedom. Residuals may be larger where x is larger.
    Source:   MacKinnon and White, "Some Heteroskedasticity-Consistent Covariance Matrix Estimators with Improved Finite
              Sample Properties", 1985 (HC3). Departs: none.
    Cost:     a few operations a value, in float64.
    Check:    exact on a line; covers the slope of noisy lines; tests/laws/test_statistics.py, test_coverage.py.

    Args:
        x: [example, ...].
        y: [example, ...].
        level: coverage of the interval.

    Returns:
        Slope, low and high, each [...], float64; NaN where x is constant or differs in one example only, and with fewer
        than 8 examples (the slope itself with fewer than 3).
    """
    shape, n = x.shape[1:], x.shape[0]
    a, b = (v.double().reshape(n, shape.numel()) for v in (x, y))
    nothing = a.new_full((a.shape[1],), torch.nan)
    if n < 3:
        return nothing.reshape(shape), nothing.reshape(shape).clone(), nothing.reshape(shape).clone()
    a, b = a - a.mean(0), b - b.mean(0)
    spread = (a * a).sum(0)
    spread = torch.where(spread > 1e-24 * x.double().reshape(n, -1).square().sum(0), spread, nothing)
    slope = (a * b).sum(0) / spread
    rest = 1 - 1 / n - a * a / spread  # 1 - h
    half = (
        (a * (b - slope * a) / rest).square().sum(0).sqrt() / spread * _quantile(level, spread.new_full((1,), n - 2.0))
    )
    half = half if n >= LEAST else nothing
    half = torch.where(half.isfinite() & (rest > 1e-12).all(0), half, nothing)
    return slope.reshape(shape), (slope - half).reshape(shape), (slope + half).reshape(shape)


def share_interval(hits: float, n: float, *, level: float = 0.95) -> tuple[float, float]:
    """Ends of the interval of a share of successes. It has a width where all succeed, or none.

    Formula:  p +- z sqrt(p (1 - p) / m), cut to 0..1, with m = n + z^2, p = (hits + z^2 / 2) / m, z the quantile
              (1 + level)/2 of the normal distribution.
    Source:   Agresti and Coull, "Approximate Is Better than 'Exact' for Interval Estimation of Binomial Proportions",
              1998. Departs: none. Wilson's interval, which has the same middle, covers 84 % where the share is near 0
              or 1; this one at least 92 % at every share from 10 examples on, and 96 % on average over shares.
    Cost:     nothing.
    Check:    the exact coverage at every share; tests/laws/test_coverage.py.

    Args:
        hits: how many succeeded.
        n: of how many; both may be effective numbers.
        level: coverage of the interval.
    """
    z = _normal_quantile(level)
    m = n + z * z
    p = (hits + z * z / 2) / m
    half = z * (p * (1 - p) / m) ** 0.5
    return max(0.0, p - half), min(1.0, p + half)


def share_difference_interval(gained: int, lost: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Ends of the interval of the difference of two shares of successes of the same examples.

    Formula:  d +- z sqrt((b + c) / m - d^2) / sqrt(m), cut to -1..1, with b = gained + 1/2, c = lost + 1/2, m = n + 2,
              d = (b - c) / m, z the quantile (1 + level)/2 of the normal distribution.
    Source:   Agresti and Min, "Simple Improved Confidence Intervals for Comparing Matched Proportions", 2005.
              Departs: none.
    Cost:     nothing.
    Check:    the exact coverage over shares; tests/laws/test_coverage.py.

    Args:
        gained: how many examples succeeded in the first way only.
        lost: how many in the second way only.
        n: of how many.
        level: coverage of the interval.
    """
    z, m = _normal_quantile(level), n + 2
    b, c = gained + 0.5, lost + 0.5
    d = (b - c) / m
    half = z * (((b + c) / m - d * d) / m) ** 0.5
    return max(-1.0, d - half), min(1.0, d + half)


def _estimate(values: Tensor, weights: Tensor | None) -> _Estimate:
    n = values.shape[0]
    flat = values.double().reshape(n, values.shape[1:].numel())
    if weights is None:
        return _Estimate(flat.mean(0), flat, flat.new_full((1,), n - 1.0))
    w = weights.double().to(flat.device)
    w = w.unsqueeze(1) if w.dim() == 1 else w.reshape(flat.shape)
    total = w.sum(0)
    mean = flat.sum(0) / total
    each = mean + (n - 1) * (flat - mean * w) / (total - w)
    return _Estimate(mean, each, w.square().sum(0).square() / w.pow(4).sum(0) - 1)


def _shaped(values: Tensor, estimate: _Estimate, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """An estimate and the ends of its interval, with the axes of the values."""
    low, high = _ends(estimate, level)
    a, b, c = (x.reshape(values.shape[1:]) for x in (estimate.value, low, high))
    return a, b, c


def _ends(estimate: _Estimate, level: float) -> tuple[Tensor, Tensor]:
    """The ends of Student's t, corrected for skewness; see `mean_interval`."""
    n = estimate.each.shape[0]
    if n < LEAST:
        nothing = torch.full_like(estimate.value, torch.nan)
        return nothing, nothing.clone()
    d = estimate.each - estimate.each.mean(0)
    s = (d.square().sum(0) / (n - 1)).sqrt()
    skew = d.pow(3).sum(0) / s.pow(3) * (n / ((n - 1) * (n - 2)))
    skew = torch.where(s > 0, skew, 0.0)
    t = _quantile(level, estimate.freedom) / n**0.5

    def untransformed(at: Tensor) -> Tensor:
        """The w with w + g w^2 / 3 + g^2 w^3 / 27 + g / 6n = at."""
        z = at - skew / (6 * n)
        u = 1 + skew * z
        root = u.sign() * u.abs().pow(1 / 3)
        return 3 * z / (root * root + root + 1)

    low, high = untransformed(t), untransformed(-t)
    even = estimate.freedom >= EVEN * (n - 1)
    low, high = (torch.where(even, a, b) for a, b in ((torch.maximum(low, t), low), (torch.minimum(high, -t), high)))
    return estimate.value - s * low, estimate.value - s * high


def _normal_quantile(level: float) -> float:
    """The quantile (1 + level)/2 of the normal distribution."""
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def _quantile(level: float, freedom: Tensor) -> Tensor:
    """The quantile (1 + level)/2 of Student's t; NaN below one degree of freedom."""
    from scipy.special import stdtrit

    found = torch.as_tensor(stdtrit(freedom.cpu().numpy(), (1 + level) / 2)).to(freedom)
    return torch.where(freedom >= 1 - 1e-9, found, torch.nan)


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
