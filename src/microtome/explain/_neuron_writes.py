"""What single neurons add to the stream.

Formula:  neuron n adds a_n w_out,n, times the scale of the branch; where a norm follows the MLP: gain * centre(w_out,n)
          a_n / s, with its scale s held at that of the whole MLP's output.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.errors import SiteError, error
from microtome.model import Model


def refuse_hidden_neurons(model: Model) -> None:
    """Refuse a model of which some MLP's neurons are not seen.

    Raises:
        SiteError: it is one; says why.
    """
    a = model.anatomy
    unseen = next((i for i in range(a.n_layers) if Site("mlp.post", i) not in a.hook_points), None)
    if unseen is not None:
        why = f"no mlp.post in layer {unseen}: {a.missing.get(Site('mlp.post', unseen))}"
        do = "ask about whole MLPs, or open a model whose neurons are seen"
        raise error(SiteError, f"MLPs of {a.name} cannot be split by neuron", got=why, do=do)


def directions(model: Model, layer: int) -> Float[Tensor, "neuron d_model"]:
    """What each neuron of a layer writes per unit of its coefficient."""
    weights = model.layers[layer]
    w, norm = at_least_float32(weights.W_out), weights.mlp_post_norm
    return w if norm is None else norm.centre(w) * norm.gain


def coefficients(model: Model, layer: int, post: Float[Tensor, "*of neuron"]) -> Float[Tensor, "*of neuron"]:
    """How much of its direction each neuron writes, from its activations: themselves, but for scale and norm."""
    weights, scale = model.layers[layer], model.anatomy.hook_points[Site("mlp_out", layer)].scale
    found, norm = at_least_float32(post), weights.mlp_post_norm
    if norm is not None:
        raw = found @ at_least_float32(weights.W_out)
        raw = raw if weights.b_out is None else raw + weights.b_out
        found = found / norm.scale(raw).to(found.dtype).unsqueeze(-1)
    return found if scale == 1.0 else found * scale


def neuron_writes(model: Model, layer: int, post: Float[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
    """What each neuron of a layer adds to the stream at one position."""
    return coefficients(model, layer, post).unsqueeze(-1) * directions(model, layer)
