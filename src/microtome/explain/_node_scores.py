"""Scores of nodes by method, of one or many pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Freeze
from microtome.errors import PromptError, error
from microtome.explain._atp_star import star_scores
from microtome.explain._first_order import node_scores
from microtome.explain._integrated import integrated_scores
from microtome.explain._layout import BY_UNIT, DEFAULT_SITES, named_sites
from microtome.explain._layout import Sites as Sites
from microtome.explain._pairs import Pairs
from microtome.model import Model

TOGETHER = 4
"""Pairs that are run together at most."""
OF_SOFTMAX = ("attn.q[head]", "attn.k[head]")
"""What AtP* scores besides the sites of the others: its corrections are for these."""


@dataclass(frozen=True, eq=False)
class NodeScores:
    """Scores of the nodes of some pairs.

    Attributes:
        ends: [pair, 2] the metric of the start and of the goal run.
        scores: by site [pair, layer, place or unit].
        means: the same on average over pairs, labelled.
        more: further variables with their axes.
    """

    ends: Float[Tensor, "pair 2"]
    scores: dict[str, Float[Tensor, "pair layer _"]]
    more: dict[str, tuple[tuple[str, ...], Any]] = field(default_factory=dict[str, Any])

    @property
    def means(self) -> dict[str, xr.DataArray]:
        """As above."""
        found: dict[str, xr.DataArray] = {}
        for site, x in self.scores.items():
            data = xr.DataArray(x.mean(0).numpy(), dims=dims_of(site))
            found[site] = data.assign_coords({dim: np.arange(size) for dim, size in data.sizes.items()})
        return found


def dims_of(site: str) -> tuple[str, str]:
    """The axes of the scores of a site."""
    name = site.partition("[")[0]
    return "layer", Site(name, 0).spec.unit if site in BY_UNIT else "pos"


def scores_of_nodes(
    model: Model,
    pairs: Pairs,
    direction: str,
    *,
    method: str,
    rules: Freeze | None,
    sites: Sequence[str],
    steps: int,
    most: int | None = None,
) -> NodeScores:
    """Scores of every site in every pair.

    Raises:
        SiteError: no layer has a site.
        PromptError: pairs of several lengths have no positions in common.
    """
    named = named_sites(model, sites)
    if method == "atp*" and tuple(sites) == DEFAULT_SITES:
        there = {site.name for site in model.anatomy.hook_points}
        named = [*named, *(site for site in OF_SOFTMAX if site.partition("[")[0] in there)]
    by_position = [site for site in named if site not in BY_UNIT]
    if len(set(pairs.lengths)) > 1 and by_position:
        raise error(
            PromptError, "pairs of several lengths have no positions in common",
            got=str(sorted(set(pairs.lengths))),
            do=f"name sites by unit, such as {BY_UNIT[3]}, instead of {by_position[0]}",
        )  # fmt: skip
    ends = torch.full((len(pairs), 2), torch.nan, dtype=torch.float64)
    parts: list[tuple[list[int], dict[str, Tensor]]] = []
    more: dict[str, list[Tensor]] = {}
    for some in pairs.batches(1 if method == "ig" else TOGETHER):
        batch = pairs.take(some)
        if method == "ig":
            found = integrated_scores(model, batch, direction, rules, named, steps, most)
            ends[some], scores = found.ends, found.scores
            for name, by_site in (("ig_gap", found.gaps), ("ig_steps", found.steps)):
                more.setdefault(name, []).append(torch.stack(list(by_site.values())))
        else:
            ends[some], scores = (star_scores if method == "atp*" else node_scores)(
                model, batch, direction, rules, named
            )
        parts.append((some, scores))
        if len(pairs) > 1:
            current().report("scoring the nodes of pairs", sum(len(own) for own, _ in parts), len(pairs))
    order = torch.tensor([i for some, _ in parts for i in some]).argsort()
    whole = {site: torch.cat([scores[site] for _, scores in parts])[order].double() for site in parts[0][1]}
    # Over pairs, the largest: no pair leaves more, and none took more.
    beside = {name: (("site", "layer"), torch.stack(x).amax(0)) for name, x in more.items()}
    return NodeScores(ends, whole, beside)
