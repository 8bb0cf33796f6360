"""How often the 95 % intervals hold the truth, at every number of examples that a default gives.

    python benchmarks/coverage.py [--samples 200000] [--out benchmarks/results/coverage.json]

Samples are drawn from laws whose mean is known, and the share of intervals that hold it is counted; of shares of
successes it is computed exactly. The numbers of examples are read from the defaults of the methods themselves, with the
smallest that has an interval. What is promised is 93 to 97.5 %; laws that are harder than that are measured too, and
marked. tests/laws/test_coverage.py asserts it.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Mapping
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import binom

import microtome as mt
from microtome.cli._tasks import EACH
from microtome.method import RepeatedTokens, Text, declared
from microtome.stream import (
    LEAST,
    mean_interval,
    share_difference_interval,
    share_interval,
    slope_interval,
)

Rng = np.random.Generator
Law = Callable[[Rng, tuple[int, int]], ndarray]

LEVELS = (0.93, 0.975)
"""The least and the most that is promised."""


def _zeros(share: float, of: Law) -> Law:
    return lambda r, size: np.where(r.random(size) < share, 0.0, of(r, size))


HALF_ZEROS = _zeros(0.5, lambda r, size: r.exponential(1.0, size))

# By name: the law, its mean, and whether it is promised.
LAWS: Mapping[str, tuple[Law, float, bool]] = {
    "normal": (lambda r, size: r.normal(1.0, 1.0, size), 1.0, True),
    "exponential (skewness 2)": (lambda r, size: r.exponential(1.0, size), 1.0, True),
    "lognormal, σ ½ (skewness 1.75)": (lambda r, size: r.lognormal(0.0, 0.5, size), exp(0.125), True),
    "half zeros, else exponential": (HALF_ZEROS, 0.5, True),
    "Laplace": (lambda r, size: r.laplace(1.0, 1.0, size), 1.0, True),
    "half zeros minus half zeros": (
        lambda r, size: HALF_ZEROS(r, size) - HALF_ZEROS(r, size), 0.0, True
    ),
    "lognormal, σ 1 (skewness 6.2)": (lambda r, size: r.lognormal(0.0, 1.0, size), exp(0.5), False),
    "70 % zeros, else exponential": (_zeros(0.7, lambda r, size: r.exponential(1.0, size)), 0.3, False),
    "half zeros, else normal (2, ½)": (_zeros(0.5, lambda r, size: r.normal(2.0, 0.5, size)), 1.0, False),
}  # fmt: skip

EVEN_ONLY = ("Laplace", "half zeros minus half zeros")
"""Laws that are promised only where examples weigh much the same."""

# By name: how much each example counts.
WEIGHTS: Mapping[str, Law] = {
    "prompts of 5 to 15 tokens": lambda r, size: r.integers(5, 16, size).astype(float),
    "documents of 20 to 256 tokens": lambda r, size: r.lognormal(4.5, 1.0, size).clip(20, 256),
}

DRAWN = ("draws", "sets")
"""Units of arguments that say how many examples a method draws by itself."""

NOISES = ("normal", "exponential (skewness 2)", "half zeros, else exponential")
"""The laws of what a line leaves."""


def defaults() -> dict[int, list[str]]:
    """By number of examples, what has it by default; read from declarations and signatures."""
    found: dict[int, list[str]] = {LEAST: ["the least with an interval"]}

    def add(n: int, what: str) -> None:
        if n >= LEAST:  # of fewer there is no interval
            found.setdefault(n, []).append(what)

    for name, method in mt.methods("measure").items():
        made: Any = declared(name)
        if not any(column.interval for column in method.columns):
            continue
        if isinstance(made.on, RepeatedTokens):
            add(made.on.sequences, name)
        elif isinstance(made.on, Text):
            add(made.on.sequences or made.on.tokens // made.on.length, name)
    for name in mt.methods("question"):
        made = declared(name)
        for p in made.parameters:
            if p.argument is not None and p.argument.unit in DRAWN:
                add(p.default, f"{p.name} of {name}")
    add(inspect.signature(mt.tasks.build).parameters["n"].default, "pairs of a task")
    add(EACH, "pairs of a task in `microtome tasks`")
    return dict(sorted(found.items()))


def held(low: Any, high: Any, truth: float) -> ndarray:
    """Which intervals hold the truth; where there is none, nothing is said and nothing counted."""
    there = ~low.isnan()
    return ((low <= truth) & (truth <= high))[there].double().numpy()


def of_means(law: str, n: int, samples: int, seed: int = 0) -> float:
    """Coverage of the mean of n examples of a law."""
    draw, mean, _ = LAWS[law]
    x = torch.from_numpy(draw(np.random.default_rng([seed, n]), (n, samples)))
    return float(held(*mean_interval(x)[1:], mean).mean())


def of_weighted(law: str, weights: str, n: int, samples: int, seed: int = 0) -> float:
    """Coverage of the mean over tokens of n examples of unequal length."""
    draw, mean, _ = LAWS[law]
    rng = np.random.default_rng([seed, n])
    w = WEIGHTS[weights](rng, (n, samples))
    x = torch.from_numpy(w * draw(rng, (n, samples)))
    return float(held(*mean_interval(x, weights=torch.from_numpy(w))[1:], mean).mean())


def of_ratios(n: int, samples: int, seed: int = 0) -> float:
    """Coverage of effects as shares of the mean gap, where effect and gap of a pair go together."""
    rng = np.random.default_rng([seed, n])
    gap = rng.normal(4.0, 1.5, (n, samples))
    effect = torch.from_numpy(0.5 * gap + rng.normal(0.0, 0.6, (n, samples)))
    return float(held(*mean_interval(effect, weights=torch.from_numpy(gap))[1:], 0.5).mean())


def of_slopes(noise: str, n: int, samples: int, seed: int = 0) -> float:
    """Coverage of the slope of a line with noise, over lognormal places."""
    rng = np.random.default_rng([seed, n])
    x = rng.lognormal(0.0, 0.5, (n, samples))
    y = -0.5 * x + LAWS[noise][0](rng, (n, samples))
    return float(held(*slope_interval(torch.from_numpy(x), torch.from_numpy(y))[1:], -0.5).mean())


def of_shares(n: int, shares: ndarray) -> ndarray:
    """Exact coverage of the share of successes among n, at each true share."""
    ends = np.array([share_interval(k, n) for k in range(n + 1)])
    chance = binom.pmf(np.arange(n + 1)[:, None], n, shares)
    return (chance * ((ends[:, :1] <= shares) & (shares <= ends[:, 1:]))).sum(0)


def of_share_differences(n: int, points: int, seed: int = 0) -> ndarray:
    """Exact coverage of the difference of two shares in the same n, at random pairs of independent shares."""
    both = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    ends = np.array([share_difference_interval(b, c, n) for b, c in both])
    b, c = np.array(both).T
    found: list[float] = []
    for p, q in np.random.default_rng(seed).random((points, 2)):
        gained, lost = p * (1 - q), q * (1 - p)
        chance = binom.pmf(b, n, gained) * binom.pmf(c, n - b, lost / (1 - gained))
        found.append(float(chance[(ends[:, 0] <= p - q) & (p - q <= ends[:, 1])].sum()))
    return np.array(found)


def measured(samples: int) -> list[dict[str, Any]]:
    """One row per kind of interval and law: coverage by number of examples."""
    many = defaults()
    rows: list[dict[str, Any]] = []

    def row(of: str, law: str, promised: bool, coverage: Callable[[int], float]) -> None:
        rows.append({"of": of, "law": law, "promised": promised, "coverage": {n: round(coverage(n), 4) for n in many}})

    for law, (_, _, promised) in LAWS.items():
        row("mean", law, promised, lambda n, law=law: of_means(law, n, samples))
    for weights in WEIGHTS:
        for law, (_, _, promised) in LAWS.items():
            if promised:
                kept = law not in EVEN_ONLY
                row(f"mean, {weights}", law, kept, lambda n, w=weights, law=law: of_weighted(law, w, n, samples))
    row("share of the mean gap", "normal gaps and effects", True, lambda n: of_ratios(n, samples))
    for noise in NOISES:
        row("slope", noise, True, lambda n, noise=noise: of_slopes(noise, n, samples))
    every = np.linspace(0.001, 0.999, 999)
    row("share", "mean over all shares", True, lambda n: float(of_shares(n, every).mean()))
    row("share", "the worst share", False, lambda n: float(of_shares(n, every).min()))
    row("difference of shares", "mean over all shares", True, lambda n: float(of_share_differences(n, 400).mean()))
    return rows


def table(found: Mapping[str, Any]) -> str:
    """The rows as a table of Markdown; what is not promised is in brackets."""
    ns = list(found["examples"])
    lines = ["| interval of | data | " + " | ".join(ns) + " |", "|---" * (len(ns) + 2) + "|"]
    for row in found["rows"]:
        cells = [f"{100 * x:.1f}" if row["promised"] else f"({100 * x:.1f})" for x in row["coverage"].values()]
        lines.append(" | ".join(["| " + row["of"], row["law"], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coverage.json")
    given = parser.parse_args()
    examples = {str(n): what for n, what in defaults().items()}
    found = {"samples": given.samples, "examples": examples, "rows": measured(given.samples)}
    found = json.loads(json.dumps(found))
    print(table(found))
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
