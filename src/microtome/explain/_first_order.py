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
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import NormWeights, Site, at_least_float32, norm_of
from microtome.edit import Freeze
from microtome.errors import SiteError, error
from microtome.explain._graph import graph
from microtome.explain._layout import Layout, every_position, layout, named_sites
from microtome.explain._pairs import Pairs
from microtome.model import Model
from microtome.run import Run

Scored = tuple[list[float], dict[str, xr.DataArray]]
"""The metric of the start and of the goal run, and labelled scores by site."""


def _runs(model: Model, pair: Pairs, direction: str, rules: Freeze | None, capture: Sequence[str]) -> Any:
    """Both runs, the gradient of the metric at all that the first one captured, and the metric of both."""
    start = model.run(pair.start(direction), capture=capture, edits=[] if rules is None else [rules], grad=True)
    goal = model.run(pair.goal(direction), capture=capture)
    read = pair.read(start)[0]
    return start, goal, start.grad(read), [float(read.detach()), float(pair.read(goal)[0])]


def node_scores(model: Model, pair: Pairs, direction: str, rules: Freeze | None, sites: Sequence[str]) -> Scored:
    """Scores of every site, over layers by positions or by units; NaN in layers without it.

    Raises:
        SiteError: no layer has a site.
    """
    layouts = {site: layout(model, site, every_position(pair.lengths[0])) for site in named_sites(model, sites)}
    wanted = sorted({part.capture for part in layouts.values()})
    start, goal, gradient, ends = _runs(model, pair, direction, rules, wanted)
    found: dict[str, xr.DataArray] = {}
    for site, part in layouts.items():
        cells: list[Tensor] = []
        for own in (f"{i}.{part.site}" for i in part.layers):
            change = at_least_float32(goal[own]) - at_least_float32(start[own].detach())
            cells.append(_first_order(change, gradient[own], part))
        scores = xr.DataArray(part.spread(torch.cat(cells)).cpu().numpy(), dims=part.dims)
        found[site] = scores.assign_coords({dim: np.arange(size) for dim, size in scores.sizes.items()})
    return ends, found


def _first_order(
    change: Float[Tensor, " batch *of"], slope: Float[Tensor, " batch *of"], part: Layout
) -> Float[Tensor, " cell"]:  # fmt: skip
    """The products in one layer, summed over what a cell covers; both are [1, pos, unit, ...]."""
    product = (change.double() * slope.double()).squeeze(0).movedim(0 if part.dims[1] == "pos" else 1, 0)
    return product.flatten(1).sum(-1) if product.dim() > 1 else product


def edge_scores(model: Model, pair: Pairs, direction: str, rules: Freeze | None) -> Scored:
    """Scores of every edge, NaN where there is none.

    Raises:
        SiteError: the model has no edges.
    """
    listed = graph(model)
    start, goal, gradient, ends = _runs(model, pair, direction, rules, captures(model))
    scores = contract(model, start, gradient, changes(model, start, goal, rules))
    scores = scores.masked_fill(~listed.mask.to(scores.device), torch.nan).cpu().numpy()
    axes = {"sender": list(listed.senders), "receiver": list(listed.receivers)}
    return ends, {"score": xr.DataArray(scores, dims=tuple(axes), coords=axes)}


def captures(model: Model) -> list[str]:
    """What a run must capture for its edges."""
    names = ["resid_pre", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.z", "mlp.in", "mlp_out"]
    names += [] if model.anatomy.parts.form == "parallel" else ["resid_mid"]
    return ["embed", *(f"*.{name}" for name in names), f"{model.anatomy.n_layers - 1}.resid_post"]


def changes(model: Model, start: Run, goal: Run, rules: Freeze | None) -> Float[Tensor, "sender pos d_model"]:
    """[sender, pos, d_model] What every sender writes in the goal run minus what it writes in the start run."""
    found = [at_least_float32(goal["embed"]) - at_least_float32(start["embed"].detach())]
    for layer in range(model.anatomy.n_layers):
        here, there = (
            at_least_float32(start[f"{layer}.attn.z"].detach()[0]),
            at_least_float32(goal[f"{layer}.attn.z"][0]),
        )
        added = torch.einsum("phd,hdm->hpm", there - here, at_least_float32(model.layers[layer].W_O.detach()))
        found.append(_behind(model, layer, here, added, rules))
        found.append(at_least_float32(goal[f"{layer}.mlp_out"]) - at_least_float32(start[f"{layer}.mlp_out"].detach()))
    return torch.cat(found)


def _behind(
    model: Model, layer: int, z: Float[Tensor, "pos head d_head"], added: Float[Tensor, "head pos d_model"],
    rules: Freeze | None,
) -> Float[Tensor, "head pos d_model"]:  # fmt: skip
    """What heads add [head, pos, d_model] as the stream gets it: scaled, and through a norm behind to first order.

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
    raw = torch.einsum("phd,hdm->pm", z, at_least_float32(weights.W_O.detach()))
    raw = form.centre(raw if weights.b_O is None else raw + weights.b_O.detach())
    size, added = form.scale(raw).to(raw.dtype).unsqueeze(-1), form.centre(added)
    slope = added / size
    if rules is None or not rules.norms:  # what is added also moves the divisor
        slope = slope - raw * (raw * added).mean(-1, keepdim=True) / size**3
    return (slope * form.gain).detach() * scale


def contract(
    model: Model, start: Run, gradient: dict[str, Tensor], change: Float[Tensor, "sender pos d_model"]
) -> Float[Tensor, "sender receiver"]:
    """[sender, receiver] Scores of all pairs, in float64, also of those that are no edges; a layer at a time."""
    flat = change.double().flatten(1)
    columns = [flat @ at_inputs(model, start, gradient, i).double().flatten(1).T for i in range(model.anatomy.n_layers)]
    last = gradient[f"{model.anatomy.n_layers - 1}.resid_post"]
    return torch.cat([*columns, flat @ last.double().flatten(1).T], dim=1)


def at_inputs(
    model: Model, start: Run, gradient: dict[str, Tensor], layer: int
) -> Float[Tensor, "receiver pos d_model"]:
    """[receiver, pos, d_model] Gradients at the inputs of one layer: q, k, v of every query head, then the MLP."""
    stream = f"{layer}.resid_pre"
    found = [start.vjp(x, f"{layer}.attn.{name}", stream) for name, x in by_head(start, gradient, layer).items()]
    read = stream if model.anatomy.parts.form == "parallel" else f"{layer}.resid_mid"
    found.append(start.vjp(gradient[f"{layer}.mlp.in"].unsqueeze(0), f"{layer}.mlp.in", read))
    return torch.cat(found).squeeze(1)


def by_head(start: Run, gradient: dict[str, Tensor], layer: int) -> dict[str, Float[Tensor, "head 1 pos _ d_head"]]:
    """Gradients at q, k and v, each [head, 1, pos, head or kv_head, d_head], of one query head at a time."""
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
