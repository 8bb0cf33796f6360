"""Concept vectors: whether a logit rises along the direction that tells examples of a concept from random ones.

Formula:  v = the normal, of length 1, of a logistic regression that parts the states of the concept's examples from
          those of random ones (on standardised units, in the units of the site); of an input, S = v . grad_x logit, x
          the state at the site; score = share of inputs with S > 0; sensitivity = mean S.
          Random vectors: the same between two random halves of the random examples, by group, `splits` times.
          p = (1 + those of which |sensitivity| is as large) / (1 + splits), two-sided.
Law:      random vectors score 0.5 on average: which half is which is a matter of chance.
Source:   Kim et al., "Interpretability Beyond Feature Attribution: Quantitative Testing with Concept Activation Vectors
          (TCAV)", 2017 (arXiv 1711.11279). Departs: the test ranks the mean sensitivity among random vectors, since the
          paper's t-test counts vectors that share the concept's examples as independent, and shares near 0 or 1 are
          common among random vectors too.
Check:    tests/laws/test_probes.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import DataError, error
from microtome.model import Model
from microtome.probes._examples import read_examples
from microtome.probes._problem import Outcome, Problem, whole, with_ends, with_shares
from microtome.probes._readers import Reader, linear
from microtome.probes._states import placed

LEAST = 8
"""Groups of random examples below which they are not split."""


def normal(x: Float[Tensor, "row width"], y: np.ndarray, l2: float) -> Float[Tensor, " width"]:
    """The direction from class 0 to class 1, of length 1."""
    weight = linear(l2)(x, y, 2).tensors["weight"]
    found = weight[1] - weight[0]
    return found / found.norm().clamp(min=1e-30)


def random_normals(
    x: Float[Tensor, "row width"], groups: np.ndarray, splits: int, l2: float, seed: int
) -> Float[Tensor, "split width"]:
    """Directions between two random halves of rows; groups are whole."""
    rng = np.random.default_rng((seed, 5))
    names = np.unique(groups)
    found: list[Tensor] = []
    for _ in range(splits):
        half = rng.permutation(names)[: len(names) // 2]
        found.append(normal(x, np.isin(groups, half).astype(np.int64), l2))
    return torch.stack(found)


def gradients(
    model: Model,
    rows: Sequence[Sequence[int]],
    columns: Sequence[tuple[int, ...]],
    sites: Mapping[Site, str],
    token: int,
    foil: int | None,
) -> dict[Site, Float[Tensor, "row width"]]:
    """The gradient of a logit (less another), read at the end of each row, at each site: summed where it is probed."""
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for i, (ids, at) in enumerate(zip(rows, columns, strict=True)):
        run = model.run([list(ids)], capture=list(sites.values()), grad=True)
        last = run.logits[0, -1].float()
        grads = run.grad(last[token] if foil is None else last[token] - last[foil])
        for site, name in sites.items():
            found[site].append(grads[name][0, list(at)].double().cpu().sum(0).flatten())
        current().report("taking gradients", i + 1, len(rows))
    return {site: torch.stack(parts) for site, parts in found.items()}


def rank_p(own: float, others: Float[Tensor, " split"]) -> float:
    """Share of random vectors at least as large, the own one among them."""
    return float((1 + (others.abs() >= abs(own)).sum()) / (1 + len(others)))


def concepts(
    problem: Problem, target: int, inputs: Any, token: int, foil: int | None, splits: int, l2: float
) -> Outcome:
    """Scores of the concept and of random vectors, input by input.

    Raises:
        DataError: there are too few random examples to split them; or `inputs` are no texts.
    """
    model, address = problem.model, problem.sites[0]
    texts = None if inputs is None else _texts(inputs)
    y = (problem.inside == target).astype(np.int64)
    rows = problem.rows
    random, groups = rows[y == 0], problem.folds.groups[y == 0]
    if len(np.unique(groups)) < LEAST:
        what = "too few random examples to split them in halves"
        raise error(DataError, what, got=f"{len(np.unique(groups))} groups", allowed=f"{LEAST} or more", do="give more")
    at = problem.parts[0]
    if texts is None:
        chosen = rows[y == 1].tolist()
        runs, columns = [at.rows[i] for i in chosen], [at.columns[i] for i in chosen]
    else:
        read = read_examples([{"text": text, "label": "input"} for text in texts])
        own = placed(model, read, address, "last")
        runs, columns = list(own.rows), list(own.columns)
    names = {site: whole(problem, site) for site in problem.states}
    slopes = gradients(model, runs, columns, names, token, foil)
    each: dict[str, dict[Site, Tensor]] = {name: {} for name in ("score", "score_random", "sensitivity")}
    others, p, readers = dict[Site, Tensor](), dict[Site, Tensor](), dict[Site, Reader]()
    for done, (site, x) in enumerate(problem.states.items()):
        own_normal = normal(x[torch.from_numpy(rows)], y, l2)
        drawn = random_normals(x[torch.from_numpy(random)], groups, splits, l2, problem.seed)
        mine, theirs = slopes[site] @ own_normal, slopes[site] @ drawn.T  # [input], [input, split]
        each["score"][site] = rises(mine)
        each["score_random"][site] = rises(theirs).mean(1)
        each["sensitivity"][site] = mine
        others[site] = theirs.mean(0).abs().mean()
        p[site] = torch.tensor(rank_p(float(mine.mean()), theirs.mean(0)))
        weight = torch.stack([-own_normal, own_normal]) / 2
        readers[site] = Reader({"weight": weight, "bias": torch.zeros(2, dtype=torch.float64)})
        current().report("testing concepts", done + 1, len(problem.states))
    values: dict[str, Any] = {}
    for name, found in each.items():
        dims, grid = problem.grid(found)
        values |= (with_shares if name == "score" else with_ends)(name, grid, dims)
    values["sensitivity_random"], values["concept_p_value"] = problem.grid(others), problem.grid(p)
    return Outcome(values, readers=readers, attrs={"inputs": len(runs), "splits": splits})


def _texts(inputs: Any) -> list[Any]:
    """Texts, or token ids, of any library.

    Raises:
        DataError: they are none.
    """
    given: Any = inputs.tolist() if hasattr(inputs, "tolist") else inputs
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise error(DataError, "inputs are no list of texts", got=type(inputs).__name__, do='give such as ["A text"]')
    return list(cast("Iterable[Any]", given))


def rises(x: Tensor) -> Tensor:
    """1 where a logit rises, a half where it stays."""
    return (x > 0).double() + 0.5 * (x == 0).double()
