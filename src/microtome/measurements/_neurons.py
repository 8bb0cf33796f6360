"""What neurons are made of: their directions, how they lie to each other, and which tokens they promote.

Formula:  w_gate, w_in are columns of W_gate, W_in with the norm's gain folded in. w_out is what a unit of activation
          adds to the stream: a row of W_out times the branch's scale. Where a norm stands behind the branch it is drawn
          through that too (centred if it is a layer norm, times the gain), all but its divisor, which differs from
          token to token. Promoted and suppressed are the ends of (gain * w_out) W_U.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.model import Model

if TYPE_CHECKING:
    import xarray as xr


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12)


def neuron_directions(model: Model, layer: int) -> dict[str, Tensor]:
    """`w_out`, `w_in` and, in gated MLPs, `w_gate` of every neuron [neuron, d_model]: see this file's head.

    In float32 at least, whatever the type of the weights.
    """
    weights = model.layers[layer]
    norm = weights.mlp_norm
    gain = 1.0 if norm is None else norm.gain
    w_out, w_in = at_least_float32(weights.W_out), at_least_float32(weights.W_in)
    after, scale = weights.mlp_post_norm, model.anatomy.hook_points[Site("mlp_out", layer)].scale
    out = w_out if after is None else after.centre(w_out) * after.gain
    out = out if scale == 1.0 else out * scale
    found = {"w_out": out, "w_in": w_in.T * gain}
    if Site("mlp.gate", layer) in model.anatomy.hook_points:
        found["w_gate"] = at_least_float32(weights.W_gate).T * gain
    return found


def neuron_weights(model: Model, *, top: int = 5, progress: Callable[[int, int], None] | None = None) -> xr.Dataset:
    """Norms and cosines of every neuron's weights, and the tokens that its output promotes and suppresses.

    Formula:  see the head of this file.
    Source:   cosines after Gerstner and Schütze, "Understanding Gated Neurons in Transformers from Their Input-Output
              Functionality", 2025; promoted tokens after Geva et al., "Transformer Feed-Forward Layers Build
              Predictions by Promoting Concepts in the Vocabulary Space", 2022 (arXiv 2203.14680). Departs: norm gains
              are folded in. Papers cited from memory.
    Cost:     2 L neuron d_model vocab operations; memory for the logits of 512 neurons.
    Check:    equals the dense product on a tiny model; cosines lie in [-1, 1]; tests/laws/test_measure.py.

    Args:
        model: an open model.
        top: how many tokens at either end.
        progress: called with (done, all) layers.

    Returns:
        Dataset over (layer, neuron): `out_norm` (of w_out), `cos_in_out`, and for gated MLPs `cos_gate_in`,
        `cos_gate_out` (NaN otherwise); over (layer, neuron, rank): `promoted`, `suppressed` (token ids) and
        `promoted_logit`, `suppressed_logit`, in logits per unit of activation before the final norm's scale, relative
        to the mean token. Layers that are mixtures of experts are left out.
    """
    import xarray as xr

    layers = [i for i, part in enumerate(model.anatomy.parts.layers) if part.experts is None]
    readable = model.final_norm is not None and model.W_U.shape[0] == model.anatomy.d_model
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for done, i in enumerate(layers):
            for name, value in _of_layer(model, i, top if readable else 0).items():
                rows.setdefault(name, []).append(value.cpu())
            if progress is not None:
                progress(done + 1, len(layers))
    variables = {
        name: (("layer", "neuron", "rank")[: values[0].dim() + 1], torch.stack(values).numpy())
        for name, values in rows.items()
    }
    return xr.Dataset(
        variables, coords={"layer": layers}, attrs=model.provenance | {"method": "neuron weights", "top": top}
    )


def _of_layer(model: Model, layer: int, top: int) -> dict[str, Tensor]:
    w = neuron_directions(model, layer)
    nothing = torch.full((w["w_out"].shape[0],), torch.nan)
    gate = w.get("w_gate")
    found = {
        "out_norm": w["w_out"].norm(dim=-1),
        "cos_in_out": _cosine(w["w_in"], w["w_out"]),
        "cos_gate_in": nothing if gate is None else _cosine(gate, w["w_in"]),
        "cos_gate_out": nothing if gate is None else _cosine(gate, w["w_out"]),
    }
    return found | _tokens(model, w["w_out"], top) if top else found


def _tokens(model: Model, out: Tensor, top: int) -> dict[str, Tensor]:
    norm = model.final_norm
    assert norm is not None
    unembed = at_least_float32(model.W_U) * model.anatomy.logit_scale
    unembed = unembed - unembed.mean(1, keepdim=True)
    parts: dict[str, list[Tensor]] = {k: [] for k in ("promoted", "promoted_logit", "suppressed", "suppressed_logit")}
    for chunk in (norm.centre(out) * norm.gain).split(512):
        logits = chunk @ unembed
        high, low = logits.topk(top), logits.topk(top, largest=False)
        parts["promoted"].append(high.indices.int())
        parts["promoted_logit"].append(high.values)
        parts["suppressed"].append(low.indices.int())
        parts["suppressed_logit"].append(low.values)
    return {name: torch.cat(values) for name, values in parts.items()}
