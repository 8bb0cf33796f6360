"""What a gated MLP does to a direction, as a sum of squares: exact where the gate is linear, near 0 where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.errors import ArgumentError, SiteError, error
from microtome.measurements._neuron_weights import neuron_directions
from microtome.model import Model
from microtome.shown import shown


@shown
@dataclass(frozen=True, eq=False)
class Bilinear:
    """A quadratic form by its eigenvectors, those of the largest eigenvalues first.

    Attributes:
        values: [term] eigenvalues.
        vectors: [term, d_model] how each term reads what the MLP reads.
        constants: [term] what each adds to that, from biases; 0 without.
        exact: whether the form is the layer itself; else it is a surrogate, the layer for gates near 0.
        slope: of the gate's activation at 0, by which the surrogate replaces it.
    """

    values: Float[Tensor, " term"]
    vectors: Float[Tensor, "term d_model"]
    constants: Float[Tensor, " term"]
    exact: bool
    slope: float

    def __call__(self, x: Float[Tensor, "*n d_model"], terms: int | None = None) -> Float[Tensor, "*n"]:
        """sum_i values_i (vectors_i . x + constants_i)^2 of what the MLP reads [..., d_model], of the first terms."""
        part = slice(terms)
        read = x.double() @ self.vectors[part].T.to(x.device) + self.constants[part].to(x.device)
        return read.square() @ self.values[part].to(x.device)

    def pairs(self, parts: Float[Tensor, "part *n d_model"]) -> Float[Tensor, "part_and_one part_and_one *n"]:
        """What each pair of parts of what the MLP reads adds, such as the embedding and each head: a path expansion.

        Formula:  [i, j] sum_k values_k r_ik r_jk,  r_ik = vectors_k . x_i of part x_i, and constants_k of the last one,
                  which is the bias;  the sum over all pairs is the form at the sum of the parts, and [i, j] = [j, i].

        Args:
            parts: [part, ..., d_model] whose sum the MLP reads, behind its norm's divisor and gain.
        """
        read = parts.double() @ self.vectors.T.to(parts.device)
        read = torch.cat([read, self.constants.to(parts.device).expand(1, *read.shape[1:])])
        return torch.einsum("i...k,j...k,k->ij...", read, read, self.values.to(parts.device))


@torch.no_grad()
def bilinear(model: Model, layer: int, direction: Tensor) -> Bilinear:
    """How much a gated MLP adds along a direction, as a quadratic form of what it reads.

    Formula:  u . mlp_out = sum_n (u . w_out,n) s (w_gate,n . x + b_gate,n)(w_in,n . x + b_in,n) + u . b_out, x = mlp.in
              and the gate's activation f(g) = s g; the symmetric matrix of the sum, in (x, 1), has eigenvalues
              values_i and eigenvectors (vectors_i, constants_i): the sum is that of values_i (vectors_i . x +
              constants_i)^2.
              Of another activation s is f'(0), by differences: 1/2 of SiLU and GELU. The form is then a surrogate.
    Source:   Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability", 2024 (arXiv 2410.08417),
              section 3; Sharkey, "A technical note on bilinear layers for interpretability", 2023 (arXiv 2305.03452),
              path expansion, which is `pairs`.
              Departs: biases are read along; other gates have a surrogate, called one.
    Cost:     2 neurons d_model^2 operations and one eigendecomposition [d_model, d_model], in float64.
    Check:    the sum equals the layer where the gate is linear; tests/laws/test_neuron_classes.py.

    Args:
        model: an open model.
        layer: of the MLP; negative numbers count from the end.
        direction: [d_model] u, a direction of the stream, such as a column of `model.W_U`.

    Raises:
        SiteError: the layer has no gated MLP of its own whose activation is a module.
        ArgumentError: the layer does not exist, or the direction does not fit.

    >>> mt.measurements.bilinear(model, 12, model.W_U[:, 284]).exact
    """
    a = model.anatomy
    if not -a.n_layers <= layer < a.n_layers:
        allowed = f"0 to {a.n_layers - 1}"
        raise error(ArgumentError, "layer does not exist", got=layer, allowed=allowed, do="choose a layer")
    layer %= a.n_layers
    u = direction.detach().double().cpu()
    slope, exact = _gate(model, layer)
    if u.shape != (a.d_model,) or not bool(u.isfinite().all()):
        got = f"shape {list(u.shape)}"
        raise error(ArgumentError, "direction is none of the stream", got=got, allowed=f"[{a.d_model}]", do="give one")
    weights = model.layers[layer]
    pairs = ((weights.W_gate, weights.b_gate), (weights.W_in, weights.b_in))
    gate, up = (_with_bias(at_least_float32(w).double().cpu(), b) for w, b in pairs)
    strength = slope * (neuron_directions(model, layer)["w_out"].double().cpu() @ u)
    form = (gate * strength.unsqueeze(0)) @ up.T
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    order = values.abs().argsort(descending=True)
    vectors = vectors[:, order].T
    return Bilinear(values[order], vectors[:, :-1].contiguous(), vectors[:, -1].contiguous(), exact, slope)


def _with_bias(weight: Float[Tensor, "d_model neuron"], bias: Tensor | None) -> Float[Tensor, "d_model_and_one neuron"]:
    last = weight.new_zeros(1, weight.shape[1]) if bias is None else bias.double().cpu().unsqueeze(0)
    return torch.cat([weight, last])


def _gate(model: Model, layer: int) -> tuple[float, bool]:
    """The slope of the gate's activation at 0, and whether the activation is that slope times its input.

    Raises:
        SiteError: there is no gated MLP of its own whose activation is a module.
    """
    path = model.anatomy.parts.layers[layer].act
    if Site("mlp.gate", layer) not in model.anatomy.hook_points or path is None:
        what = f"layer {layer} of {model.anatomy.name} has no gated MLP with an activation that can be read"
        raise error(SiteError, what, do="choose a layer with a gated MLP")
    act = model.hf.get_submodule(path)
    device, dtype = model.device, model.dtype
    x = torch.linspace(-8, 8, 65, device=device, dtype=dtype)
    with torch.no_grad():
        y, ends = act(x).double(), act(torch.tensor([-1.0, 1.0], device=device, dtype=dtype) * 2**-4).double()
    slope = float((ends[1] - ends[0]) * 2**3)
    return slope, bool(torch.allclose(y, slope * x.double(), rtol=1e-5, atol=1e-6))
