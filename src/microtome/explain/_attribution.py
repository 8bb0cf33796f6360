"""Attribution: what every activation or edge would do to the answer, estimated from one gradient.

Formula:  node  score(n)      = (n_goal - n_start) . R_n,      summed over the axes that a cell covers;
          edge  score(u -> v) = (u_goal - u_start) . R_in(v),  summed over positions and d_model,
          where R is the gradient of the metric m in the start run, taken with the method's backward rules. Both are the
          first-order part of m(cell) - m(start), the effect that a sweep measures: same unit, same sign.
Source:   Kramár, Lieberum, Shah, Nanda, "AtP*: An efficient and scalable method for localizing LLM behaviour to
          components", 2024 (arXiv 2403.00745); Syed, Rager, Conmy, "Attribution Patching Outperforms Automated Circuit
          Discovery", 2023 (arXiv 2310.10348); Jafari, Eberle, Khakzar, Nanda, "RelP: Faithful and Efficient Circuit
          Discovery in Language Models via Relevance Patching", 2025 (arXiv 2508.21258).
Rules:    plain gradients (AtP, EAP), or those of RelP: norms x / sg[scale], attention sg[A] v, activations
          x sg[act(x) / x], products y/2 + sg[y/2] with y = gate * up, where sg stops the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.edit import Freeze
from microtome.explain._contributions import one_token
from microtome.explain._edge_scores import captures, changes, contract
from microtome.explain._graph import graph
from microtome.explain._pair import Pair
from microtome.explain._patching import (
    BY_POSITION,
    Layout,
    aligned,
    every_position,
    layout,
    metric_words,
    refuse_blind,
    refuse_unknown,
    refuse_wrong,
)
from microtome.explain._verify import verify as measured
from microtome.model import Model
from microtome.run import Prompt, Run
from microtome.sweep import SweepPlan

if TYPE_CHECKING:
    import xarray as xr

RELP = Freeze(norms=True, patterns=True, activations="ratio", half_products=True)
"""The backward rules of RelP."""

_NAMES = {"atp": "attribution patching", "relp": "RelP", "eap": "edge attribution patching"}
_SITES = ("resid_pre", "attn_out", "mlp_out", "attn.z[head]")


def attribute(
    model: Model,
    clean: Prompt,
    corrupt: Prompt,
    *,
    answer: str | int,
    foil: str | int | None = None,
    method: str = "atp",
    sites: Sequence[str] = _SITES,
    rules: Freeze | None = None,
    direction: str = "noise",
    verify: int = 50,
    seed: int = 0,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """Estimate what every node or edge would do to the answer, from one gradient, and measure the best ones exactly.

    Formula:  see the head of this file; m is the logit difference of answer and foil, or the answer's log-probability.
    Source:   AtP as in Kramár et al., 2024 (arXiv 2403.00745); EAP: Syed et al., 2023 (arXiv 2310.10348); RelP: Jafari
              et al., 2025 (arXiv 2508.21258); titles in the head of this file. Departs: edges into shared keys and
              values are told apart by query head; a norm behind a branch is gone through to first order.
    Cost:     two forwards and one backward. EAP forms all attention scores, and draws gradients back through the
              projections of each layer once a query head and input (q, k, v), which is not a backward of the model:
              memory is 3H + 1 gradients [pos, d_model] at a time. Checking is a sweep of 2 * verify cells a site.
    Check:    exact where the model is linear, otherwise wrong by O(eps^2); edges of a sender add up to its node;
              relevance is conserved; tests/laws/test_attribution.py.

    Args:
        model: an open model.
        clean: the prompt with the answer.
        corrupt: the same number of tokens, with another answer.
        answer: the clean prompt's answer, one token.
        foil: the corrupt prompt's answer; without it the answer's log-probability is read.
        method: "atp" or "relp" for nodes, "eap" for edges.
        sites: for nodes, as in `activation_patching`.
        rules: backward rules instead of the method's own: what a `Freeze` holds. ``RELP`` makes EAP into its RelP form.
        direction: "noise" starts at the clean prompt and puts corrupt values in, "denoise" the reverse.
        verify: how many of the best of each site to measure exactly, beside as many random others; 0 for none.
        seed: of the random others.
        budget: bytes that one walk of what is measured may hold.
        progress: called with (done, all) cells measured.
        on_plan: called with the plan of what is measured, before its first cell.

    Returns:
        Dataset of scores in logits (nats without a foil), unlike shares of the gap: positive where patching raises the
        metric. Nodes: a variable a site, over (layer, pos) or (layer, unit). Edges: `score` over (sender, receiver),
        NaN where there is no edge. `clean` and `corrupt` hold the metric of the two prompts. With what `verify` adds.

    Raises:
        PromptError: the prompts do not align, answer or foil is not one token, or the foil is the answer.
        SiteError: there is no site, one cannot be patched this way, or the model has no edges.
        EditError: there is no such method, direction or seed, or the rules do not fit the model.

    >>> scores = attribute(model, clean, corrupt, answer=" Paris", foil=" Rome", method="relp")
    >>> scores["mlp_out"], scores["mlp_out_exact"], scores["recall"].sel(site="mlp_out")
    """
    refuse_unknown("attribution method", method, tuple(_NAMES))
    refuse_wrong(direction, BY_POSITION if method == "eap" else sites, seed)
    foil_id = None if foil is None else one_token(model, foil)
    pair = Pair(aligned(model, clean, corrupt), one_token(model, answer), foil_id, direction)
    refuse_blind(model, pair.metric(model), pair.tokens)
    rules = RELP if method == "relp" and rules is None else rules
    data = _edges(model, pair, rules) if method == "eap" else _nodes(model, pair, rules, sites)
    data = data.assign_attrs(_told(direction, foil, verify), method=_NAMES[method], rules=str(rules or "plain"))
    if not verify:
        return data
    most = max(int(np.isfinite(data[name].values).sum()) for name in data.attrs["sites"])
    return measured(model, data, top=min(verify, most), seed=seed, budget=budget, progress=progress, on_plan=on_plan)


READING = (
    "Each cell is an estimate, from one gradient, of what taking it from the {given} run would do to the {metric}: "
    "above 0 raises it."
)


def _told(direction: str, foil: object, verify: int) -> dict[str, str]:
    """What was read, and how a score is to be read."""
    given, metric = "corrupt" if direction == "noise" else "clean", metric_words(foil)
    exact = " The strongest were measured as well: see exact." if verify else ""
    return {"metric": metric, "reading": READING.format(given=given, metric=metric) + exact}


def _runs(model: Model, pair: Pair, rules: Freeze | None, capture: Sequence[str]) -> tuple[Run, Run, dict[str, Tensor]]:
    """Both runs, and the gradient of the metric at all that the first one captured: two forwards and one backward."""
    start = model.run(pair.start, capture=capture, edits=[] if rules is None else [rules], grad=True)
    goal = model.run(pair.goal, capture=capture)
    return start, goal, start.grad(pair.read(model, start))


def _nodes(model: Model, pair: Pair, rules: Freeze | None, sites: Sequence[str]) -> xr.Dataset:
    layouts = {site: layout(model, site, every_position(pair.tokens.shape[1])) for site in sites}
    start, goal, gradient = _runs(model, pair, rules, sorted({part.capture for part in layouts.values()}))
    found: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    for site, part in layouts.items():
        name = part.capture.removeprefix("*.")
        slope = torch.stack([gradient[f"{i}.{name}"] for i in range(model.anatomy.n_layers)])
        found[site] = (
            part.dims,
            _first_order(
                at_least_float32(goal[part.capture]) - at_least_float32(start[part.capture].detach()), slope, part
            ),
        )
    return _dataset(model, pair, start, goal, found)


def _first_order(change: Tensor, slope: Tensor, part: Layout) -> Tensor:
    """[layer, pos or unit] The products, summed over what a cell covers; both are [layer, 1, pos, unit, ...]."""
    product = change.double() * slope.double()
    product = product.squeeze(1).movedim(1 if part.dims[1] == "pos" else 2, 1)
    return product.flatten(2).sum(-1) if product.dim() > 2 else product


def _edges(model: Model, pair: Pair, rules: Freeze | None) -> xr.Dataset:
    listed = graph(model)
    start, goal, gradient = _runs(model, pair, rules, captures(model))
    scores = contract(model, start, gradient, changes(model, start, goal, rules))
    scores = scores.masked_fill(~listed.mask.to(scores.device), torch.nan)
    data = _dataset(model, pair, start, goal, {"score": (("sender", "receiver"), scores)})
    return data.assign_coords(sender=list(listed.senders), receiver=list(listed.receivers))


def _dataset(
    model: Model, pair: Pair, start: Run, goal: Run, found: dict[str, tuple[tuple[str, ...], Tensor]]
) -> xr.Dataset:
    import xarray as xr

    unit = {"unit": "logits" if pair.foil is not None else "nats"}
    data = xr.Dataset({name: (dims, x.cpu().numpy(), unit) for name, (dims, x) in found.items()})
    ends = [float(pair.read(model, run).detach()) for run in (start, goal)]
    data["clean"], data["corrupt"] = ends if pair.direction == "noise" else ends[::-1]
    # Every cell is labelled, so that scores can be cut and turned round and still be checked.
    data = data.assign_coords({str(dim): np.arange(size) for dim, size in data.sizes.items()})
    words = [model.to_words(row) for row in pair.tokens]
    data = data.assign_coords(clean_token=("pos", words[0]), corrupt_token=("pos", words[1]))
    return data.assign_attrs(model.provenance | pair.attrs() | {"sites": list(found)})
