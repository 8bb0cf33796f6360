"""The ways to find a subspace: by interchange, by variance, by a probe, by neurons, of a dictionary, or by chance.

Formula:  see the head of subspaces/_learned.py for what is learned. Of what is not, with X the vectors at the places of
          the swaps that want a cause, and y the token that each stands for:
          pca      the principal components of X, those with the largest F of an analysis of variance of y first
          probe    the span of the coefficients of a multinomial logistic regression of y on X, largest first
          neurons  the coordinates with the largest F of y
          dictionary  the features of a dictionary with the largest F of y, or the largest weights of a probe of y; see
                   the head of subspaces/_dictionary.py
          random   a random rotation;  whole: the whole space
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError, PromptError, error
from microtome.model import Model
from microtome.subspaces._dictionary import Dictionary
from microtome.subspaces._exchange import Exchange, Runs
from microtome.subspaces._learned import Plan, boundless, neuron_mask, rotation
from microtome.subspaces._subspace import Subspace
from microtome.subspaces._swaps import Swaps, require_known, require_rank, require_swaps

METHODS = ("das", "mdas", "boundless", "mask", "pca", "probe", "neurons", "dictionary", "random", "whole")
CHOOSE = ("difference", "probe")
LEARNED = {"das": rotation, "mdas": rotation, "boundless": boundless, "mask": neuron_mask}
LR = {"das": 0.01, "mdas": 0.01, "boundless": 0.005, "mask": 0.05}
"""Learning rates that are ours: no paper gives one for models of this size."""
Given = Dictionary | Tensor | Mapping[str, Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class Features:
    """A dictionary, and how its features are chosen."""

    dictionary: Dictionary
    choose: str = "difference"


def features_of(given: Given | None, method: str, choose: str = "difference") -> Features | None:
    """The dictionary that was given, with how its features are chosen.

    Raises:
        ArgumentError: it is given to another method or missing, is no dictionary, or there is no such choice.
        DataError: its file cannot be read.
    """
    if (given is None) == (method == "dictionary"):
        got = f'method="{method}" and {"no dictionary" if given is None else "a dictionary"}'
        do = 'give method="dictionary" and dictionary='
        raise error(ArgumentError, "a dictionary and its method go together", got=got, do=do)
    if choose not in CHOOSE:
        allowed, do = ", ".join(CHOOSE), "name one of these"
        raise error(ArgumentError, "no such way to choose features", got=repr(choose), allowed=allowed, do=do)
    return None if given is None else Features(Dictionary.read(given), choose)


def prepared(model: Model, swaps: Swaps, site: str, runs: Runs | None = None) -> tuple[Exchange, float]:
    """The swaps that the model answers, ready to be run, and their share; with runs of their prompts, if there are.

    Raises:
        PromptError: it answers none of the base prompts, or no swap wants a cause.
        ArgumentError: they are no `Swaps`.
    """
    require_swaps(swaps)
    model.require_next_token()
    ready = Exchange(model, site, swaps.swaps, runs)
    kept, share = require_known(swaps, ready.known, model.anatomy.name)
    if not len(kept.of("cause")):
        raise error(PromptError, "no swap wants a cause", got=repr(kept), do="give some whose label is the source's")
    return (ready if share == 1.0 else Exchange(model, site, kept.swaps, ready.runs)), share


def found_in(
    ready: Exchange,
    method: str,
    plan: Plan,
    known: float,
    *,
    given_lr: float | None = None,
    features: Features | None = None,
) -> Subspace:
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
    if features is not None and method == "dictionary":
        return _of_features(ready, features, plan, known)
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
    return Subspace(site, basis, method, known_of["model"], known_of["fingerprint"], attrs)


def _of_features(ready: Exchange, features: Features, plan: Plan, known: float) -> Subspace:
    """The features of a dictionary that tell the answers of the swaps best, with their span.

    Raises:
        ArgumentError: the dictionary is not as wide as the site, or has fewer features than are to be chosen.
    """
    site, whole = ready.address, features.dictionary
    if whole.directions.shape[1] != ready.width:
        got, do = f"directions of {whole.directions.shape[1]}", "give one of this site"
        what = f"the dictionary is not as wide as {site}"
        raise error(ArgumentError, what, got=got, allowed=str(ready.width), do=do)
    if plan.rank > len(whole):
        what, do = "the dictionary has fewer features than are to be chosen", "choose fewer"
        raise error(ArgumentError, what, got=plan.rank, allowed=f"1 to {len(whole)}", do=do)
    x, y = _labelled(ready)
    order = {"difference": _by_f, "probe": _by_weight}[features.choose](whole.codes(torch.from_numpy(x)).numpy(), y)
    chosen = [int(i) for i in order[: plan.rank]]
    part = whole.only(chosen)
    attrs = {"known": known, "swaps": len(ready), "features": chosen, "choose": features.choose, "of": len(whole)}
    found = Subspace.of(ready.model, site, part.directions, "dictionary", **attrs)
    return found if part.encoder is None else replace(found, codes=part)


def _labelled(ready: Exchange) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of the swaps that want a cause, and the token that each stands for."""
    which = [i for i, swap in enumerate(ready.swaps) if swap.wants == "cause"]
    x = torch.cat([ready.source[which], ready.base[which]]).double().cpu().numpy()
    y = [ready.swaps[i].label for i in which] + [ready.swaps[i].own for i in which]
    return x, np.array(y)


def _by_f(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The columns of x, the one that tells y best first."""
    from sklearn.feature_selection import f_classif

    _require_answers(y)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # a constant column has no F
        f, _ = f_classif(x, y)
    return np.argsort(-np.nan_to_num(f, nan=-1.0, posinf=np.finfo(float).max), kind="stable")


def _by_weight(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The columns of x, the one that a probe of y weighs most first; each in units of its spread."""
    from sklearn.linear_model import LogisticRegression

    _require_answers(y)
    spread = x.std(0)
    fitted = LogisticRegression(max_iter=1000).fit((x - x.mean(0)) / np.where(spread > 0, spread, 1.0), y)
    return np.argsort(-np.linalg.norm(fitted.coef_, axis=0), kind="stable")


def _require_answers(y: np.ndarray) -> None:
    """Refuse swaps of one answer.

    Raises:
        PromptError: they are.
    """
    if len(set(y.tolist())) < 2:
        raise error(PromptError, "the swaps have one answer alone", do="give swaps of several answers")


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
    _require_answers(y)
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
