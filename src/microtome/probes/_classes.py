"""Probes of classes: accuracy on rows held out beside its controls, code lengths, and mixtures of layers.

Formula:  accuracy = share of rows whose class a probe names that was fitted on the other folds.
          control_task: the same with labels dealt to types at random; untrained: with the states of a model of the same
          form with untrained weights; surface: a logistic regression on hashed counts of tokens, pairs and letters;
          majority: the most frequent class of the other folds. selectivity = accuracy - control_task.
          shifted: accuracy on the groups of a shift of a probe fitted on all others, beside that of the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.probes._mdl import code_length, portions
from microtome.probes._mix import mixed, similarities
from microtome.probes._problem import Folds as Folds
from microtome.probes._problem import Outcome, Problem, with_ends, with_shares
from microtome.probes._readers import Fitter as Fitter
from microtome.probes._readers import Reader, linear, mass_mean, small_network, sparse
from microtome.probes._surface import majority_predictions, surface_predictions


def fitter_of(problem: Problem, kind: str, l2: float, k: int, hidden: int) -> Fitter:
    """What fits a probe of a kind.

    Raises:
        ArgumentError: k units are more than a site has.
    """
    if kind == "mass-mean":
        return mass_mean
    if kind == "sparse":
        least = min(x.shape[1] for x in problem.states.values())
        if k > least:
            what = f"k must be an integer from 1 to {least}, the units of the site"
            raise error(ArgumentError, what, got=k, do="lower it")
        return sparse(l2, k)
    if kind in ("mlp", "kan"):
        return small_network(hidden, l2, problem.seed, learned=kind == "kan")
    return linear(l2)


def held_out(
    states: Mapping[Site, Tensor],
    problem: Problem,
    labels: np.ndarray,
    fitter: Fitter,
    stage: str,
    folds: Folds | None = None,
) -> dict[Site, Tensor]:
    """[row] by site and layer, 1 where the probe of the other folds names the label."""
    found: dict[Site, Tensor] = {}
    rows, n = torch.from_numpy(problem.rows), len(problem.classes)
    for done, (site, x) in enumerate(states.items()):
        x, hits = x[rows], torch.zeros(len(rows), dtype=torch.float64)
        for fit, test in (folds or problem.folds).split():
            named = fitter(x[fit], labels[fit], n).logits(x[test]).argmax(-1)
            hits[test] = (named == torch.from_numpy(labels[test])).double()
        found[site] = hits
        current().report(stage, done + 1, len(states))
    return found


def classes(problem: Problem, fitter: Fitter) -> Outcome:
    """Accuracy on rows held out, by site and layer, and that of the controls."""
    states, labels = problem.states, problem.inside
    hits = held_out(states, problem, labels, fitter, "probing")
    control = held_out(states, problem, problem.control, fitter, "probing the control task", problem.control_folds)
    known = 1.0 if problem.types_seen else float("nan")  # above chance it could not be: nothing to be above
    each = {"accuracy": problem.each(hits), "control_task": problem.each(control)}
    each["selectivity"] = problem.each({site: known * (x - control[site]) for site, x in hits.items()})
    if problem.blank is not None:
        each["untrained"] = problem.each(held_out(problem.blank, problem, labels, fitter, "probing an untrained model"))
    made = Outcome(each=each | surfaces(problem), readers=readers(problem, fitter), attrs=problem.told_of_control)
    units = {site: reader.tensors["units"] for site, reader in made.readers.items() if "units" in reader.tensors}
    if units:
        dims, grid = problem.grid(units)
        made.values["unit"] = ((*dims, "rank"), grid.movedim(0, -1))
    if len(problem.outside):
        made.values |= shifted(problem, made.readers)
    return made


def surfaces(problem: Problem) -> dict[str, Any]:
    """Accuracy of what needs no model, by group."""
    splits, y = problem.folds.split(), torch.from_numpy(problem.inside)
    found = {
        "surface": surface_predictions(problem.counts, problem.inside, splits),
        "majority": majority_predictions(problem.inside, splits),
    }
    return {name: ((), problem.folds.summed((x == y).double())) for name, x in found.items()}


def readers(problem: Problem, fitter: Fitter) -> dict[Site, Reader]:
    """The probes of all rows that are cross-validated."""
    rows, n = torch.from_numpy(problem.rows), len(problem.classes)
    return {site: fitter(x[rows], problem.inside, n) for site, x in problem.states.items()}


def shifted(problem: Problem, fitted: Mapping[Site, Reader]) -> dict[str, Any]:
    """Accuracy on the rows of a shift, and that of the last layer, over its groups."""
    rows = torch.from_numpy(problem.outside)
    y = torch.from_numpy(problem.labels[problem.outside])
    hits = {site: (fitted[site].logits(x[rows]).argmax(-1) == y).double() for site, x in problem.states.items()}
    names = problem.examples.groups or ()
    groups = np.unique([names[i] for i in problem.outside.tolist()], return_inverse=True)[1]
    there = Folds(groups, np.zeros_like(groups), named=True)
    dims, each = problem.grid({site: there.summed(x) for site, x in hits.items()})
    last = each[..., -1:]
    gaps = with_ends("x", each - last, dims, there.sizes)
    return (
        with_shares("shifted", each, dims, there.sizes)
        | with_shares("shifted_last", last[..., 0], dims[:-1], there.sizes)
        | {f"shifted_diff_{end}": (dims, gaps[f"x_{end}"][1].clamp(-1, 1)) for end in ("lo", "hi")}
    )


def code_lengths(problem: Problem, l2: float) -> Outcome:
    """Bits of the labels by the online code, of the control task, of an untrained model, and of the uniform code."""
    order, ends = portions(problem.folds.groups, problem.seed)
    rows, n = torch.from_numpy(problem.rows), len(problem.classes)
    todo = [("bits", problem.states, problem.inside), ("bits_control", problem.states, problem.control)]
    if problem.blank is not None:
        todo.append(("bits_untrained", problem.blank, problem.inside))
    values: dict[str, Any] = {}
    for name, states, y in todo:
        bits: dict[Site, Tensor] = {}
        for done, (site, x) in enumerate(states.items()):
            bits[site] = torch.tensor(code_length(x[rows], y, n, order, ends))
            current().report("coding labels", done + 1, len(states))
        values[name] = problem.grid(bits)
    uniform = len(rows) * float(np.log2(n))
    values["bits_uniform"] = uniform
    values["compression"] = (values["bits"][0], uniform / values["bits"][1])
    told = {"portions": ", ".join(map(str, ends))}
    return Outcome(values, readers=readers(problem, linear(l2)), attrs=told | problem.told_of_control)


def mixture(problem: Problem, l2: float) -> Outcome:
    """Weights of the layers of one site in a mixture, and its accuracy on rows held out.

    Raises:
        ArgumentError: the layers are not of one width, or there is one alone.
    """
    x = layers_of(problem)
    y, n = problem.inside, len(problem.classes)
    hits, shares = torch.zeros(len(y), dtype=torch.float64), list[Tensor]()
    for done, (fit, test) in enumerate(problem.folds.split()):
        share, weight, bias = mixed(x[:, fit], y[fit], n, l2, problem.seed)
        shares.append(share)
        named = (torch.einsum("l,lrw->rw", share, x[:, test]) @ weight.T + bias).argmax(-1)
        hits[test] = (named == torch.from_numpy(y[test])).double()
        current().report("mixing layers", done + 1, len(problem.folds))
    share, weight, bias = mixed(x, y, n, l2, problem.seed)
    norms = (x - x.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()
    values = {"mix_weight": (("layer",), torch.stack(shares).mean(0)), "mix_norm": (("layer",), norms / norms.sum())}
    found = {
        site: Reader({"weight": weight, "bias": bias, "share": share[i].reshape(1)})
        for i, site in enumerate(problem.states)
    }
    return Outcome(values, {"together": ((), problem.folds.summed(hits))} | surfaces(problem), found)


def layers_of(problem: Problem) -> Tensor:
    """[layer, row, width] the states of all layers.

    Raises:
        ArgumentError: the layers are not of one width, or there is one alone.
    """
    widths = {x.shape[1] for x in problem.states.values()}
    if len(problem.sites) > 1 or len(widths) > 1 or len(problem.states) < 2:
        got = f"{len(problem.sites)} sites, {len(problem.states)} layers, widths {sorted(widths)}"
        what = "one probe of all layers needs several layers of one site and one width"
        raise error(ArgumentError, what, got=got, do='name one such as "*.resid_post@-1"')
    return torch.stack(list(problem.states.values()))[:, torch.from_numpy(problem.rows)]


def similarity(problem: Problem, fitter: Fitter, target: int) -> Outcome:
    """Accuracy, on rows held out, of a probe of the similarities with a concept's examples, a number a layer.

    Raises:
        ArgumentError: see `layers_of`.
    """
    x, groups, n = layers_of(problem), problem.folds.groups, len(problem.classes)
    each: dict[str, Any] = {}
    for name, y, folds in (
        ("together", problem.inside, problem.folds), ("together_control", problem.control, problem.control_folds),
    ):  # fmt: skip
        hits = torch.zeros(len(y), dtype=torch.float64)
        for fit, test in folds.split():
            seen = similarities(x, groups, fit[y[fit] == target])
            named = fitter(seen[fit], y[fit], n).logits(seen[test]).argmax(-1)
            hits[test] = (named == torch.from_numpy(y[test])).double()
        each[name] = ((), problem.folds.summed(hits))
    return Outcome(each=each | surfaces(problem), attrs=problem.told_of_control)
