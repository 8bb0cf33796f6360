"""Attribution: how patching each activation or edge would change the answer, estimated from one gradient.

Formula:  node  score(n)      = (n_goal - n_start) . R_n,      summed over the axes that a cell covers;
          edge  score(u -> v) = (u_goal - u_start) . R_in(v),  summed over positions and d_model,
          where R is the gradient of the metric m in the start run, taken with the method's backward rules. Both are the
          first-order part of m(cell) - m(start), the effect that a sweep measures: same unit, same sign.
Rules:    plain gradients (AtP, EAP), or those of RelP: norms x / sg[scale], attention sg[A] v, activations
          x sg[act(x) / x], products y/2 + sg[y/2] with y = gate * up, where sg stops the gradient.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np

from microtome.edit import Freeze
from microtome.explain._first_order import edge_scores, node_scores
from microtome.explain._layout import DEFAULT_SITES, Sites
from microtome.explain._pair import CleanPrompt, CorruptPrompt, one_pair, record
from microtome.explain._pairs import AnswerOfClean, Direction, FoilOfCorrupt
from microtome.explain._verify import SCORES, measure_best, site_axis
from microtome.method import Argument, Found, Source, question
from microtome.model import Model

RELP = Freeze(norms=True, patterns=True, activations="ratio", half_products=True)
"""The backward rules of RelP."""

NAMES = {"atp": "attribution patching", "relp": "RelP", "eap": "edge attribution patching"}
READING = (
    "Each value is an estimate, from one gradient, of what taking this part from the {given} run would do to the "
    "{metric}: above 0 raises it. Exact measurements stand beside it."
)


@question(
    "attribute",
    command="attribute",
    title="attribution",
    question="How would patching each activation or edge change the answer, estimated from one gradient?",
    columns=SCORES,
    source=(
        Source(
            "Kramár, Lieberum, Shah, Nanda",
            "AtP*: An efficient and scalable method for localizing LLM behaviour to components", 2024, "2403.00745",
        ),
        Source(
            "Syed, Rager, Conmy", "Attribution Patching Outperforms Automated Circuit Discovery", 2023, "2310.10348",
            departs="edges into shared keys and values are separated by query head; a norm after a branch is "
            "linearised",
        ),
        Source(
            "Jafari, Eberle, Khakzar, Nanda",
            "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching", 2025,
            "2508.21258",
        ),
    ),
    cost="two forwards and one backward, EAP with 3 H + 1 gradients [pos, d_model] per layer; then a sweep of "
    "2 * verify cells per site",
    check="tests/laws/test_attribution.py",
    call='mt.explain.attribute(model, "The capital of France is", "The capital of Italy is", answer=" Paris", '
    'foil=" Rome")',
)  # fmt: skip
def attribute(
    model: Model,
    clean: CleanPrompt,
    corrupt: CorruptPrompt,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    method: Annotated[Literal["atp", "relp", "eap"], Argument("atp or relp for nodes, eap for edges")] = "atp",
    sites: Sites = DEFAULT_SITES,
    rules: Annotated[Freeze | None, Argument("backward rules instead of the method's own", command=False)] = None,
    direction: Direction = "denoise",
    verify: Annotated[
        int, Argument("how many top cells per site to measure exactly, beside as many random others", "cells", least=0)
    ] = 50,
) -> Found:
    """Estimate from one gradient how each node or edge would change the answer, and measure the top ones exactly.

    Nodes have a variable per site, over (layer, pos) or (layer, unit), NaN in layers without the site; edges have
    `score`, NaN where there is no edge.
    With ``rules=mt.explain.RELP`` EAP takes its RelP form.

    Raises:
        PromptError: the prompts do not align, answer or foil is not one token, or the foil is the answer.
        SiteError: no layer has a site, or the model has no edges.
        EditError: the rules do not fit the model.
    """
    pair = one_pair(model, clean, corrupt, answer=answer, foil=foil)
    rules = RELP if method == "relp" and rules is None else rules
    if method == "eap":
        ends, scores = edge_scores(model, pair, direction, rules)
    else:
        ends, scores = node_scores(model, pair, direction, rules, sites)
    attributes: dict[str, Any] = {
        "method": NAMES[method],
        "rules": "plain" if rules is None else repr(rules),
        "sites": list(scores),
    }
    attributes |= record(pair, direction)
    attributes["reading"] = READING.format(
        given="clean" if direction == "denoise" else "corrupt", metric=attributes["metric"]
    )
    start, goal = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    values: dict[str, Any] = {start: ends[0], goal: ends[1]} | {name: (x.dims, x.values) for name, x in scores.items()}
    units = dict.fromkeys(values, pair.unit)
    words = [model.to_words(row) for row in pair.tokens[0]]
    coords: dict[str, Any] = {str(dim): x[dim].values for x in scores.values() for dim in x.dims}
    coords |= {"clean_token": ("pos", words[0]), "corrupt_token": ("pos", words[1])}
    if verify:
        top = min(verify, max(int(np.isfinite(x.values).sum()) for x in scores.values()))
        found = measure_best(model, pair, direction, scores, top)
        units |= {name: pair.unit for name in found if name.endswith("_exact")}
        values |= {name: (dims, x) for name, (dims, x, *_) in found.items()}
        coords["site"], attributes["verified_top"] = site_axis(list(scores)), top
    return Found(values, coords=coords, attrs=attributes, units=units)
