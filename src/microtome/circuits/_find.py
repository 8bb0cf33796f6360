"""Finding a circuit: by exact effects, by their estimate, by ACDC, or greedily."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome.circuits._acdc import acdc
from microtome.circuits._bench import ABLATIONS, Bench, divergence
from microtome.circuits._circuit import Circuit, of_mask
from microtome.circuits._scores import from_scores
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.explain import Pairs, attribute, edge_effects, pairs_of
from microtome.metric import Metric
from microtome.model import Model

METHODS = ("acdc", "eap", "exact", "greedy")
COSTS = ("kl", "metric")


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
) -> Circuit:
    """Find the circuit that carries an answer.

    Source:   acdc: Conmy et al., 2023 (arXiv 2304.14997); eap: Syed, Rager, Conmy, 2023 (arXiv 2310.10348); greedy:
              Hanna, Pezzelle, Belinkov, 2024 (arXiv 2403.17806).
    Departs:  edges into shared keys and values are separated by query head. ACDC tries receivers from the last to the
              first, and of each the senders from the last to the first.
    Cost:     acdc: see `_acdc.py`; eap and greedy: two forwards and one backward a pair; exact: a cell an edge and
              pair.
    Check:    tests/laws/test_acdc.py, tests/laws/test_circuits.py, tests/planted/test_circuits.py.

    Args:
        model: the model.
        clean: prompts with the answers; or, without `corrupt`, a `Task` or the path of a file of pairs.
        corrupt: one per clean prompt, of the same number of tokens.
        method: "acdc"; or the edges of the largest mean score over pairs: "eap" (estimated), "exact" (measured), each
            from all; "greedy" takes them from the logits back. `scores` are used instead of those of "eap" and
            "greedy" where they are given.
        answer: one token, or one a pair, as `mt.explain.patch` takes it.
        foil: that of the corrupt prompts.
        metric: what is read instead.
        tau: of acdc: what an edge must cost to stay.
        cost: of acdc: "kl", from the clean distribution at the last position, in nats; or "metric", how much the
            metric falls.
        edges: of the others: how many, or a share below 1.
        scores: [sender, receiver] of another method, as `from_scores` takes them.
        ablation: what edges that are out give: "resample" (of the corrupt run), "mean" (of the clean ones) or "zero".

    Returns:
        A `Circuit`; what lies on no way from the embedding to the logits is left out of it, unless it is acdc's.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
        SiteError: the stream of the model is not a sum over its parts.
        ArgumentError: an option is none of those.

    >>> mt.circuits.find(model, mt.tasks.build("ioi", model, n=8), tau=0.02)
    """
    _check(method, cost, ablation)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    about: dict[str, Any] = {
        "task": _task(clean),
        "pairs": len(pairs),
        "ablation": ablation,
        "seed": current().seed,
    } | pairs.attrs()
    if method == "acdc":
        bench = Bench(model, pairs, divergence(model, pairs) if cost == "kl" else None, ablation)
        engines, sign = [engine for _, engine in bench.groups], 1.0 if cost == "kl" else -1.0
        found = acdc(engines, tau, sign=sign, report=current().counting("trying edges"))
        about |= {"method": f"acdc, tau {tau:g}, {cost}", "cost": found.cost, "rows": list(found.rows)}
        return of_mask(model, found.kept, found.costs, **about)
    values = scores if scores is not None else mean_scores(model, pairs, "exact" if method == "exact" else "eap")
    rule = "greedy" if method == "greedy" else "top"
    about["method"] = f"{method if scores is None else f'given scores, {rule}'}, {edges:g} edges"
    return from_scores(model, values, edges, rule=rule, **about)


def _check(method: str, cost: str, ablation: str) -> None:
    """Refuse options that are none.

    Raises:
        ArgumentError: with those that are allowed.
    """
    for name, value, allowed in (("method", method, METHODS), ("cost", cost, COSTS), ("ablation", ablation, ABLATIONS)):
        if value not in allowed:
            raise error(ArgumentError, f"{name} must be one of {', '.join(allowed)}", got=repr(value), do="choose one")


def mean_scores(model: Model, pairs: Pairs, method: str) -> Tensor:
    """[sender, receiver] Mean change of the metric over pairs where an edge gives the corrupt run's values.

    Args:
        model: the model.
        pairs: as `mt.explain.pairs_of` gives them.
        method: "eap", by one gradient; or "exact", measured.
    """
    total, report = torch.zeros(()), current().counting("scoring pairs")
    for i in range(len(pairs)):
        one = pairs[i : i + 1]
        clean, corrupt = (side.tolist() for side in one.tokens[0])
        if method == "exact":
            found = edge_effects(model, clean, corrupt, metric=one.metric, direction="noise")["effect"]
        else:
            ids: dict[str, Any] = {"answer": one.answer_ids[0], "foil": one.foil_ids[0] if one.foil_ids else None}
            found = attribute(model, clean, corrupt, method="eap", direction="noise", verify=0, **ids)["score"]
        total = total + torch.from_numpy(found.values.copy()).double()
        report(i + 1, len(pairs))
    return total / len(pairs)


def _task(clean: Any) -> str:
    name = getattr(clean, "name", None)
    return str(name) if name else "pairs"
