"""Finding a circuit: by exact effects, by their estimate, by ACDC, greedily, or by a learned mask."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.circuits._acdc import acdc
from microtome.circuits._bench import JUDGED, OPTIMAL, Bench, divergence
from microtome.circuits._circuit import Circuit, of_mask, required
from microtome.circuits._mask import MASK_STEPS, Sparsification, by_mask
from microtome.circuits._scores import from_scores
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.explain import Pairs, edge_effects, edge_scores, pairs_of
from microtome.metric import Metric
from microtome.model import Model

ESTIMATES = ("eap", "eap-ig", "clean-corrupted")
METHODS = ("acdc", *ESTIMATES, "exact", "greedy", "mask", "signal")
COSTS = ("kl", "metric")
SPARSITY = 20.0
"""Nats that all edges cost together."""
POINTS = 5
"""Of eap-ig, between the prompts."""
TOGETHER = 64
"""Circuits without one edge whose masks are held at once."""


def find(
    model: Model,
    clean: Any,
    corrupt: Any = None,
    *,
    method: str = "acdc",
    answer: Any = None,
    foil: Any = None,
    metric: Metric | None = None,
    tau: float = 0.01,
    cost: str = "kl",
    edges: int | float = 0.01,
    scores: Any = None,
    ablation: str = "resample",
    steps: int | None = None,
    sparsity: float | None = None,
    mask: Sparsification | None = None,
) -> Circuit:
    """Find the circuit that carries an answer.

    Source:   acdc: Conmy et al., 2023 (arXiv 2304.14997); eap: Syed, Rager, Conmy, 2023 (arXiv 2310.10348); eap-ig,
              clean-corrupted and greedy: Hanna, Pezzelle, Belinkov, 2024 (arXiv 2403.17806); mask: see `_mask.py`.
    Departs:  edges into shared keys and values are separated by query head.
    Cost:     acdc, mask: see their files; eap and greedy: two forwards and one backward a pair, clean-corrupted two
              backwards and eap-ig `steps`; exact: a cell an edge and pair, or a circuit each.
    Check:    tests/laws/test_acdc.py, tests/laws/test_circuits.py, tests/laws/test_masks.py.

    Args:
        model: the model.
        clean: prompts with the answers; or, without `corrupt`, a `Task` or the path of a file of pairs.
        corrupt: one per clean prompt, of the same number of tokens.
        method: "acdc"; or the edges of the largest mean score over pairs, from all: "eap", "eap-ig" or
            "clean-corrupted" (estimated, see `mt.explain.attribute`) or "exact" (measured); "greedy" takes those of
            "eap" from the logits back; "mask": a learned gate each; "signal": `_traced.py`. `scores` are used instead.
        answer: one token, or one a pair, as `mt.explain.patch` takes it.
        foil: that of the corrupt prompts.
        metric: what is read instead.
        tau: of acdc: what an edge must cost to stay.
        cost: of acdc and mask: "kl" from the clean distribution at the last position, or "metric", how far that falls.
        edges: of the others: how many, or a share below 1.
        scores: [sender, receiver] of another method, as `from_scores` takes them; not of acdc or mask.
        ablation: what edges that are out give: "resample" (of the corrupt run), "mean" (of the clean ones), "zero" or
            "optimal" (a mask learns these; eap is at the mean). eap-ig and clean-corrupted rank by resampling always.
        steps: of eap-ig: points between the prompts, 5 by default; of mask: of the training at most, 300; at least 1.
        sparsity: of mask: what all edges cost together, in units of `cost`, 20 by default.
        mask: of mask: how it is learned, in place of `steps` and `sparsity`.

    Returns:
        A `Circuit`; what changes nothing is left out of it (`Circuit.pruned`), unless it is acdc's.

    Raises:
        PromptError, SiteError: the pairs do not align, there is nothing to read, or the stream is no sum.
        ArgumentError, FitError: an option is none of those or has no use, no edge is left, or the mask did not decide.

    >>> mt.circuits.find(model, mt.tasks.build("ioi", model, n=8), tau=0.02)
    """
    _check(method, cost, ablation, scores is not None)
    plan = _plan(method, steps, sparsity, scores is not None, mask)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    about: dict[str, Any] = {"task": _task(clean), "ablation": ablation, "seed": current().seed} | pairs.attrs()
    if method == "acdc":
        return _by_acdc(model, pairs, tau, cost, about)
    if method == "mask":
        return by_mask(model, pairs, plan, cost, about)
    chosen = "eap" if method == "greedy" else method
    values = scores if scores is not None else mean_scores(model, pairs, chosen, ablation, steps or POINTS)
    rule = "greedy" if method == "greedy" else "top"
    about |= {} if scores is not None else ranked_by(chosen, ablation)
    about["method"] = f"{method if scores is None else f'given scores, {rule}'}, {edges:g} edges"
    return from_scores(model, values, edges, rule=rule, **about)


def _by_acdc(model: Model, pairs: Pairs, tau: float, cost: str, about: dict[str, Any]) -> Circuit:
    bench = Bench(model, pairs, divergence(model, pairs) if cost == "kl" else None, about["ablation"])
    engines, sign = [engine for _, engine in bench.groups], 1.0 if cost == "kl" else -1.0
    found = acdc(engines, tau, sign=sign, report=current().counting("trying edges"))
    about |= {"method": f"acdc, tau {tau:g}, {cost}", "cost": found.cost, "rows": list(found.rows)}
    return required(of_mask(model, found.kept, found.costs, **about), f"each costs less than {tau:g}")


def _check(method: str, cost: str, ablation: str, scored: bool) -> None:
    """Refuse options that are none.

    Raises:
        ArgumentError: with those that are allowed.
    """
    for name, value, allowed in (("method", method, METHODS), ("cost", cost, COSTS), ("ablation", ablation, JUDGED)):
        if value not in allowed:
            raise error(ArgumentError, f"{name} must be one of {', '.join(allowed)}", got=repr(value), do="choose one")
    if method == "acdc" or not scored:
        require_constants(method, ablation)
    if method == "mask" and ablation == "zero":
        raise error(ArgumentError, "a mask cannot be learned against zero: norms undo a small share of every input, so "
                    "that gates near 0 keep the whole model", got='ablation="zero"',
                    allowed="resample, mean, optimal", do="choose one of these")  # fmt: skip


def _plan(
    method: str, steps: int | None, sparsity: float | None, scored: bool, mask: Sparsification | None
) -> Sparsification:
    """How a mask is learned, if one is; refuses steps that are none, and options that would not be used.

    Raises:
        ArgumentError: there are some.
    """
    if steps is not None and steps < 1:
        raise error(ArgumentError, "steps of a method", got=str(steps), allowed="1 or more", do="choose another value")
    if scored and method in ("acdc", "mask"):
        raise error(ArgumentError, f"{method} finds its edges without scores", got="scores=",
                    do="leave it out, or choose a method that ranks edges, such as eap")  # fmt: skip
    if mask is not None and method != "mask":
        raise error(ArgumentError, f"{method} learns no mask", got="mask=", do='leave it out, or choose method="mask"')
    twice = [name for name, x in (("steps", steps), ("sparsity", sparsity)) if x is not None]
    if mask is not None and twice:
        raise error(ArgumentError, "mask= says how a mask is learned", got=f"{' and '.join(twice)} too",
                    do="give one of them")  # fmt: skip
    if mask is not None:
        return mask
    return Sparsification(SPARSITY if sparsity is None else sparsity, MASK_STEPS if steps is None else steps)


def require_constants(method: str, ablation: str) -> None:
    """Refuse optimal constants where they would be fitted anew for every edge.

    Raises:
        ArgumentError: they would be.
    """
    if ablation == OPTIMAL and method in ("acdc", "exact"):
        raise error(ArgumentError, f"{method} would fit optimal constants anew for every edge", got='"optimal"',
                    allowed="resample, mean, zero", do="choose mask, which learns them along, or eap")  # fmt: skip


def ranked_by(method: str, ablation: str) -> dict[str, str]:
    """What an estimate says edges that are out give, if it is not what they do give."""
    if method == "exact" or ablation == "resample":
        return {}
    if method in ("eap", "signal"):
        return {"ranked_by": "mean"} if ablation == OPTIMAL else {}
    return {"ranked_by": "resample"}


def mean_scores(
    model: Model, pairs: Pairs, method: str, ablation: str = "resample", steps: int = POINTS
) -> Float[Tensor, "sender receiver"]:
    """[sender, receiver] Mean change of the metric over pairs where an edge alone is out.

    Args:
        model: the model.
        pairs: as `mt.explain.pairs_of` gives them.
        method: "exact", measured; or an estimate: "eap", "eap-ig" or "clean-corrupted".
        ablation: what an edge that is out gives, see `find`; the last two estimate resampling whatever it is.
        steps: of eap-ig: points between the prompts.

    Raises:
        ArgumentError: optimal constants would be fitted for every edge.
    """
    require_constants(method, ablation)
    if method == "eap" and ablation != "resample":
        return Bench(model, pairs, None, "mean" if ablation == OPTIMAL else ablation).first_order()
    if method == "signal":
        return Bench(model, pairs, None, "mean" if ablation == OPTIMAL else ablation).by_signals()
    if method != "exact":
        return edge_scores(model, pairs, "noise", method=method, steps=steps, rules=None).scores.mean(0)
    if ablation != "resample":
        bench = Bench(model, pairs, None, ablation)
        return effects_of(bench, bench.edges.nonzero().cpu())
    total, report = torch.zeros(()), current().counting("scoring pairs")
    for i in range(len(pairs)):
        one = pairs[i : i + 1]
        clean, corrupt = (side.tolist() for side in one.tokens[0])
        found = edge_effects(model, clean, corrupt, metric=one.metric, direction="noise")["effect"]
        total = total + torch.from_numpy(found.values.copy()).double()
        report(i + 1, len(pairs))
    return total / len(pairs)


def rival(model: Model, pairs: Pairs, edges: int) -> Bool[Tensor, "sender receiver"]:
    """As many edges of the largest scores by EAP-IG, what a circuit of that size stands beside."""
    return from_scores(model, mean_scores(model, pairs, "eap-ig"), edges, prune=False).kept


def effects_of(bench: Bench, places: Int[Tensor, "edge 2"]) -> Float[Tensor, "sender receiver"]:
    """[sender, receiver] The mean change of the metric where one edge alone is out, of some edges; NaN elsewhere."""
    edges = bench.edges.cpu()
    found, clean = torch.full(edges.shape, torch.nan, dtype=torch.float64), bench.clean
    for some in places.split(TOGETHER):
        masks = edges.repeat(len(some), 1, 1)
        masks[torch.arange(len(some)), some[:, 0], some[:, 1]] = False
        found[some[:, 0], some[:, 1]] = (bench.measure(masks, "measuring edges") - clean).mean(1)
    return found


def _task(clean: Any) -> str:
    name = getattr(clean, "name", None)
    return str(name) if name else "pairs"
