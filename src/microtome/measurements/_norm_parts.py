"""What the two parts of layer norm do to attention: projection and scaling, each alone and both, on real inputs.

Formula:  x_i the stream that enters a layer's attention, over the T tokens of a row:
          none  x;   projection  x - mean(x) 1;   scaling  sqrt(d_model) x / |x|;   both  the second of the first;
          selects_itself  share of i with x_i . x_i > x_i . x_j for all other j: a query along the input picks it;
          ones_share      the norm of (x_i . 1) / sqrt(d_model), less its mean over the row, over the norm of x_i, both
                          root mean squares over the row: how far a query along 1 is from uniform attention;
          unselectable    share of the keys (x * gain) W_K of a head that no query scores highest (see
                          _unselectable.py), before positions.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.errors import SiteError, error
from microtome.measurements._unselectable import selectable
from microtome.model import Model

PARTS = ("none", "projection", "scaling", "both")


def norm_parts(model: Model, tokens: Tensor, *, layers: list[int] | None = None) -> xr.Dataset:
    """Which inputs and keys attention could select under each part of layer norm, by layer and head.

    Formula:  see this file's head.
    Source:   Brody, Alon and Yahav, "On the Expressivity Role of LayerNorm in Transformers' Attention", 2023
              (2305.02582). Departs: nothing is trained; what a norm that only scales (RMSNorm) leaves out is asked too.
    Cost:     one forward, and linear programs for keys that no simple query selects.
    Check:    scaled inputs that differ always select themselves, projected ones have no share along 1;
              tests/laws/test_selectivity.py.

    Args:
        model: an open model.
        tokens: [row, pos] token ids; a row of more tokens than d_head shows more.
        layers: some layers; all by default.

    Returns:
        A dataset of `selects_itself` and `ones_share` [part, layer] and of `unselectable` [part, layer, head], by head
        of keys. `norm` [layer] says which part the model's own norm is: "scaling" or "both".

    Raises:
        SiteError: no such layer has a norm before its attention and keys with weights.
    """
    every = range(model.anatomy.n_layers) if layers is None else layers
    chosen = [i for i in every if _has_keys(model, i)]
    if not chosen:
        what = f"no layer of {model.anatomy.name} has a norm before its attention and keys with weights"
        raise error(SiteError, what, do="use a model with some")
    run = model.run(tokens, capture=[f"{i}.resid_pre" for i in chosen], logits=False)
    found: dict[str, list[Tensor]] = {"selects_itself": [], "ones_share": [], "unselectable": []}
    own: list[str] = []
    with torch.no_grad():
        for at, layer in enumerate(chosen):
            norm = model.layers[layer].attn_norm
            assert norm is not None
            own.append("both" if norm.norm.centred else "scaling")
            weight = at_least_float32(model.layers[layer].W_K).double()
            gain = norm.gain.double() if isinstance(norm.gain, Tensor) else norm.gain
            told = [_of_part(x, gain, weight) for x in parts_of(run[f"{layer}.resid_pre"].double()).values()]
            for name, values in found.items():
                values.append(torch.stack([one[name] for one in told]).cpu())
            current().report("asking which keys can be selected", at + 1, len(chosen))
    variables: dict[str, Any] = {
        name: (("part", "layer", "head")[: x[0].dim() + 1], torch.stack(x, dim=1).numpy(), {"unit": "share"})
        for name, x in found.items()
    }
    variables["norm"] = "layer", own
    coords = {"part": list(PARTS), "layer": chosen}
    return xr.Dataset(variables, coords=coords, attrs=dict(model.provenance) | {"method": "norm_parts"})


def _has_keys(model: Model, layer: int) -> bool:
    if Site("attn.k", layer) not in model.anatomy.hook_points or model.layers[layer].attn_norm is None:
        return False
    try:
        weight = model.layers[layer].W_K
    except SiteError:
        return False
    return weight.dim() == 3


def parts_of(x: Float[Tensor, "*at d_model"]) -> dict[str, Float[Tensor, "*at d_model"]]:
    """An input under each part of layer norm."""
    centred = x - x.mean(-1, keepdim=True)
    return {"none": x, "projection": centred, "scaling": _scaled(x), "both": _scaled(centred)}


def _scaled(x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
    return x * x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _of_part(
    x: Float[Tensor, "row pos d_model"], gain: Any, weight: Float[Tensor, "head d_model d_head"]
) -> dict[str, Tensor]:
    """The columns of one part and layer."""
    gram = x @ x.transpose(-1, -2)
    own = gram.diagonal(dim1=-2, dim2=-1)
    others = gram.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), -torch.inf)
    along = x.mean(-1) * x.shape[-1] ** 0.5
    spread = (along - along.mean(1, keepdim=True)).square().mean(1) / own.mean(1)
    keys = torch.einsum("rpd,hdk->hrpk", x * gain, weight)
    lost = [torch.stack([(~selectable(row)).double().mean() for row in head]).mean() for head in keys]
    return {
        "selects_itself": (own > others.amax(-1)).double().mean(), "ones_share": spread.sqrt().mean(),
        "unselectable": torch.stack(lost),
    }  # fmt: skip
