"""Integrated gradients of nodes: the gradient along the straight way of one site of one layer from start to goal.

Formula:  score(n) = (n_goal - n_start) . sum_k w_k dm/dn at the point n_start + t_k (n_goal - n_start), where all of
          the site in that layer goes this way together and everything before it is as in the start run; for t_k and
          w_k see `_quadrature`.
          gap = |m(site of the layer from the goal) - m(start) - sum of its scores| / |m(goal) - m(start)|: without a
          limit on the points it is 0. Points are added until it is at most `TOLERANCE` or they are `MOST_STEPS`.
Cost:     a forward and a backward of the layers from the node's own on for each point, of every layer and site.
Check:    the scores of a site add up to the exact effect of patching all of it; tests/laws/test_integrated.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.edit import Edit, Freeze, Set, canonical
from microtome.explain._first_order import Gradients, first_order
from microtome.explain._layout import Layout, every_position, layout, named_sites
from microtome.explain._pairs import Pairs
from microtome.explain._quadrature import integrate
from microtome.model import Model
from microtome.run import Run

TOLERANCE = 0.01
"""What may be left of the gap, as a share of the difference between the two prompts."""
MOST_STEPS = 160
TOGETHER = 16
"""Points that are run together at most."""


@dataclass(frozen=True, eq=False)
class Integrated:
    """Scores of the nodes of one pair.

    Attributes:
        ends: [1, 2] the metric of the start and of the goal run.
        scores: by site, [1, layer, place or unit].
        gaps: by site, [layer] what its scores leave of its effect, as a share of the whole difference.
        steps: by site, [layer] how many points it took.
    """

    ends: Float[Tensor, "1 2"]
    scores: dict[str, Float[Tensor, "1 layer _"]]
    gaps: dict[str, Float[Tensor, " layer"]]
    steps: dict[str, Float[Tensor, " layer"]]


def integrated_scores(
    model: Model,
    one: Pairs,
    direction: str,
    rules: Freeze | None,
    sites: Sequence[str],
    steps: int,
    most: int | None = None,
) -> Integrated:
    """Integrated gradients of every site of one pair; NaN in layers without the site.

    Raises:
        SiteError: no layer has a site.
    """
    layouts = {site: layout(model, site, every_position(one.lengths[0])) for site in named_sites(model, sites)}
    wanted = sorted({part.capture for part in layouts.values()} | {"*.resid_pre"})
    with torch.no_grad():
        start, goal = (model.run(prompts, capture=wanted) for prompts in (one.start(direction), one.goal(direction)))
        ends = torch.stack([one.read(run).double().cpu() for run in (start, goal)], dim=1)
    found = Integrated(ends, {}, {}, {})
    everything, done = sum(len(part.layers) for part in layouts.values()), 0
    whole = float((ends[0, 1] - ends[0, 0]).abs())
    for site, part in layouts.items():
        cells: list[Tensor] = []
        gaps, taken = (torch.full((model.anatomy.n_layers,), torch.nan, dtype=torch.float64) for _ in range(2))
        for layer in part.layers:
            way = _Way(model, one, direction, rules, part, layer, start, goal)
            own = integrate(way.read, way.scores, points=steps, most=most or MOST_STEPS, tolerance=TOLERANCE * whole)
            gaps[layer], taken[layer] = own.gap / whole if whole else torch.nan, own.points
            cells.append(own.scores.unsqueeze(0))
            done += 1
            current().report("integrating gradients", done, everything)
        found.scores[site] = part.spread(torch.cat(cells, dim=1)).cpu()
        found.gaps[site], found.steps[site] = gaps, taken
    return found


class _Way:
    """The straight way of one site of one layer from the start to the goal run."""

    def __init__(
        self, model: Model, one: Pairs, direction: str, rules: Freeze | None, part: Layout, layer: int, start: Run,
        goal: Run,
    ) -> None:  # fmt: skip
        self.model, self.one, self.part, self.layer = model, one, part, layer
        self.prompt, self.rules = one.start(direction)[0], [] if rules is None else [rules]
        self.site, self.goal = f"{layer}.{part.site}", goal
        self.given = start[f"{layer}.resid_pre"]
        self.here, self.there = (at_least_float32(run[self.site]) for run in (start, goal))

    def read(self, at: Sequence[float]) -> Float[Tensor, " point"]:
        """The metric at some points."""
        edits, rows, given = self._at(at)
        with torch.no_grad():
            run = self.model.run([self.prompt] * len(at), edits=edits, start_at=self.layer, given=given)
            return rows.read(run).double().cpu()

    def scores(self, at: Sequence[float], weights: Sequence[float]) -> Float[Tensor, " cell"]:
        """The change times the weighted sum of the gradients at some points."""
        total = torch.zeros_like(self.here, dtype=torch.float64)
        for first in range(0, len(at), TOGETHER):
            some = slice(first, first + TOGETHER)
            total += self._weighted(at[some], weights[some])
        return first_order(self.there - self.here, total, self.part)[0]

    def _at(self, at: Sequence[float]) -> tuple[list[Edit], Pairs, Tensor]:
        """The edits that put some points of the way in place, of as many rows; the rows; and the stream before."""
        shape = (-1, *[1] * (self.here.dim() - 1))
        share = torch.tensor(at, dtype=self.here.dtype, device=self.here.device).reshape(shape)
        value = (self.here + share * (self.there - self.here)).to(self.given.dtype)
        return [_set(self.site, value), *self.rules], self.one.take([0] * len(at)), self.given.expand(len(at), -1, -1)

    def _weighted(self, at: Sequence[float], weights: Sequence[float]) -> Float[Tensor, " one *of"]:
        """The sum of the gradients at some points, each times its weight."""
        edits, rows, given = self._at(at)
        prompts = [self.prompt] * len(at)
        found = Gradients(self.model, rows, prompts, [self.site], edits, start_at=self.layer, given=given)
        shape = (-1, *[1] * (self.here.dim() - 1))
        weight = torch.tensor(weights, dtype=torch.float64, device=self.given.device).reshape(shape)
        return (found.at[self.site].double() * weight).sum(0, keepdim=True)


def _set(site: str, value: Tensor) -> Edit:
    """The edit that puts a value, in the site's own axes, in place of what is there."""
    return Set(site, value=canonical(value, Site(site.partition(".")[2], int(site.partition(".")[0]))))
