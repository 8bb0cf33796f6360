"""Scores of all edges of one or many pairs, from gradients in one place or along a way between two.

Formula:  score(u -> v) = (u_goal - u_start) . mean over points of R_in(v), summed over positions and d_model, where
          eap                 the one point is the start run;
          clean-corrupted     the points are the embedding of the corrupt prompt and that of the clean one;
          eap-ig              the points are e_corrupt + k/m (e_clean - e_corrupt), k = 0 .. m - 1;
          eap-ig-activations  u, with all heads of its layer if it is one, is u_start + (k + 1/2)/m (u_goal - u_start),
                              while all that comes before is as in the start run.
          gap = |sum over pairs of (m(goal) - m(start) - sum_v score(embed -> v))| / |sum over pairs of m(goal) -
          m(start)|: 0 where the scores out of the embedding add up to the whole difference.
Cost:     eap: two forwards, a backward, and what `_first_order` says; clean-corrupted, eap-ig: 2 + m forwards, m
          backwards, all edges of all points in one product a pair; eap-ig-activations: (2 L + 1) m forwards and
          backwards of the layers behind the sender.
Check:    tests/laws/test_edges_of_pairs.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.context import current
from microtome.edit import Edit, Freeze, Set
from microtome.explain._first_order import Gradients, at_receivers, captures, changes, contract, of_start
from microtome.explain._graph import Graph, graph
from microtome.explain._pairs import Pairs
from microtome.model import Model
from microtome.run import Run, free_memory

WRITTEN = ("embed", "*.attn.z", "*.mlp_out")
MOST_ROWS = 8
"""Pairs that are run together at most: beyond these, larger batches are no faster."""
DEFAULT_BYTES = 2 * 2**30


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Scores of all edges of some pairs.

    Attributes:
        listed: the graph.
        ends: [pair, 2] the metric of the start and of the goal run.
        scores: [pair, sender, receiver] in float64, NaN where there is no edge.
    """

    listed: Graph
    ends: Float[Tensor, "pair 2"]
    scores: Float[Tensor, "pair sender receiver"]

    @property
    def gap(self) -> float:
        """How far the scores out of the embedding are from the whole difference, as a share of it; NaN without one."""
        whole = (self.ends[:, 1] - self.ends[:, 0]).sum()
        return float((whole - self.scores[:, 0].nansum()).abs() / whole.abs())


def edge_scores(
    model: Model, pairs: Pairs, direction: str, *, method: str, steps: int, rules: Freeze | None
) -> EdgeScores:
    """Scores of every edge in every pair.

    Raises:
        SiteError: the model has no edges.
    """
    listed = graph(model)
    ends = torch.full((len(pairs), 2), torch.nan, dtype=torch.float64)
    scores = torch.full((len(pairs), *listed.mask.shape), torch.nan, dtype=torch.float64)
    rows = 1 if method == "eap-ig-activations" else _rows_together(model, pairs, listed)
    done = 0
    for some in pairs.batches(rows):
        batch = pairs.take(some)
        if method == "eap":
            found = _at_start(model, batch, direction, rules)
        elif method == "eap-ig-activations":
            found = _of_activations(model, batch, direction, rules, steps, listed)
        else:
            found = _between(model, batch, direction, rules, _points(method, steps))
        ends[some], scores[some] = found[0], found[1].cpu().masked_fill(~listed.mask, torch.nan)
        done += len(some)
        if len(pairs) > 1:
            current().report("scoring the edges of pairs", done, len(pairs))
    return EdgeScores(listed, ends, scores)


