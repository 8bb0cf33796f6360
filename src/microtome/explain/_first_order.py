"""First-order scores: a node's change times its gradient; for an edge, the sender's change times the reader's gradient.

The input of one head's queries is the stream as its norm reads it. Its gradient is that of the head's queries alone,
drawn back through rotation, projection and norm to the stream. Where heads share keys and values, the gradient there is
the sum over their heads. It is separated where the heads still are separate: a head's scores reach its keys, and its
z its values, so that the gradient of that head's scores (or z) alone is drawn back.

Formula:  R_q,h = J(q -> x)^T (e_h * dm/dq),    R_k,h = J(k -> x)^T J(scores -> k)^T (e_h * dm/dscores),
          R_v,h = J(v -> x)^T J(z -> v)^T (e_h * dm/dz),    R_mlp = J(mlp.in -> x)^T dm/dmlp.in,    R_final = dm/dx,
          where e_h keeps one head, x is the stream that the branch reads, and each J is of the model's own graph.
Cost:     no pass over the model: in each layer 3 H rows through its q, k and v projections and norm, 2 H through its
          attention, one through the norm of its MLP.
Check:    over the heads of a group they add up to the gradient of the shared keys; tests/laws/test_attribution.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import NormWeights, Site, at_least_float32, norm_of
from microtome.edit import Edit, Freeze, canonical
from microtome.errors import SiteError, error
from microtome.explain._layout import Layout, every_position, layout, named_sites
from microtome.explain._pairs import Pairs
from microtome.model import Model
from microtome.run import Run

INPUTS = ("resid_pre", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.z", "mlp.in", "mlp_out")
"""Of each layer, what a run must capture for its edges; blocks one after the other add `resid_mid`."""


class Gradients:
    """A run of one prompt of each pair of one length, and the gradient of what is read of it, at all that it captured.

    Rows do not touch each other, so that the gradient of the sum over rows is that of every row by itself.

    Attributes:
        run: of the prompts, with its graph.
        read: [row] the metric of each.
        at: the gradients, by address.
    """

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        prompts: Sequence[Tensor],
        capture: Sequence[str],
        edits: Sequence[Edit] = (),
        *,
        start_at: int | None = None,
        given: Tensor | None = None,
    ) -> None:
        """Run the prompts, and draw the metric back."""
        self.run = model.run(prompts, capture=capture, edits=edits, grad=True, start_at=start_at, given=given)
        read = pairs.read(self.run)
        self.read = read.detach().double().cpu()
        self.at: dict[str, Tensor] = self.run.grad(read.sum())


def of_start(
    model: Model,
    pairs: Pairs,
    direction: str,
    rules: Freeze | None,
    capture: Sequence[str],
    of_goal: Sequence[str] | None = None,
) -> tuple[Gradients, Run, Float[Tensor, "row 2"]]:
    """The start runs with gradients, the goal runs, what is captured of either, and the metric of start and goal."""
    start = Gradients(model, pairs, pairs.start(direction), capture, [] if rules is None else [rules])
    with torch.no_grad():
        goal = model.run(pairs.goal(direction), capture=capture if of_goal is None else of_goal)
        ends = torch.stack([start.read, pairs.read(goal).double().cpu()], dim=1)
    return start, goal, ends


def node_scores(
    model: Model, pairs: Pairs, direction: str, rules: Freeze | None, sites: Sequence[str]
) -> tuple[Float[Tensor, "row 2"], dict[str, Float[Tensor, "row layer _"]]]:
    """Ends, and scores of every site over layers by positions or by units, NaN in layers without it.

    Raises:
        SiteError: no layer has a site.
    """
    layouts = {site: layout(model, site, every_position(pairs.lengths[0])) for site in named_sites(model, sites)}
    wanted = sorted({part.capture for part in layouts.values()})
    start, goal, ends = of_start(model, pairs, direction, rules, wanted)
    found: dict[str, Tensor] = {}
    for site, part in layouts.items():
        cells: list[Tensor] = []
        for own in (f"{i}.{part.site}" for i in part.layers):
            change = at_least_float32(goal[own]) - at_least_float32(start.run[own].detach())
            cells.append(first_order(change, start.at[own], part))
        found[site] = part.spread(torch.cat(cells, dim=1)).cpu()
    return ends, found


def first_order(
    change: Float[Tensor, " row *of"], slope: Float[Tensor, " row *of"], part: Layout
) -> Float[Tensor, "row cell"]:  # fmt: skip
    """The products in one layer, in the site's own axes, summed over what a cell covers."""
    return by_cell(change.double() * slope.double(), part)


def by_cell(x: Float[Tensor, " row *of"], part: Layout) -> Float[Tensor, "row cell"]:
    """Numbers of one layer, in the site's own axes, summed over what a cell covers."""
    x = canonical(x, Site(part.site, 0)).movedim(1 if part.dims[1] == "pos" else 2, 1)
    return x.flatten(2).sum(-1) if x.dim() > 2 else x


def captures(model: Model, first: int | None = None) -> list[str]:
    """What a run must capture for its edges: all, or those into a layer and what is behind it."""
    last = model.anatomy.n_layers - 1
    names = [*INPUTS, *(() if model.anatomy.parts.form == "parallel" else ("resid_mid",))]
    found = [f"*.{name}" if first is None else f"{first}-{last}.{name}" for name in names]
    return [*(["embed"] if first is None else []), *found, f"{last}.resid_post"]


