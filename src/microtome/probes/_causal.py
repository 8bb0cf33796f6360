"""What a direction does: it is added, taken out or set to the other class's mean, and the answer is read.

Formula:  v the direction, of length 1, towards the class that is asked for; step = v . (mean state of that class - mean
          state of the others); of a row of the others the state x becomes
          adding    x + step v
          ablating  x - (x . v) v
          patching  x - (x . v) v + (mean of the class . v) v
          and of a row of the class itself the same towards the others: - step v, their mean. effect = change of the
          metric, with its sign turned for rows of the class itself: above 0, the answer moves to the other class's.
          Control: the same numbers along each of 20 random directions of length 1, every one of them for all rows:
          sum over groups of c_g times the states of its rows, c_g normal, without its mean in each class. They lie
          where states differ as they would for labels at random, but for the classes. Control column: mean over
          directions of the size of the mean effect; p = (1 + those with as large a mean effect) / 21, two-sided.
Law:      along a direction that nothing reads, no effect; the effect is that of the same edits in plain runs; labels
          at random pass p < .05 in 8 % of draws (150 of a small model).
Source:   random contrasts: Langsrud, "Rotation tests", 2005. Departs: ranks of 20, and groups are whole.
Check:    tests/laws/test_probes_causal.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.edit import Add
from microtome.method import run_sweep
from microtome.metric import Divergence, LogitDifference, LogProbability, Metric
from microtome.probes._concept import rank_p
from microtome.probes._problem import Problem, whole, with_ends

ROWS = 16
"""Rows that are edited at most, half of them of the class that is asked for."""
RANDOM = 20
"""Random directions: one in 20 is as large as all of them by chance."""
WAYS = ("adding", "ablating", "patching")


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction of one site.

    Attributes:
        vector: [width], of length 1, from the other classes to the one that is asked for.
        step: how far their means lie apart along it.
    """

    vector: Float[Tensor, " width"]
    step: float


def causal_use(
    problem: Problem,
    directions: Mapping[Site, Direction],
    target: np.ndarray,
    answer: str | int | None,
    foil: str | int | None,
) -> tuple[dict[str, Any], str]:
    """The effects of the directions on the answer, as columns, and what is read.

    Args:
        problem: whose model and rows.
        directions: by site and layer.
        target: [row] of the rows that are cross-validated, which of them are of the class that is asked for.
        answer: the token of that class; None reads how far the prediction moves.
        foil: the token of the others.
    """
    chosen = _rows(target, problem.seed)
    rows = problem.rows[chosen]
    prompts = [list(problem.parts[0].rows[i]) for i in rows.tolist()]
    metric, told = _metric(problem, prompts, answer, foil)
    signs = torch.where(torch.from_numpy(target[chosen]), -1.0, 1.0).double()
    ways = {site: torch.stack([d.vector, *random_directions(problem, site)]) for site, d in directions.items()}
    cells: list[Add] = []
    for j, i in enumerate(rows.tolist()):
        for site, direction in directions.items():
            cells += _cells(problem, site, direction, ways[site], i, bool(target[chosen][j]), target)
    per_row = len(directions) * (1 + RANDOM) * len(WAYS)
    numbers = [k // per_row for k in range(len(cells))]
    swept = run_sweep(problem.model, prompts, cells, metric, prompts=numbers, stage="editing directions").whole()
    effects = swept.effects.double().reshape(len(rows), len(directions), 1 + RANDOM, len(WAYS))
    effects = effects if answer is None else effects * signs.reshape(-1, 1, 1, 1)
    values: dict[str, Any] = {}
    for k, way in enumerate(WAYS):
        dims, own = problem.grid({site: effects[:, s, 0, k] for s, site in enumerate(directions)})
        means = {site: effects[:, s, :, k].mean(0) for s, site in enumerate(directions)}
        _, sizes = problem.grid({site: x[1:].abs().mean() for site, x in means.items()})
        p = problem.grid({site: torch.tensor(rank_p(float(x[0]), x[1:])) for site, x in means.items()})
        found = with_ends(way, own, dims)
        values |= found | {f"{way}_random": (dims, sizes), f"{way}_p_value": p}
        values |= {f"{way}_diff_{end}": (dims, found[f"{way}_{end}"][1] - sizes) for end in ("lo", "hi")}
    return values, told


def random_directions(problem: Problem, site: Site) -> Float[Tensor, "direction width"]:
    """Directions of length 1 along which states differ in no way that has to do with the classes; see above."""
    rng = np.random.default_rng((problem.seed, 9))
    groups, classes = problem.folds.groups, problem.inside
    x = problem.states[site][torch.from_numpy(problem.rows)]
    contrasts = rng.standard_normal((RANDOM, int(groups.max()) + 1))[:, groups]
    for number in np.unique(classes):
        own = classes == number
        contrasts[:, own] -= contrasts[:, own].mean(1, keepdims=True)
    found = torch.from_numpy(contrasts) @ x
    return found / found.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _rows(target: np.ndarray, seed: int) -> np.ndarray:
    """Numbers of rows to edit, half of each side as far as there are."""
    rng = np.random.default_rng((seed, 7))
    sides = [rng.permutation(np.flatnonzero(target == side))[: ROWS // 2] for side in (False, True)]
    return np.sort(np.concatenate(sides))


def _metric(problem: Problem, prompts: list[list[int]], answer: Any, foil: Any) -> tuple[Metric, str]:
    if answer is None:
        base = problem.model.run(prompts)
        return Divergence.of(base), "KL divergence from the unedited prediction"
    if foil is None:
        return LogProbability(answer), f"log-probability of {answer!r}"
    return LogitDifference(answer, foil=foil), f"logit of {answer!r} minus that of {foil!r}"


def _cells(
    problem: Problem, site: Site, direction: Direction, ways: Tensor, row: int, own: bool, target: np.ndarray
) -> list[Add]:
    """The edits of one row at one site: each along the direction, then as much along every random one."""
    states = problem.states[site]
    x, shape = states[row], problem.shapes[site]
    to = states[torch.from_numpy(problem.rows[target != own])].mean(0)  # the mean of the other side
    step = -direction.step if own else direction.step
    place = f"{whole(problem, site)}@{','.join(map(str, problem.parts[0].columns[row]))}"
    along = float(x @ direction.vector)
    sizes = (step, -along, float(to @ direction.vector) - along)
    return [Add(place, (size * v).reshape(shape).to(problem.model.dtype)) for v in ways for size in sizes]
