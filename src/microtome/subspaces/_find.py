"""Subspaces found in one of several ways: by interchange, by variance, by a probe, by neurons, or by chance.

Formula:  see the head of subspaces/_learned.py for what is learned. Of what is not, with X the vectors at the places of
          the swaps that want a cause, and y the token that each stands for:
          pca      the principal components of X, those with the largest F of an analysis of variance of y first
          probe    the span of the coefficients of a multinomial logistic regression of y on X, largest first
          neurons  the coordinates with the largest F of y
          random   a random rotation;  whole: the whole space
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, PromptError, error
from microtome.model import Model
from microtome.subspaces._exchange import Exchange
from microtome.subspaces._learned import Plan, boundless, neuron_mask, rotation
from microtome.subspaces._reader import has_reader, reader, row_share
from microtome.subspaces._subspace import Subspace
from microtome.subspaces._swaps import Swaps, require_known, require_rank, require_swaps

METHODS = ("das", "mdas", "boundless", "mask", "pca", "probe", "neurons", "random", "whole")
LEARNED = {"das": rotation, "mdas": rotation, "boundless": boundless, "mask": neuron_mask}
LR = {"das": 0.01, "mdas": 0.01, "boundless": 0.005, "mask": 0.05}
"""Learning rates that are ours: no paper gives one for models of this size."""


def find(
    model: Model,
    swaps: Swaps,
    site: str,
    rank: int,
    *,
    method: str = "das",
    isolate: float = 1.0,
    steps: int = 200,
    lr: float | None = None,
    rows: int = 16,
    sparsity: float = 0.01,
    seed: int | None = None,
) -> Subspace:
    """Find the subspace of a site that carries what the swaps want to be changed.

    Formula:  see the heads of subspaces/_find.py and subspaces/_learned.py.
    Source:   Geiger et al., "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
              Representations", 2023 (arXiv 2303.02536), DAS; Wu et al., "Interpretability at Scale: Identifying Causal
              Mechanisms in Alpaca", 2023 (arXiv 2305.08809), boundless DAS; Huang et al., 2024 (arXiv 2402.17700), MDAS
              and the neuron mask. Departs: DAS by QR and not by a product of reflections; learning rates and
              temperatures are ours; components and neurons are ranked by an F statistic.
    Cost:     a forward of every prompt; where it is learned, steps x rows forwards and backwards from the site's layer
              on.
    Check:    a planted rotation is found, and missed by neurons; tests/planted/test_subspaces.py.

    Args:
        model: a causal model.
        swaps: the interchanges to learn from.
        site: one site of one layer, such as "12.resid_post".
        rank: of the subspace; not of "boundless" and "mask", which choose it, and of "whole".
        method: "das" learns from swaps that want a cause alone, "mdas", "boundless" and "mask" from both kinds.
        isolate: weight of the swaps that should change nothing.
        steps: of the training.
        lr: learning rate; that of the method by default.
        rows: swaps per step.
        sparsity: weight of the mean of the mask, of "boundless" and "mask"; above 0, so that dimensions that do not
            matter are left out.
        seed: of the start and the draws; that of the settings by default.

    Returns:
        A `Subspace`. Its attrs say how it was trained, and `known`, the share of base prompts that the model answers as
        the swaps say; the others are left out. Of neurons and heads they say `row_share`, how much of it is read at
        all: see `split_direction`.

    Raises:
        PromptError: the model answers none of the base prompts as the swaps say, or none wants a cause.
        SiteError: the site is not one place of one layer.
        ArgumentError: the rank is larger than the site, there is no such method, or they are no `Swaps`.
        FitError: a mask did not decide, or the loss is no number.
    """
    ready, known = prepared(model, swaps, site)
    plan = Plan(
        rank, isolate, steps, 0.0 if lr is None else lr, rows, sparsity, current().seed if seed is None else seed
    )
    return found_in(ready, method, plan, known, given_lr=lr)


def prepared(model: Model, swaps: Swaps, site: str) -> tuple[Exchange, float]:
    """The swaps that the model answers, ready to be run, and their share.

    Raises:
        PromptError: it answers none of the base prompts, or no swap wants a cause.
        ArgumentError: they are no `Swaps`.
    """
    require_swaps(swaps)
    model.require_next_token()
    ready = Exchange(model, site, swaps.swaps)
    kept, share = require_known(swaps, ready.known, model.anatomy.name)
    if not len(kept.of("cause")):
        raise error(PromptError, "no swap wants a cause", got=repr(kept), do="give some whose label is the source's")
    return (ready if share == 1.0 else Exchange(model, site, kept.swaps)), share


def found_in(ready: Exchange, method: str, plan: Plan, known: float, *, given_lr: float | None = None) -> Subspace:
    """The subspace that a method finds with swaps that are ready to be run.

    Raises:
        ArgumentError: the rank is larger than the site, or there is no such method.
    """
    if method not in METHODS:
        do = "name one of these"
        raise error(
            ArgumentError, "no such way to find a subspace", got=repr(method), allowed=", ".join(METHODS), do=do
        )
    model, site = ready.model, ready.address
    if method not in ("boundless", "mask", "whole"):
        require_rank(plan.rank, ready.width, site)
    attrs: dict[str, Any] = {"known": known, "swaps": len(ready)}
    if method in LEARNED:
        weight = 0.0 if method == "das" else plan.isolate
        plan = replace(plan, isolate=weight, lr=LR[method] if given_lr is None else given_lr)
        basis, more = LEARNED[method](ready, plan)
        attrs |= more
    else:
        basis = CHOSEN[method](ready, plan)
        attrs |= {"seed": plan.seed}
    known_of = model.provenance
    found = Subspace(site, basis, method, known_of["model"], known_of["fingerprint"], attrs)
    if not has_reader(site):
        return found
    return replace(found, attrs=attrs | {"row_share": row_share(found, reader(model, site))})


def _labelled(ready: Exchange) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of the swaps that want a cause, and the token that each stands for."""
    which = [i for i, swap in enumerate(ready.swaps) if swap.wants == "cause"]
    x = torch.cat([ready.source[which], ready.base[which]]).double().cpu().numpy()
    y = [ready.swaps[i].label for i in which] + [ready.swaps[i].own for i in which]
    return x, np.array(y)


