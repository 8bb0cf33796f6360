"""Finding a circuit: by exact effects, by their estimate, by ACDC, or greedily."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.circuits._acdc import acdc
from microtome.circuits._bench import ABLATIONS, Bench, divergence
from microtome.circuits._circuit import Circuit, of_mask
from microtome.circuits._scores import from_scores, required
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.explain import Pairs, edge_effects, edge_scores, pairs_of
from microtome.metric import Metric
from microtome.model import Model

ESTIMATES = ("eap", "eap-ig", "clean-corrupted")
METHODS = ("acdc", *ESTIMATES, "exact", "greedy")
COSTS = ("kl", "metric")
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
    steps: int = 5,
) -> Circuit:
    """Find the circuit that carries an answer.

    Source:   acdc: Conmy et al., 2023 (arXiv 2304.14997); eap: Syed, Rager, Conmy, 2023 (arXiv 2310.10348); eap-ig,
              clean-corrupted and greedy: Hanna, Pezzelle, Belinkov, 2024 (arXiv 2403.17806).
    Departs:  edges into shared keys and values are separated by query head. The order of ACDC: see `_acdc.py`.
    Cost:     acdc: see `_acdc.py`; eap and greedy: two forwards and one backward a pair, clean-corrupted two
              backwards and eap-ig `steps`; exact: a cell an edge and pair, or a circuit each where `ablation` is not
              "resample".
    Check:    tests/laws/test_acdc.py, tests/laws/test_circuits.py, tests/planted/test_circuits.py.

    Args:
        model: the model.
        clean: prompts with the answers; or, without `corrupt`, a `Task` or the path of a file of pairs.
        corrupt: one per clean prompt, of the same number of tokens.
        method: "acdc"; or the edges of the largest mean score over pairs, from all: "eap", "eap-ig" or
            "clean-corrupted" (estimated, see `mt.explain.attribute`) or "exact" (measured); "greedy" takes those of
            "eap" from the logits back. `scores` are used instead where they are given.
        answer: one token, or one a pair, as `mt.explain.patch` takes it.
        foil: that of the corrupt prompts.
        metric: what is read instead.
        tau: of acdc: what an edge must cost to stay.
        cost: of acdc: "kl", from the clean distribution at the last position, in nats; or "metric", how much the
            metric falls.
        edges: of the others: how many, or a share below 1.
        scores: [sender, receiver] of another method, as `from_scores` takes them.
        ablation: what edges that are out give: "resample" (of the corrupt run; estimates are of this alone), "mean" (of
            the clean ones) or "zero".
        steps: of eap-ig: points between the prompts.

    Returns:
        A `Circuit`; what changes nothing is left out of it (`Circuit.pruned`), unless it is acdc's.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
        SiteError: the stream of the model is not a sum over its parts.
        ArgumentError: an option is none of those, estimates are asked for another ablation, or no edge is left.

    >>> mt.circuits.find(model, mt.tasks.build("ioi", model, n=8), tau=0.02)
    """
    _check(method, cost, ablation)
    if scores is None and method not in ("acdc", "exact"):
        require_resampling(method, ablation)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    about: dict[str, Any] = {"task": _task(clean), "pairs": len(pairs), "ablation": ablation, "seed": current().seed}
    about |= pairs.attrs()
    if method == "acdc":
        return _by_acdc(model, pairs, tau, cost, about)
    chosen = "eap" if method == "greedy" else method
    values = scores if scores is not None else mean_scores(model, pairs, chosen, ablation, steps)
    rule = "greedy" if method == "greedy" else "top"
    about["method"] = f"{method if scores is None else f'given scores, {rule}'}, {edges:g} edges"
    return from_scores(model, values, edges, rule=rule, **about)


def _by_acdc(model: Model, pairs: Pairs, tau: float, cost: str, about: dict[str, Any]) -> Circuit:
    bench = Bench(model, pairs, divergence(model, pairs) if cost == "kl" else None, about["ablation"])
    engines, sign = [engine for _, engine in bench.groups], 1.0 if cost == "kl" else -1.0
    found = acdc(engines, tau, sign=sign, report=current().counting("trying edges"))
    about |= {"method": f"acdc, tau {tau:g}, {cost}", "cost": found.cost, "rows": list(found.rows)}
    return required(of_mask(model, found.kept, found.costs, **about), f"each costs less than {tau:g}")


def _check(method: str, cost: str, ablation: str) -> None:
    """Refuse options that are none.

    Raises:
        ArgumentError: with those that are allowed.
    """
    for name, value, allowed in (("method", method, METHODS), ("cost", cost, COSTS), ("ablation", ablation, ABLATIONS)):
        if value not in allowed:
            raise error(ArgumentError, f"{name} must be one of {', '.join(allowed)}", got=repr(value), do="choose one")


def require_resampling(method: str, ablation: str) -> None:
    """Refuse estimates of what they do not estimate.

    Raises:
        ArgumentError: edges that are out give no other run's values.
    """
    if ablation != "resample":
        raise error(ArgumentError, f"{method} estimates what an edge does with the corrupt run's values",
                    got=f'ablation="{ablation}"', allowed="resample",
                    do="choose exact or acdc, which measure every ablation")  # fmt: skip


def mean_scores(
    model: Model, pairs: Pairs, method: str, ablation: str = "resample", steps: int = 5
) -> Float[Tensor, "sender receiver"]:
    """[sender, receiver] Mean change of the metric over pairs where an edge alone is out.

    Args:
        model: the model.
        pairs: as `mt.explain.pairs_of` gives them.
        method: "exact", measured; or an estimate: "eap", "eap-ig" or "clean-corrupted".
        ablation: what an edge that is out gives, see `find`.
        steps: of eap-ig: points between the prompts.

    Raises:
        ArgumentError: an estimate is asked for another ablation than "resample".
    """
    if method != "exact":
        require_resampling(method, ablation)
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
