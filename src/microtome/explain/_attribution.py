"""Attribution: how patching each activation or edge would change the answer, estimated from gradients.

Formula:  node  score(n)      = (n_goal - n_start) . R_n,      summed over the axes that a cell covers;
          edge  score(u -> v) = (u_goal - u_start) . R_in(v),  summed over positions and d_model,
          where R is the gradient of the metric m in the start run, taken with the method's backward rules; for "ig" and
          "eap-ig" its mean along a way, see `_integrated` and `_edge_scores`; for "atp*" see `_atp_star`. All estimate
          m(cell) - m(start), the effect that a sweep measures: same unit, same sign.
Rules:    plain gradients (AtP, EAP), or those of RelP: norms x / sg[scale], attention sg[A] v, activations
          x sg[act(x) / x], products y/2 + sg[y/2] with y = gate * up, where sg stops the gradient.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.edit import Freeze
from microtome.explain._edge_scores import edge_scores
from microtome.explain._node_scores import DEFAULT_SITES, Sites, dims_of, scores_of_nodes
from microtome.explain._pair import record
from microtome.explain._pairs import AnswerOfClean, Clean, Corrupt, Direction, FoilOfCorrupt, Pairs, pairs_of
from microtome.explain._verify import SCORES, measure_best, site_axis
from microtome.method import Argument, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval

RELP = Freeze(norms=True, patterns=True, activations="ratio", half_products=True)
"""The backward rules of RelP."""

Method = Literal["atp", "relp", "atp*", "ig", "eap", "eap-ig", "eap-ig-activations", "clean-corrupted"]
NAMES = {
    "atp": "attribution patching", "relp": "RelP", "atp*": "AtP*", "ig": "integrated gradients",
    "eap": "edge attribution patching", "eap-ig": "EAP-IG (inputs)", "eap-ig-activations": "EAP-IG (activations)",
    "clean-corrupted": "EAP, mean of the gradients at both prompts",
}  # fmt: skip
UNITLESS = ("gap", "ig_gap", "ig_steps", "answered")
EDGE = ("sender", "receiver")
OF_EDGES = ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted")
READING = (
    "Each value is an estimate, from gradients, of what taking this part from the {given} run would do to the "
    "{metric}: above 0 raises it. Exact measurements stand beside it."
)


@question(
    "attribute",
    command="attribute",
    title="attribution",
    question="How would patching each activation or edge change the answer, estimated from gradients?",
    columns=SCORES,
    source=(
        Source(
            "Kramár, Lieberum, Shah, Nanda",
            "AtP*: An efficient and scalable method for localizing LLM behaviour to components", 2024, "2403.00745",
            departs="scores keep a sign, and over pairs it is their mean, not that of their sizes",
        ),
        Source(
            "Syed, Rager, Conmy", "Attribution Patching Outperforms Automated Circuit Discovery", 2023, "2310.10348",
            departs="edges into shared keys and values are separated by query head; a norm after a branch is "
            "linearised",
        ),
        Source(
            "Hanna, Pezzelle, Belinkov",
            "Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms", 2024,
            "2403.17806",
            departs="by activations an edge takes the gradient along the way of its own sender alone, at midpoints; "
            "the public code adds up those of all senders and divides by their number",
        ),
        Source(
            "Jafari, Eberle, Khakzar, Nanda",
            "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching", 2025,
            "2508.21258",
        ),
        Source(
            "Sundararajan, Taly, Yan", "Axiomatic Attribution for Deep Networks", 2017, "1703.01365",
            departs="of nodes: all of a site in one layer goes from one run to the other, with the points of Gauss "
            "and Legendre",
        ),
    ),
    cost="two forwards and one backward a pair; atp* a backward of the layers before it for every layer; ig for every "
    "site, layer and step a forward and a backward of the layers behind; EAP 3 H + 1 gradients [pos, d_model] per "
    "layer, for eap-ig times the steps; then a sweep of 2 * verify cells per site and pair",
    check="tests/laws/test_attribution.py, tests/laws/test_edges_of_pairs.py, tests/laws/test_atp_star.py, "
    "tests/laws/test_integrated.py",
    call='mt.explain.attribute(model, "The capital of France is", "The capital of Italy is", answer=" Paris", '
    'foil=" Rome")',
)  # fmt: skip
def attribute(
    model: Model,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    method: Annotated[
        Method,
        Argument("atp, relp, atp* or ig for nodes; eap, eap-ig, eap-ig-activations or clean-corrupted for edges"),
    ] = "atp",
    sites: Sites = DEFAULT_SITES,
    steps: Annotated[
        int, Argument("points between the prompts for ig, which doubles them until it is complete, and eap-ig",
                      "points", least=1)
    ] = 5,
    rules: Annotated[Freeze | None, Argument("backward rules instead of the method's own", command=False)] = None,
    direction: Direction = "denoise",
    verify: Annotated[
        int, Argument("how many top cells per site to measure exactly, beside as many random others", "cells", least=0)
    ] = 50,
) -> Found:  # fmt: skip
    """Estimate from gradients how each node or edge would change the answer, and measure the top ones exactly.

    Nodes have a variable per site, over (layer, pos) or (layer, unit), NaN in layers without the site; edges have
    `score`, NaN where there is no edge. Of several pairs they are means over pairs, with `_lo` and `_hi`, and for nodes
    `_each`. With ``rules=mt.explain.RELP`` EAP takes its RelP form.

    Raises:
        PromptError: the prompts do not align, answer or foil is not one token, the foil is the answer, or pairs of
            several lengths are scored by position.
        SiteError: no layer has a site, the model has no edges, or for atp* scores are no product of queries and keys.
        EditError: the rules do not fit the model.
    """
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil)
    rules = RELP if method == "relp" and rules is None else rules
    values: dict[str, Any]
    each: dict[str, Any] = {}
    if method in OF_EDGES:
        edges = edge_scores(model, pairs, direction, method=method, steps=steps, rules=rules)
        axes = {"sender": list(edges.listed.senders), "receiver": list(edges.listed.receivers)}
        values = _of_edges(edges.scores) | {"gap": edges.gap}
        ends, scores = edges.ends, {"score": xr.DataArray(values["score"][1], dims=tuple(axes), coords=axes)}
    else:
        nodes = scores_of_nodes(model, pairs, direction, method=method, rules=rules, sites=sites, steps=steps)
        ends, scores, values = nodes.ends, nodes.means, dict(nodes.more)
        if len(pairs) == 1:
            values |= {name: (x.dims, x.values) for name, x in scores.items()}
        else:
            each = {name: (dims_of(name), x) for name, x in nodes.scores.items()}
    values |= _ends(model, pairs, direction, ends)
    attributes: dict[str, Any] = record(pairs, direction) | {
        "method": NAMES[method],
        "rules": "plain" if rules is None else repr(rules),
        "sites": list(scores),
    }
    given = "clean" if direction == "denoise" else "corrupt"
    attributes["reading"] = READING.format(given=given, metric=attributes["metric"])
    units = {name: pairs.unit for name in (*values, *each) if name not in UNITLESS}
    coords: dict[str, Any] = {str(dim): x[dim].values for x in scores.values() for dim in x.dims}
    coords |= _labels(model, pairs, scores)
    if verify:
        top = min(verify, max(int(np.isfinite(x.values).sum()) for x in scores.values()))
        found = measure_best(model, pairs, direction, scores, top)
        units |= {name: pairs.unit for name in found if name.endswith("_exact")}
        values |= {name: (dims, x) for name, (dims, x, *_) in found.items()}
        attributes["verified_top"] = top
    if verify or method == "ig":
        coords["site"] = site_axis(list(scores))
    return Found(values, each=each, coords=coords, attrs=attributes, units=units)


def _of_edges(scores: Float[Tensor, "pair sender receiver"]) -> dict[str, Any]:
    """The score of one pair, or the mean over several with the ends of its interval; NaN where there is no edge."""
    if len(scores) == 1:
        return {"score": (EDGE, scores[0].numpy())}
    there = scores[0].isfinite()
    found: dict[str, Any] = {}
    for end, x in zip(("", "_lo", "_hi"), mean_interval(scores[:, there]), strict=True):
        whole = torch.full(there.shape, torch.nan, dtype=torch.float64)
        whole[there] = x
        found[f"score{end}"] = (EDGE, whole.numpy())
    return found


def _ends(model: Model, pairs: Pairs, direction: str, ends: Float[Tensor, "pair 2"]) -> dict[str, Any]:
    """The metric of the clean and the corrupt prompts, and how many clean ones are answered."""
    start, goal = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    by_name = dict(zip((start, goal), ends.unbind(1), strict=True))
    if pairs.foil_ids or not pairs.answer_ids:
        answered = float((by_name["clean"] > 0).double().mean())
    else:
        answered = pairs.answered(model)
    one = len(pairs) == 1
    found = {name: ((), x[0]) if one else (("example",), x) for name, x in by_name.items()}
    return found | {"answered": answered}


def _labels(model: Model, pairs: Pairs, scores: dict[str, xr.DataArray]) -> dict[str, Any]:
    """The tokens of one pair, or answers and foils of several."""
    if len(pairs) == 1:
        words = [model.to_words(row) for row in pairs.tokens[0]]
        return {"clean_token": ("pos", words[0]), "corrupt_token": ("pos", words[1])}
    by_example = {"answer": pairs.answer, "foil": pairs.foil, "group": pairs.groups}
    return {name: ("example", list(said)) for name, said in by_example.items() if said}
