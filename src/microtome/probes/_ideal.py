"""Preferences of several users: each has an ideal point, and prefers the text whose states lie nearer to it.

Formula:  z(x) = (x - m) / s W, of `DIMS` numbers; the ideal point of user u is a_u = sum_k softmax(c_u)_k p_k, a
          mixture of `prototypes` points; p(chosen) = sigmoid(|z(rejected) - a_u|^2 - |z(chosen) - a_u|^2); W, p, c
          trained together (`microtome.training.fit`), with l2/2 |W|^2.
          accuracy = share of pairs held out whose chosen text is nearer; one_direction: that of one linear preference
          for all users.
Law:      users of two opposite tastes are told apart and predicted; one direction for all stays at chance.
Source:   Chen et al., "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous Preferences", 2024 (arXiv
          2406.08469). Departs: one linear map in place of small networks.
Check:    tests/laws/test_probes.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import DataError, error
from microtome.probes._problem import Outcome, Problem
from microtome.probes._readers import Reader, standard
from microtome.probes._signals import ahead, ranked
from microtome.training import fit

DIMS = 8
STEPS = 300


def ideal_points(
    chosen: Tensor, rejected: Tensor, users: np.ndarray, prototypes: int, l2: float, seed: int
) -> dict[str, Tensor]:
    """The map [width, dim] of states to the space of tastes, prototypes [k, dim], and users' shares [user, k]."""
    mean, scale = standard(torch.cat([chosen, rejected]))
    a, b = (((x - mean) / scale).float() for x in (chosen, rejected))
    generator = torch.Generator().manual_seed(seed)
    width, count = a.shape[1], int(users.max()) + 1
    held = {
        "map": torch.randn(width, DIMS, generator=generator) * width**-0.5,
        "prototypes": torch.randn(prototypes, DIMS, generator=generator),
        "shares": 0.1 * torch.randn(count, prototypes, generator=generator),
    }
    whose = torch.from_numpy(users)

    def loss(_: int) -> Tensor:
        own = (held["shares"].softmax(1) @ held["prototypes"])[whose]
        near, far = ((x @ held["map"] - own).square().sum(1) for x in (a, b))
        penalty = l2 / (2 * len(a)) * held["map"].square().sum()
        return -torch.nn.functional.logsigmoid(far - near).mean() + penalty

    fit(held, loss, lambda step: step, steps=STEPS, lr=3e-2, seed=seed, name="ideal points")
    found = {name: x.detach().double() for name, x in held.items()}
    return found | {"shares": found["shares"].softmax(1), "mean": mean, "scale": scale}


def nearer(held: dict[str, Tensor], chosen: Tensor, rejected: Tensor, users: np.ndarray) -> Tensor:
    """[pair] by how much the chosen text lies nearer to the user's ideal point."""
    own = (held["shares"] @ held["prototypes"])[torch.from_numpy(users)]
    near, far = (((x - held["mean"]) / held["scale"] @ held["map"] - own).square().sum(1) for x in (chosen, rejected))
    return far - near


def tastes(problem: Problem, prototypes: int, l2: float) -> Outcome:
    """Share of pairs held out that are ranked as their user chose, and by one direction for all users.

    Raises:
        DataError: no users are named, or one has no pair in a fit.
    """
    names = problem.examples.users
    if names is None:
        raise error(DataError, "ideal points need users", do='name the user of each pair in a column "user"')
    users = np.unique([names[i] for i in problem.rows.tolist()], return_inverse=True)[1]
    for fitted, _ in problem.folds.split():
        if lacks := set(users.tolist()) - set(users[fitted].tolist()):
            name = sorted(set(names))[min(lacks)]
            raise error(DataError, f'the user "{name}" has no pair in a fit', do="give more pairs, or fewer folds")
    hits: dict[str, dict[Site, Tensor]] = {name: {} for name in ("accuracy", "control_task", "one_direction")}
    readers: dict[Site, Reader] = {}
    turn = np.random.default_rng((problem.seed, 8)).integers(0, 2, len(users)) == 1
    for done, (site, x) in enumerate(problem.states.items()):
        a, b = x.chunk(2, 1)
        swapped = torch.from_numpy(turn).unsqueeze(1)
        turned = torch.where(swapped, b, a), torch.where(swapped, a, b)
        for name, (one, other) in {"accuracy": (a, b), "control_task": turned}.items():
            found = hits[name][site] = torch.zeros(len(users), dtype=torch.float64)
            for rows, test in problem.folds.split():
                held = ideal_points(one[rows], other[rows], users[rows], prototypes, l2, problem.seed)
                found[test] = ahead(nearer(held, one[test], other[test], users[test]))
        hits["one_direction"][site] = ranked(a - b, problem, l2)
        readers[site] = Reader(ideal_points(a, b, users, prototypes, l2, problem.seed))
        current().report("finding tastes", done + 1, len(problem.states))
    each: dict[str, Any] = {name: problem.each(found) for name, found in hits.items()}
    gaps = {site: x - hits["control_task"][site] for site, x in hits["accuracy"].items()}
    return Outcome(each=each | {"selectivity": problem.each(gaps)}, readers=readers)
