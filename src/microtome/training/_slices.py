"""Where the weights of single neurons and heads are, in the parameters that hold them, whatever is fused with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from microtome.anatomy import Site, parse_list
from microtome.errors import ArgumentError, SiteError, error
from microtome.model import Model

Unit = tuple[int, str, int]
"""A layer, "mlp.post" or "attn.z", and the number of a neuron or head."""

OWN: Mapping[str, tuple[tuple[str, Callable[[Tensor, int], Tensor]], ...]] = {
    "mlp.post": (
        ("W_gate", lambda w, n: w[:, n]), ("W_in", lambda w, n: w[:, n]), ("W_out", lambda w, n: w[n]),
    ),
    "attn.z": (("W_Q", lambda w, n: w[n]), ("W_O", lambda w, n: w[n])),
}  # fmt: skip
"""By site, the matrices of a unit and what is its own in each; keys and values may be shared by heads."""


def units_of(model: Model, parts: str | Sequence[str]) -> list[Unit]:
    """Neurons and heads by their addresses, such as "12.mlp.post[431]" and "9.attn.z[3]"; each once.

    Raises:
        ArgumentError: there are none, or an address names something else.
        SiteError: the model has no such site or unit.
    """
    found: list[Unit] = []
    for address in parse_list(parts):
        if address.name not in OWN or address.layers is None or address.units.is_all:
            do = 'name neurons and heads, such as "12.mlp.post[431]" and "9.attn.z[3]"'
            raise error(ArgumentError, "these are no parts that can be tuned", got=str(address), do=do)
        for site in model.anatomy.sites(address):
            assert site.layer is not None
            size = model.anatomy.size(site, site.spec.unit)
            chosen = address.units.resolve(size)
            if chosen is None:
                what = f"no unit {address.units} in {site} of {model.anatomy.name}"
                raise error(SiteError, what, allowed=f"0 to {size - 1}", do="name some of these")
            found += [(site.layer, site.name, n) for n in chosen]
    if not found:
        raise error(ArgumentError, "there are no parts to tune", do='name some, such as "12.mlp.post[431]"')
    return list(dict.fromkeys(found))


def others(model: Model, units: Sequence[Unit], generator: torch.Generator) -> list[Unit]:
    """As many random units of the same layers and sites, none of them among these.

    Raises:
        ArgumentError: a layer has too few others.
    """
    found: list[Unit] = []
    for layer, name in dict.fromkeys((layer, name) for layer, name, _ in units):
        site = Site(name, layer)
        own = {n for i, kind, n in units if (i, kind) == (layer, name)}
        free = [n for n in range(model.anatomy.size(site, site.spec.unit)) if n not in own]
        if len(free) < len(own):
            got = f"{len(own)} of {len(own) + len(free)} in {site}"
            what = "too many parts of one layer to draw as many others"
            raise error(ArgumentError, what, got=got, allowed="half of them", do="name fewer, or choose sets=0")
        order = torch.randperm(len(free), generator=generator)[: len(own)].tolist()
        found += [(layer, name, free[i]) for i in order]
    return found


def places_of(model: Model, units: Sequence[Unit]) -> dict[str, Int[Tensor, " entry"]]:
    """By name of a parameter, which of its entries are the weights of the units, counted along its memory.

    Raises:
        SiteError: a weight is no view of a parameter: it is quantised, or computed.
    """
    parameters = {name: p for name, p in model.hf.named_parameters() if p.is_contiguous()}
    found: dict[str, list[Tensor]] = {}
    for layer, site, n in units:
        weights = model.layers[layer]
        gated = Site("mlp.gate", layer) in model.anatomy.hook_points
        for matrix, own in OWN[site]:
            if matrix == "W_gate" and not gated:
                continue
            view = own(getattr(weights, matrix), n)
            name = next((name for name, p in parameters.items() if _inside(view, p)), None)
            if name is None:
                what = f"{matrix} of layer {layer} of {model.anatomy.name} is no view of a parameter that can be tuned"
                raise error(SiteError, what, got="quantised or computed weights", do="open it with plain weights")
            found.setdefault(name, []).append(_entries(view, parameters[name]))
    return {name: torch.cat(several).unique() for name, several in found.items()}


def _inside(view: Tensor, parameter: Tensor) -> bool:
    """Whether a view is of the memory of a parameter."""
    if view.dtype != parameter.dtype or view.device != parameter.device:
        return False
    first = parameter.data_ptr()
    return first <= view.data_ptr() < first + parameter.numel() * parameter.element_size()


def _entries(view: Tensor, parameter: Tensor) -> Int[Tensor, " entry"]:
    """Which entries of a parameter a view of its memory holds."""
    at = torch.tensor((view.data_ptr() - parameter.data_ptr()) // parameter.element_size())
    for size, stride in zip(view.shape, view.stride(), strict=True):
        at = at.unsqueeze(-1) + torch.arange(size) * stride
    return at.flatten().to(parameter.device)
