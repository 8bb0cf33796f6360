"""Weak to strong: what a probe of good states learns from labels that a probe of poor states made.

Formula:  groups are cut in three parts A, B, C. A weak probe is fitted on A with the true labels, at `weak`; it
          labels B. On B a strong probe is fitted at each layer with these labels, and a ceiling with the true ones; all
          are tested on C. Each part is A, B and C once. recovered = (weak to strong - weak) / (ceiling - weak).
Law:      where the weak probe is always right, weak to strong equals the ceiling.
Source:   Burns et al., "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision", 2023
          (arXiv 2312.09390). Departs: probes on frozen states, and no confidence loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.probes._problem import problem
from microtome.probes._readers import linear

S = (0, 1)


@question(
    "weak_to_strong",
    command="weak-to-strong",
    title="weak to strong",
    question="How much of what a layer could tell does it learn from the labels of a poorer one?",
    columns=(
        Column("weak_to_strong", "share", "accuracy of probes fitted to the weak probe's labels", "weak", S,
               dims=("layer",)),
        Column("ceiling", "share", "accuracy of probes fitted to true labels of the same examples",
               "none: what it is compared with", S, dims=("layer",)),
        Column("weak", "share", "accuracy of the weak probe", "none: what it is compared with", S, dims=()),
        Column("recovered", "share", "part of the gap between the weak probe and the ceiling that is recovered; none "
               "where there is no gap", "none: 0 is the weak probe, 1 the ceiling", dims=("layer",), interval=False),
    ),
    source=Source(
        "Burns et al.", "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision", 2023,
        "2312.09390", departs="probes on frozen states; no confidence loss",
    ),
    cost="one forward of every example, and 6 L + 3 regressions",
    check="tests/laws/test_probes.py",
    call='mt.probes.weak_to_strong(model, "data.csv")',
    reading="Above the weak probe's accuracy, a layer has learned more than it was told.",
)  # fmt: skip
def weak_to_strong(
    model: Model,
    data: Annotated[Any, Argument("a table, rows or columns, as a probe takes them", positional=True, from_text=Path)],
    *,
    weak: Annotated[str, Argument("the site of the weak probe, one layer")] = "0.resid_post@-1",
    site: Annotated[str, Argument("the layers that learn from it")] = "*.resid_post@-1",
    field: Annotated[str, Argument("column with the text")] = "text",
    label: Annotated[str, Argument("column with the label")] = "label",
    group: Annotated[str | None, Argument('column with the group; "group" where there is one')] = None,
    l2: Annotated[float, Argument("strength of the prior, l2/2 |W|^2 on standardised units", least=1e-9)] = 10.0,
) -> Found:
    """What probes of each layer learn from labels that a probe of one layer made.

    Raises:
        DataError, SiteError, PromptError: as `microtome.probes.probe`.
        ArgumentError: `weak` is not one site, or `site` is several.
    """
    given: Any = {"kind": "linear", "field": field, "label": label, "group": group, "pool": "last", "folds": 3}
    given |= {"shift": (), "seed": current().seed, "untrained": False}
    it, poor = (problem(model, data, site=where, **given) for where in (site, weak))
    if len(poor.states) != 1 or len(it.sites) != 1:
        what = "the weak probe is of one layer, and those that learn of one site"
        got = f"{len(poor.states)} layers and {len(it.sites)} sites"
        raise error(ArgumentError, what, got=got, do='write such as weak="2.resid_post@-1", site="*.resid_post@-1"')
    (below,), y, n = poor.states.values(), it.inside, len(it.classes)
    parts = [np.flatnonzero(it.folds.fold == k) for k in range(3)]
    weak_hits = torch.zeros(len(y), dtype=torch.float64)
    hits: dict[str, dict[Site, Tensor]] = {name: {} for name in ("weak_to_strong", "ceiling")}
    for k in range(3):
        a, b, c = (parts[(k + i) % 3] for i in range(3))
        teacher = linear(l2)(below[a], y[a], n)
        told = teacher.logits(below[b]).argmax(-1).numpy()
        true = torch.from_numpy(y[c])
        weak_hits[c] = (teacher.logits(below[c]).argmax(-1) == true).double()
        for site_, x in it.states.items():
            for name, labels in (("weak_to_strong", told), ("ceiling", y[b])):
                whole = hits[name].setdefault(site_, torch.zeros(len(y), dtype=torch.float64))
                whole[c] = (linear(l2)(x[b], labels, n).logits(x[c]).argmax(-1) == true).double()
        current().report("probing", k + 1, 3)
    each = {name: it.each(found) for name, found in hits.items()} | {"weak": ((), it.folds.summed(weak_hits))}
    mean = {name: x[1].sum(0) / len(y) for name, x in each.items()}
    gap = mean["ceiling"] - mean["weak"]
    recovered = (mean["weak_to_strong"] - mean["weak"]) / torch.where(gap.abs() > 1e-9, gap, torch.nan)
    attrs = it.attrs | {"weak_site": str(poor.sites[0])}
    return Found({"recovered": (("layer",), recovered)} | it.scored(each), coords=it.coords, attrs=attrs)