def _rows_together(model: Model, pairs: Pairs, listed: Graph) -> int:
    """How many pairs may be run together: what is captured with its graph, changes and slopes must fit in memory."""
    longest = max(pairs.tokens, key=lambda pair: pair.shape[1])[:1]
    held = 2 * model.plan(longest, captures(model), grad=True).bytes
    held += 4 * longest.shape[1] * model.anatomy.d_model * (3 * len(listed.senders) + 2 * len(listed.receivers))
    budget = current().budget
    allowed = min(free_memory(model.device) // 2, DEFAULT_BYTES) if budget is None else budget
    return max(1, min(MOST_ROWS, allowed // held))


def _points(method: str, steps: int) -> list[float]:
    """Where gradients are taken: 0 is the embedding of the corrupt prompt, 1 that of the clean one."""
    return [0.0, 1.0] if method == "clean-corrupted" else [k / steps for k in range(steps)]


Scored = tuple[Float[Tensor, "row 2"], Float[Tensor, "row sender receiver"]]


def _at_start(model: Model, batch: Pairs, direction: str, rules: Freeze | None) -> Scored:
    start, goal, ends = of_start(model, batch, direction, rules, captures(model), WRITTEN)
    return ends, contract(changes(model, start.run, goal, rules), at_receivers(model, start.run, start.at))


def _ends(model: Model, batch: Pairs, direction: str, more: Sequence[str] = ()) -> tuple[Run, Run, Tensor]:
    """The start and the goal runs, with what senders write, and the metric of both."""
    with torch.no_grad():
        runs = [model.run(prompts, capture=[*WRITTEN, *more]) for prompts in
                (batch.start(direction), batch.goal(direction))]  # fmt: skip
        return runs[0], runs[1], torch.stack([batch.read(run).double().cpu() for run in runs], dim=1)


def _between(model: Model, batch: Pairs, direction: str, rules: Freeze | None, points: Sequence[float]) -> Scored:
    start, goal, ends = _ends(model, batch, direction)
    corrupt, clean = (run["embed"] for run in ((start, goal) if direction == "denoise" else (goal, start)))
    slopes: list[Tensor] = []
    for point in points:
        edits: list[Edit] = [Set("embed", value=corrupt + point * (clean - corrupt))]
        edits += [] if rules is None else [rules]
        there = Gradients(model, batch, batch.start(direction), captures(model), edits)
        found = [at_least_float32(x) for x in at_receivers(model, there.run, there.at)]
        slopes = [a + b for a, b in zip(slopes, found, strict=True)] if slopes else found
    return ends, contract(changes(model, start, goal, rules), [x / len(points) for x in slopes])


def _of_activations(
    model: Model, one: Pairs, direction: str, rules: Freeze | None, steps: int, listed: Graph
) -> Scored:
    """Scores of one pair, sender by sender; the heads of a layer go together, each edge is of its own head."""
    start, goal, ends = _ends(model, one, direction, ["*.resid_pre"])
    change = changes(model, start, goal, rules)
    scores = change.new_full((1, *listed.mask.shape), torch.nan, dtype=torch.float64)
    shares = (torch.arange(steps, device=change.device) + 0.5) / steps
    rows = one.take([0] * steps)
    for site, senders, layer in _senders(model):
        here, there = start[site], goal[site]
        way = shares.reshape(-1, *[1] * (here.dim() - 1)).to(here.dtype)
        edits: list[Edit] = [Set(site, value=here + way * (there - here)), *([] if rules is None else [rules])]
        given = None if layer is None else start[f"{layer}.resid_pre"].expand(steps, -1, -1)
        found = Gradients(
            model, rows, rows.start(direction), captures(model, layer), edits, start_at=layer, given=given
        )
        slopes = at_receivers(model, found.run, found.at, layer or 0)
        slopes = [at_least_float32(x).mean(1, keepdim=True) for x in slopes]
        columns = contract(change[senders], slopes)
        scores[:, senders, len(listed.receivers) - columns.shape[-1] :] = columns
    return ends, scores


def _senders(model: Model) -> Iterator[tuple[str, slice, int | None]]:
    """The site of each sender, or of all heads of a layer; which senders these are; and the layer that it starts in."""
    a = model.anatomy
    yield "embed", slice(0, 1), None
    for layer in range(a.n_layers):
        first = 1 + layer * (a.n_heads + 1)
        yield f"{layer}.attn.z", slice(first, first + a.n_heads), layer
        yield f"{layer}.mlp_out", slice(first + a.n_heads, first + a.n_heads + 1), layer
