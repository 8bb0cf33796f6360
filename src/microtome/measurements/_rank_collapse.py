"""Whether tokens of a row become one: the residual beside their mean, as the model is and without its skips and MLPs.

Formula:  residual(X) = |X - 1 mean(X)| / |X| over the tokens of a row but the first, Frobenius norms;
          residual_whole = that of resid_post;  residual_no_mlp = the same with all MLPs adding nothing;
          residual_no_skip = the same where each branch hands on what it adds and not what that is added to: the mixer
          to the MLP and the MLP to the next layer, or in a parallel block the sum of both;
          residual_attention = the same where a layer hands on what its attention (or other mixer) adds alone.
          Each from the same embeddings; after each layer a row without skips is scaled to the norm of its embeddings,
          which changes no residual and keeps the numbers finite.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.edit import Apply, Zero
from microtome.errors import SiteError, error
from microtome.method import Column, Seen, Source, Text, measure
from microtome.model import Model

CHART = "Residual of a row beside its mean"
SKIPS = "residual_whole"


def _residual(name: str, meaning: str, title: str) -> Column:
    return Column(name, "ratio", meaning, SKIPS if name != SKIPS else "residual_attention", (0, 1), title=title,
                  chart=CHART, log=True)  # fmt: skip


@measure(
    "rank_collapse",
    of="layer",
    on=Text(sequences=8, width=128),
    atlas="full",
    title="residual of a row with and without skips",
    question="Do the tokens of a row become one, and do skips and MLPs prevent it?",
    columns=(
        _residual("residual_whole", "norm of a row's tokens less their mean, over their norm", "whole"),
        _residual("residual_no_mlp", "the same with all MLPs adding nothing", "without MLPs"),
        _residual("residual_no_skip", "the same where a branch hands on what it adds alone", "without skips"),
        _residual("residual_attention", "the same where a layer hands on what its mixer adds", "attention alone"),
    ),
    source=Source(
        "Dong, Cordonnier and Loukas",
        "Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially with Depth", 2021, "2103.03404",
        "section 4.1", departs="Frobenius norms in place of the composite norm; norms of the model stay where they are",
    ),
    cost="five forwards over the first sequences of the text, without logits",
    check="tests/laws/test_geometry.py",
)  # fmt: skip
def rank_collapse(seen: Seen) -> dict[str, tuple[Float[Tensor, "example layer"], Tensor]]:
    """How far the tokens of a row are from one, after each layer, as the model is and without skips and MLPs.

    Raises:
        SiteError: some layer's branches are not known.
    """
    model, tokens = seen.model, seen.tokens
    branches = [_mixer(model, i) for i in range(model.anatomy.n_layers)]
    mlps = [Site("mlp_out", i) in model.anatomy.hook_points for i in range(model.anatomy.n_layers)]
    later = seen.later
    whole = _by_layer(model, tokens, ())
    silent = [Zero(f"{i}.mlp_out") for i, there in enumerate(mlps) if there]
    found = {"residual_whole": whole, "residual_no_mlp": _by_layer(model, tokens, silent) if silent else whole}
    start = model.run(tokens, capture="0.resid_pre", logits=False)["0.resid_pre"]
    lanes = start.shape[-1] != model.anatomy.d_model  # of which no branch hands on all
    for name, mlp in () if lanes else (("residual_no_skip", True), ("residual_attention", False)):
        x, rows = start, list[Tensor]()
        for i, mixer in enumerate(branches):
            new = at_least_float32(_handed_on(model, tokens, i, x, mixer, mlp and mlps[i]))
            size = (start.float().norm(dim=(1, 2)) / new.norm(dim=(1, 2)).clamp(min=1e-30))[:, None, None]
            x = (new * size).to(start.dtype)
            rows.append(new)
        found[name] = rows
    there = torch.ones(model.anatomy.n_layers, dtype=torch.bool)
    return {name: (torch.stack([residual(x, later) for x in rows], dim=1), there) for name, rows in found.items()}


def _mixer(model: Model, layer: int) -> str:
    """The site of what mixes tokens in a layer.

    Raises:
        SiteError: there is none.
    """
    for name in ("attn_out", "mixer_out"):
        point = Site(name, layer)
        if point in model.anatomy.hook_points:
            return name
    what = f"the residual without skips needs what the mixer of layer {layer} of {model.anatomy.name} adds"
    raise error(SiteError, what, do="choose a model whose stream is a sum of branches")


def _handed_on(model: Model, tokens: Tensor, layer: int, x: Tensor, mixer: str, mlp: bool) -> Tensor:
    """What a layer that reads x adds through its branches, without skips; through its mixer alone without `mlp`."""
    end = layer + 1 if layer + 1 < model.anatomy.n_layers else None

    def run(site: str, edits: tuple[Apply, ...] = ()) -> Tensor:
        return model.run(tokens, capture=site, edits=edits, start_at=layer, given=x, stop_at=end, logits=False)[site]

    mixed = run(f"{layer}.{mixer}")
    if not mlp:
        return mixed
    if Site("resid_mid", layer) not in model.anatomy.hook_points:
        return mixed + run(f"{layer}.mlp_out")
    return run(f"{layer}.mlp_out", (Apply(f"{layer}.resid_mid", function=lambda old: mixed.to(old)),))


def _by_layer(model: Model, tokens: Tensor, edits: tuple[Zero, ...] | list[Zero]) -> list[Tensor]:
    run = model.run(tokens, capture="*.resid_post", edits=edits, logits=False)
    return [at_least_float32(run[f"{i}.resid_post"]) for i in range(model.anatomy.n_layers)]


def residual(x: Float[Tensor, "row pos d"], mask: Tensor) -> Float[Tensor, " row"]:
    """[row] The norm of the tokens that a mask [row, pos] counts less their mean, over their norm."""
    keep = mask.to(x.device).unsqueeze(-1)
    x = x.double().where(keep, 0.0)
    mean = x.sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
    apart = (x - mean).where(keep, 0.0)
    return (apart.norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp(min=1e-60)).clamp(max=1)