def _by_f(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The columns of x, the one that tells y best first."""
    from sklearn.feature_selection import f_classif

    if len(set(y.tolist())) < 2:
        raise error(PromptError, "the swaps have one answer alone", do="give swaps of several answers")
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # a constant column has no F
        f, _ = f_classif(x, y)
    return np.argsort(-np.nan_to_num(f, nan=-1.0, posinf=np.finfo(float).max), kind="stable")


def _pca(ready: Exchange, plan: Plan) -> Tensor:
    x, y = _labelled(ready)
    centred = x - x.mean(0)
    _, size, components = np.linalg.svd(centred, full_matrices=True)
    size = np.pad(size, (0, len(components) - len(size)))
    order = _by_f(centred @ components.T, y)
    order = order[np.argsort(size[order] <= size.max() * 1e-10, kind="stable")]  # what does not vary comes last
    return torch.from_numpy(components[order[: plan.rank]].copy())


def _probe(ready: Exchange, plan: Plan) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    x, y = _labelled(ready)
    if len(set(y.tolist())) < 2:
        raise error(PromptError, "the swaps have one answer alone", do="give swaps of several answers")
    # One scale for all: with one for each coordinate, those that hardly vary would carry the directions.
    fitted = LogisticRegression(max_iter=1000).fit((x - x.mean(0)) / x.std(0).max(), y)
    _, size, directions = np.linalg.svd(fitted.coef_, full_matrices=False)
    kept = min(plan.rank, int((size > size.max() * 1e-10).sum()))
    return torch.from_numpy(directions[:kept].copy())


def _neurons(ready: Exchange, plan: Plan) -> Tensor:
    best = _by_f(*_labelled(ready))[: plan.rank]
    return torch.eye(ready.width, dtype=torch.float64)[torch.from_numpy(best.copy())]


def random_basis(width: int, rank: int, seed: int) -> Tensor:
    """[rank, width] a random subspace."""
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, generator=rng)).Q.T


def _random(ready: Exchange, plan: Plan) -> Tensor:
    return random_basis(ready.width, plan.rank, plan.seed)


def _whole(ready: Exchange, plan: Plan) -> Tensor:
    return torch.eye(ready.width, dtype=torch.float64)


CHOSEN: dict[str, Callable[[Exchange, Plan], Tensor]] = {
    "pca": _pca, "probe": _probe, "neurons": _neurons, "random": _random, "whole": _whole,
}  # fmt: skip
