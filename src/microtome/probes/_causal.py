"""What a direction does: it is added, taken out or set to the other class's mean, and the answer is read.

Formula:  v the direction, of length 1, towards the class that is asked for; step = v . (mean state of that class - mean
          state of the others); of a row of the others the state x becomes
          adding    x + step v
          ablating  x - (x . v) v
          patching  x - (x . v) v + (mean of the class . v) v
          and of a row of the class itself the same towards the others: - step v, their mean. effect = change of the
          metric, with its sign turned for rows of the class itself: above 0, the answer moves to the other class's.
          Control: as much along a random direction of length 1, another one for each row.
Law:      along a direction that nothing reads, no effect; the effect is that of the same edits in plain runs.
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
from microtome.probes._problem import Problem, whole, with_ends

ROWS = 24
"""Rows that are edited at most, half of them of the class that is asked for."""
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
    cells: list[Add] = []
    for j, i in enumerate(rows.tolist()):
        for site, direction in directions.items():
            cells += _cells(problem, site, direction, i, bool(target[chosen][j]), target)
    per_row = len(directions) * 2 * len(WAYS)
    numbers = [k // per_row for k in range(len(cells))]
    swept = run_sweep(problem.model, prompts, cells, metric, prompts=numbers, stage="editing directions").whole()
    effects = swept.effects.double().reshape(len(rows), len(directions), 2, len(WAYS))
    effects = effects if answer is None else effects * signs.reshape(-1, 1, 1, 1)
    values: dict[str, Any] = {}
    for k, way in enumerate(WAYS):
        both = [problem.grid({site: effects[:, s, c, k] for s, site in enumerate(directions)}) for c in range(2)]
        (dims, own), (_, random) = both
        values |= with_ends(way, own, dims) | with_ends(f"{way}_random", random, dims)
        ends = with_ends("x", own - random, dims)
        values |= {f"{way}_diff_{end}": ends[f"x_{end}"] for end in ("lo", "hi")}
    return values, told


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


def _cells(problem: Problem, site: Site, direction: Direction, row: int, own: bool, target: np.ndarray) -> list[Add]:
    """The edits of one row at one site: each way along the direction, then along a random one."""
    states = problem.states[site]
    x, shape = states[row], problem.shapes[site]
    layer = 0 if site.layer is None else site.layer
    generator = torch.Generator().manual_seed((problem.seed * 1_000_003 + row) * 1_009 + layer)
    random = torch.randn(len(x), generator=generator, dtype=torch.float64)
    to = states[torch.from_numpy(problem.rows[target != own])].mean(0)  # the mean of the other side
    step = -direction.step if own else direction.step
    place = f"{whole(problem, site)}@{','.join(map(str, problem.parts[0].columns[row]))}"
    cells: list[Add] = []
    for v in (direction.vector, random / random.norm()):
        along = float(x @ v)
        sizes = (step, -along, float(to @ v) - along)
        cells += [Add(place, (size * v).reshape(shape).to(problem.model.dtype)) for size in sizes]
    return cells
