"""Probes of what is no class: a signal from outside, and preferences between two texts.

Formula:  r: see `_encoding`. preference: -log sigmoid(r(chosen) - r(rejected)), r = w . x, plus l2/2 |w|^2: a logistic
          regression without offset on differences of states; accuracy = share of pairs held out with r(chosen) larger;
          control_task: pairs turned round at random; surface: the same on differences of counts; likelihood: share of
          pairs whose chosen text the model finds more likely, the sum of its log-probabilities.
Source:   Ouyang et al., "Training language models to follow instructions with human feedback", 2022 (arXiv 2203.02155),
          for the loss, which is that of Bradley and Terry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import DataError, error
from microtome.model import Model
from microtome.probes._encoding import agreement, delayed, noise_ceiling, ridge, turned
from microtome.probes._problem import Outcome, Problem
from microtome.probes._readers import Reader, logistic
from microtome.probes._states import Placed, batches


def encoding(problem: Problem, delays: Sequence[int]) -> Outcome:
    """Correlation with a signal on rows held out, of a turned signal, of an untrained model, and its ceiling."""
    assert problem.signals is not None
    if any(delays) and not problem.folds.named:
        do = 'name the run of each row in a column "group"; its rows are in the order of time'
        raise error(DataError, "delays need groups", got="none named", do=do)
    signal, groups = problem.signals.mean(1), problem.folds.groups
    other = turned(signal, groups, problem.seed)
    todo = [("r", problem.states, signal), ("r_turned", problem.states, other)]
    if problem.blank is not None:
        todo.append(("r_untrained", problem.blank, signal))
    each: dict[str, Any] = {}
    for name, states, y in todo:
        found: dict[Site, Tensor] = {}
        for done, (site, x) in enumerate(states.items()):
            found[site] = agreement(delayed(x, groups, delays), y, problem.folds)
            current().report("fitting the signal", done + 1, len(states))
        each[name] = problem.each(found)
    fitted: dict[Site, Reader] = {}
    for site, x in problem.states.items():
        weight, bias = ridge(delayed(x, groups, delays), signal)
        fitted[site] = Reader({"weight": weight.unsqueeze(0), "bias": torch.tensor([bias], dtype=torch.float64)})
    values: dict[str, Any] = {}
    if problem.signals.shape[1] > 1:
        dims, sums = each["r"]
        values["ceiling"] = noise_ceiling(problem.signals)
        ceiling = values["ceiling"] or float("nan")  # of a ceiling of 0 there is no share
        values["share_of_ceiling"] = (dims, sums.sum(0) / len(signal) / ceiling)
    return Outcome(values, each, fitted, {"delays": ", ".join(map(str, delays))})


def preferred(x: Tensor, l2: float) -> Reader:
    """The direction along which chosen texts lie ahead, of differences [pair, width]."""
    scale = x.square().mean(0).sqrt()
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
    both, y = torch.cat([x, -x]) / scale, np.repeat([1, 0], len(x))
    weight, _ = logistic(both.numpy(), y, 2, 2 * l2, intercept=False)  # every pair counts twice
    weight = weight / scale
    return Reader({"weight": weight, "bias": weight.new_zeros(2)})


def preference(problem: Problem, l2: float) -> Outcome:
    """Share of pairs held out that are ranked as they were chosen."""
    n = len(problem.rows)
    flips = torch.from_numpy(np.random.default_rng((problem.seed, 6)).integers(0, 2, n) * 2.0 - 1.0)
    todo = [("accuracy", problem.states, torch.ones_like(flips)), ("control_task", problem.states, flips)]
    if problem.blank is not None:
        todo.append(("untrained", problem.blank, torch.ones_like(flips)))
    hits: dict[str, dict[Site, Tensor]] = {}
    for name, states, signs in todo:
        hits[name] = {}
        for done, (site, x) in enumerate(states.items()):
            hits[name][site] = ranked(x[torch.from_numpy(problem.rows)] * signs.unsqueeze(1), problem, l2)
            current().report("probing preferences", done + 1, len(states))
    each: dict[str, Any] = {name: problem.each(found) for name, found in hits.items()}
    gaps = {site: x - hits["control_task"][site] for site, x in hits["accuracy"].items()}
    each["selectivity"] = problem.each(gaps)
    each["surface"] = ((), problem.folds.summed(_ranked_counts(problem)))
    if problem.model.anatomy.causal:
        chosen, rejected = (likelihoods(problem.model, at) for at in problem.parts)
        each["likelihood"] = ((), problem.folds.summed(ahead(chosen - rejected)))
    return Outcome(each=each, readers={site: preferred(x, l2) for site, x in problem.states.items()})


def ahead(gap: Tensor) -> Tensor:
    """1 where a gap is above 0, a half where it is 0."""
    return (gap > 0).double() + 0.5 * (gap == 0).double()


def ranked(x: Tensor, problem: Problem, l2: float) -> Tensor:
    """[pair] 1 where a direction that was fitted to the other folds puts the chosen text ahead."""
    found = torch.zeros(len(x), dtype=torch.float64)
    for fit, test in problem.folds.split():
        weight = preferred(x[fit], l2).tensors["weight"]
        found[test] = ahead(x[test] @ (weight[1] - weight[0]))
    return found


def _ranked_counts(problem: Problem) -> Tensor:
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    x, found = problem.counts.tocsr(), np.zeros(len(problem.rows))
    for fit, test in problem.folds.split():
        model = LogisticRegression(C=10.0, max_iter=200, fit_intercept=False)
        model.fit(vstack([x[fit], -x[fit]]), np.repeat([1, 0], len(fit)))
        found[test] = model.decision_function(x[test])
    return ahead(torch.from_numpy(found))


def likelihoods(model: Model, at: Placed) -> Tensor:
    """[row] the sum of the log-probabilities of each row's tokens after its first, in nats."""
    found, done = torch.zeros(len(at.rows), dtype=torch.float64), 0
    for rows in batches(model, at.rows):
        run = model.run([list(at.rows[i]) for i in rows])
        for row, i in enumerate(rows):
            ids = torch.tensor(at.rows[i][1:], device=run.logits.device).unsqueeze(1)
            log_p = run.logits[row, : len(ids)].float().log_softmax(-1)
            found[i] = log_p.gather(1, ids).double().sum().cpu()
        current().report("reading likelihoods", done := done + len(rows), len(at.rows))
    return found
