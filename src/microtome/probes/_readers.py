"""What a probe is as a function of a vector: linear, on few units, by class means, or a small network.

Formula:  linear      z = W (x - m) / s + b, by logistic regression: least of sum -log softmax(z)[label] + l2/2 |W|^2,
                      with m, s mean and standard deviation of each unit over the rows fitted on.
          sparse      the same on the k units of the largest F statistic of the classes (that of one-way variance).
          mass-mean   z_c = mu_c . x - |mu_c|^2 / 2: the class whose mean is nearest; of two classes the direction is
                      the difference of their means.
          mlp         z = W2 relu(W1 (x - m) / s + b1) + b2, of `hidden` units, trained by `microtome.training.fit`.
          kan         z = W2 s(W1 (x - m) / s + b1) + b2, with s a piecewise linear function of its own for each hidden
                      unit, through 9 learned points from -4 to 4.
Source:   Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016 (arXiv 1610.01644);
          Gurnee et al., "Finding Neurons in a Haystack: Case Studies with Sparse Probing", 2023 (arXiv 2305.01610);
          Marks and Tegmark, "The Geometry of Truth", 2023 (arXiv 2310.06824).
Check:    tests/laws/test_probes.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.training import fit

KNOTS = 9
REACH = 4.0
STEPS = 200
"""Updates of a small network, each on all rows."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A fitted probe of one site.

    Attributes:
        tensors: `weight` [class, width] and `bias` [class] of a linear one, in the units of the site; those of its
            layers, with `mean` and `scale`, of a network.
    """

    tensors: Mapping[str, Tensor]

    def logits(self, x: Float[Tensor, "row width"]) -> Float[Tensor, "row class"]:
        """What it says of vectors: the larger, the more likely the class."""
        held = self.tensors
        if "weight" in held:
            return x @ held["weight"].to(x).T + held["bias"].to(x)
        return network(held, x)


Fitter = Callable[[Tensor, np.ndarray, int], Reader]
"""A function of vectors [row, width], classes [row] and their number."""


def standard(x: Float[Tensor, "row width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """Mean and standard deviation of each unit, at least a thousandth of that of all units: below is rounding."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    least = 1e-3 * float(scale.square().mean().sqrt())
    return mean, scale.clamp(min=least) if least > 0 else torch.ones_like(scale)


def ahead_of_others(weight: Float[Tensor, "class width"], number: int) -> Float[Tensor, " width"]:
    """The weight of a class minus the mean of those of the others: what its logit rises by above theirs."""
    rest = torch.arange(len(weight)) != number
    return weight[number] - weight[rest].mean(0) if len(weight) > 1 else weight[number]


def pattern(
    weight: Float[Tensor, "class width"], x: Float[Tensor, "row width"], number: int, *, centred: bool = True
) -> Float[Tensor, " width"]:
    """Along what states lie that give a class its logit: their covariance with it.

    The weights of a regression point where they tell most, which may be along what hardly varies; states of the class
    do not lie there, and an edit along the weights would leave what the model has seen. Of differences of two texts
    nothing is taken off: their mean is what chosen texts have more of.

    Source:   Haufe et al., "On the Interpretation of Weight Vectors of Linear Models in Multivariate Neuroimaging",
              2014. Departs: none.
    """
    inner = x - x.mean(0) if centred else x
    return inner.T @ (inner @ ahead_of_others(weight, number)) / len(x)


def logistic(x: np.ndarray, y: np.ndarray, n: int, l2: float, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Weights [class, width] and biases [class] of a logistic regression; of one class, those that always say it."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    there = np.unique(y)
    weight, bias = torch.zeros(n, x.shape[1], dtype=torch.float64), torch.full((n,), -30.0, dtype=torch.float64)
    if len(there) == 1:
        bias[int(there[0])] = 0.0
        return weight, bias
    model = LogisticRegression(C=1 / l2, max_iter=500, fit_intercept=intercept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of classes that can be parted, after 500 steps
        model.fit(x, y)
    coefficients, offsets = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in (model.coef_, model.intercept_))
    if len(there) == 2:
        coefficients, offsets = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-offsets, offsets]) / 2
    at = torch.from_numpy(there)
    weight[at], bias[at] = coefficients, offsets
    return weight, bias