def changes(model: Model, start: Run, goal: Run, rules: Freeze | None) -> Float[Tensor, "sender row pos d_model"]:
    """[sender, row, pos, d_model] What every sender writes in the goal run minus what it writes in the start run."""
    found = [_difference(start, goal, "embed").unsqueeze(0)]
    for layer in range(model.anatomy.n_layers):
        w = at_least_float32(model.layers[layer].W_O.detach())
        added = torch.einsum("rphd,hdm->hrpm", _difference(start, goal, f"{layer}.attn.z"), w)
        found.append(_behind(model, layer, at_least_float32(start[f"{layer}.attn.z"].detach()), added, rules))
        found.append(_difference(start, goal, f"{layer}.mlp_out").unsqueeze(0))
    return torch.cat(found)


def _difference(start: Run, goal: Run, site: str) -> Float[Tensor, " row *of"]:
    return at_least_float32(goal[site].detach()) - at_least_float32(start[site].detach())


def _behind(
    model: Model, layer: int, z: Float[Tensor, "row pos head d_head"], added: Float[Tensor, "head row pos d_model"],
    rules: Freeze | None,
) -> Float[Tensor, "head row pos d_model"]:  # fmt: skip
    """What heads add as the stream gets it: scaled, and through a norm behind to first order.

    For y = gain c(x) / s, with s^2 = mean(c(x)^2) + eps:  dy = gain (c(dx) / s - c(x) mean(c(x) c(dx)) / s^3).
    """
    a = model.anatomy
    path, scale = a.parts.layers[layer].attn_post_norm, a.hook_points[Site("attn_out", layer)].scale
    if path is None or a.parts.form != "sequential":
        return added * scale
    module, weights = model.hf.get_submodule(path), model.layers[layer]
    norm = norm_of(module, path, a.d_model)
    if norm is None:
        raise error(SiteError, f"the norm {path} has no known form", do="use a model with RMS or layer norms")
    form = NormWeights(module, norm)
    raw = torch.einsum("rphd,hdm->rpm", z, at_least_float32(weights.W_O.detach()))
    raw = form.centre(raw if weights.b_O is None else raw + weights.b_O.detach())
    size, added = form.scale(raw).to(raw.dtype).unsqueeze(-1), form.centre(added)
    slope = added / size
    if rules is None or not rules.norms:  # what is added also moves the divisor
        slope = slope - raw * (raw * added).mean(-1, keepdim=True) / size**3
    return (slope * form.gain).detach() * scale


def contract(
    change: Float[Tensor, "sender row pos d_model"], slopes: Sequence[Float[Tensor, "_ row pos d_model"]]
) -> Float[Tensor, "row sender receiver"]:
    """Scores of all pairs of a sender and a receiver, in float64, also of those that are no edges."""
    rows = range(change.shape[1])
    return torch.stack([_contracted(change[:, i], [x[:, i] for x in slopes]) for i in rows])


def _contracted(
    change: Float[Tensor, "sender pos d_model"], slopes: Sequence[Float[Tensor, "_ pos d_model"]]
) -> Float[Tensor, "sender receiver"]:
    flat = change.double().flatten(1)
    return torch.cat([flat @ x.double().flatten(1).T for x in slopes], dim=1)


def at_receivers(
    model: Model, run: Run, gradient: dict[str, Tensor], first: int = 0
) -> list[Float[Tensor, "_ row pos d_model"]]:
    """Gradients at the inputs of all receivers from a layer on: of each layer, then of the logits."""
    n = model.anatomy.n_layers
    inputs = [at_inputs(model, run, gradient, layer) for layer in range(first, n)]
    return [*inputs, gradient[f"{n - 1}.resid_post"].unsqueeze(0)]


def at_inputs(
    model: Model, start: Run, gradient: dict[str, Tensor], layer: int
) -> Float[Tensor, "receiver row pos d_model"]:
    """Gradients at the inputs of one layer: q, k, v of every query head, then the MLP."""
    stream = f"{layer}.resid_pre"
    found = [start.vjp(x, f"{layer}.attn.{name}", stream) for name, x in by_head(start, gradient, layer).items()]
    read = stream if model.anatomy.parts.form == "parallel" else f"{layer}.resid_mid"
    found.append(start.vjp(gradient[f"{layer}.mlp.in"].unsqueeze(0), f"{layer}.mlp.in", read))
    return torch.cat(found)


def by_head(start: Run, gradient: dict[str, Tensor], layer: int) -> dict[str, Float[Tensor, "head row pos _ d_head"]]:
    """Gradients at q, k and v, each [head, row, pos, head or kv_head, d_head], of one query head at a time."""
    at = {name: f"{layer}.attn.{name}" for name in ("q", "k", "v", "scores", "z")}
    return {
        "q": _one_by_one(gradient[at["q"]], 2),
        "k": start.vjp(_one_by_one(gradient[at["scores"]], 1), at["scores"], at["k"]),
        "v": start.vjp(_one_by_one(gradient[at["z"]], 2), at["z"], at["v"]),
    }


def _one_by_one(x: Float[Tensor, "*of"], axis: int) -> Float[Tensor, " head *of"]:
    """[head, ...] The tensor with one head kept at a time, all others zero."""
    heads = x.shape[axis]
    keep = torch.eye(heads, dtype=x.dtype, device=x.device)
    shape = [heads] + [1] * x.dim()
    shape[axis + 1] = heads
    return x.unsqueeze(0) * keep.reshape(shape)
