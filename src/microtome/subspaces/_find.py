"""A subspace of a site, found with swaps in one of the ways of subspaces/_ways.py."""

from __future__ import annotations

from dataclasses import replace

from microtome.context import current
from microtome.model import Model
from microtome.subspaces._reader import has_reader
from microtome.subspaces._score import read_parts
from microtome.subspaces._subspace import Subspace
from microtome.subspaces._swaps import Swaps
from microtome.subspaces._ways import Given, Plan, features_of, found_in, prepared


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
    dictionary: Given | None = None,
    choose: str = "difference",
    seed: int | None = None,
) -> Subspace:
    """Find the subspace of a site that carries what the swaps want to be changed.

    Formula:  see the heads of subspaces/_ways.py and subspaces/_learned.py.
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
        rank: of the subspace, or the number of features of a dictionary; not of "boundless" and "mask", which choose
            it, and of "whole".
        method: "das" learns from swaps that want a cause alone, "mdas", "boundless" and "mask" from both kinds.
        isolate: weight of the swaps that should change nothing.
        steps: of the training.
        lr: learning rate; that of the method by default.
        rows: swaps per step.
        sparsity: weight of the mean of the mask, of "boundless" and "mask"; above 0, so that dimensions that do not
            matter are left out.
        dictionary: of "dictionary": directions [feature, d], a sparse autoencoder, or a file; see `Dictionary.read`.
        choose: how its features are chosen: by the "difference" of their codes between answers (largest F), or by the
            weights of a "probe" of the answer.
        seed: of the start and the draws; that of the settings by default.

    Returns:
        A `Subspace`. Its attrs say how it was trained, and `known`, the share of base prompts that the model answers as
        the swaps say; the others are left out. Where one matrix reads the site (neurons, a head) they say too how much
        of the subspace is read, `row_share`, and how often the swaps that want a cause succeed with its part in that
        matrix's row space alone, `cause_row`, and with the rest, `cause_null`: see `split_direction`. Of a dictionary
        with an encoder `codes` are swapped in place of the projection.

    Raises:
        PromptError: the model answers none of the base prompts as the swaps say, or none wants a cause.
        SiteError: the site is not one place of one layer.
        ArgumentError: the rank is too large, there is no such method, they are no `Swaps`, or a dictionary does not
            fit.
        DataError: the file of the dictionary cannot be read.
        FitError: a mask did not decide, or the loss is no number.
    """
    features = features_of(dictionary, method, choose)
    ready, known = prepared(model, swaps, site)
    plan = Plan(
        rank, isolate, steps, 0.0 if lr is None else lr, rows, sparsity, current().seed if seed is None else seed
    )
    found = found_in(ready, method, plan, known, given_lr=lr, features=features)
    if not has_reader(found.site) or not found.rank:
        return found
    return replace(found, attrs={**found.attrs, **read_parts(ready, found, "dividing")})