def linear(l2: float) -> Fitter:
    """Logistic regression on standardised units."""

    def fitted(x: Tensor, y: np.ndarray, n: int) -> Reader:
        mean, scale = standard(x)
        weight, bias = logistic(((x - mean) / scale).numpy(), y, n, l2)
        weight = weight / scale
        return Reader({"weight": weight, "bias": bias - weight @ mean})

    return fitted


def sparse(l2: float, k: int) -> Fitter:
    """The same on the k units that tell the classes apart best, each by itself."""

    def fitted(x: Tensor, y: np.ndarray, n: int) -> Reader:
        units = strongest(x, y, k)
        part = linear(l2)(x[:, units], y, n)
        weight = x.new_zeros(n, x.shape[1])
        weight[:, units] = part.tensors["weight"]
        return Reader({"weight": weight, "bias": part.tensors["bias"], "units": units})

    return fitted


def strongest(x: Float[Tensor, "row width"], y: np.ndarray, k: int) -> Tensor:
    """[k] the units with the largest F statistic, strongest first; of equal ones the first."""
    from sklearn.feature_selection import f_classif

    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # of units that do not vary
        found = f_classif(x.numpy(), y)[0]
    score = np.nan_to_num(np.asarray(found, dtype=np.float64), nan=-1.0, posinf=np.finfo(np.float64).max)
    return torch.from_numpy(np.argsort(-score, kind="stable")[:k].copy())


def mass_mean(x: Tensor, y: np.ndarray, n: int) -> Reader:
    """The class whose mean is nearest."""
    classes = torch.from_numpy(y)
    sums = x.new_zeros(n, x.shape[1]).index_add_(0, classes, x)
    counts = torch.bincount(classes, minlength=n).to(x)
    means = sums / counts.clamp(min=1).unsqueeze(1)
    bias = torch.where(counts > 0, -means.square().sum(1) / 2, torch.full_like(counts, -torch.inf))
    return Reader({"weight": means, "bias": bias.clamp(min=-1e300)})


def network(held: Mapping[str, Tensor], x: Float[Tensor, "row width"]) -> Float[Tensor, "row class"]:
    """The logits of a network of one hidden layer."""
    inner = (x - held["mean"].to(x)) / held["scale"].to(x) @ held["w1"].to(x) + held["b1"].to(x)
    inner = torch.relu(inner) if "knots" not in held else spline(inner, held["knots"].to(x))
    return inner @ held["w2"].to(x) + held["b2"].to(x)


def spline(x: Float[Tensor, "row hidden"], knots: Float[Tensor, "hidden knot"]) -> Float[Tensor, "row hidden"]:
    """Each unit's own piecewise linear function: its value at evenly spaced points, continued along its last pieces."""
    at = (x.clamp(-REACH, REACH) + REACH) * (KNOTS - 1) / (2 * REACH)
    low = at.detach().floor().clamp(max=KNOTS - 2).long()
    a, b = (knots.T.gather(0, low + step) for step in (0, 1))
    slope = (b - a) * (KNOTS - 1) / (2 * REACH)
    return a + (b - a) * (at - low) + slope * (x - x.clamp(-REACH, REACH))


def small_network(hidden: int, l2: float, seed: int, *, learned: bool = False) -> Fitter:
    """A network of one hidden layer, whose non-linearity may be learned."""

    def fitted(x: Tensor, y: np.ndarray, n: int) -> Reader:
        mean, scale = standard(x)
        generator = torch.Generator().manual_seed(seed)
        held = {
            "w1": torch.randn(x.shape[1], hidden, generator=generator) * x.shape[1] ** -0.5, "b1": torch.zeros(hidden),
            "w2": torch.randn(hidden, n, generator=generator) * hidden**-0.5, "b2": torch.zeros(n),
        }  # fmt: skip
        if learned:
            held["knots"] = torch.linspace(-REACH, REACH, KNOTS).clamp(min=0).repeat(hidden, 1)
        inputs, labels = ((x - mean) / scale).float(), torch.from_numpy(y)
        fixed = {"mean": torch.zeros(1), "scale": torch.ones(1)}

        def loss(_: int) -> Tensor:
            fits = torch.nn.functional.cross_entropy(network(held | fixed, inputs), labels)
            return fits + l2 / (2 * len(labels)) * (held["w1"].square().sum() + held["w2"].square().sum())

        fit(held, loss, lambda step: step, steps=STEPS, lr=1e-2, seed=seed, name="probe")
        return Reader({**{k: v.detach().double() for k, v in held.items()}, "mean": mean, "scale": scale})

    return fitted
