"""The cells of a site: every layer that has it by every place of a prompt, or by every unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.errors import SiteError, error
from microtome.explain._spans import at
from microtome.method import Argument
from microtome.model import Model

BY_POSITION = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mixer_out", "mlp_out", "attn.q", "attn.k", "attn.v", "attn.z",
)  # fmt: skip
BY_UNIT = ("attn.q[head]", "attn.k[head]", "attn.v[head]", "attn.z[head]", "attn.pattern[head]", "mlp.post[neuron]")
LAYOUTS = (*BY_POSITION, *BY_UNIT)
"""What can be patched by layer and position, and with its unit behind by layer and unit at all positions."""

Sites = Annotated[
    Sequence[str],
    Argument(
        "what to patch: a site by layer and position, or by layer and unit with the unit in brackets", choices=LAYOUTS
    ),
]
DEFAULT_SITES = ("resid_pre", "attn_out", "mixer_out", "mlp_out", "attn.z[head]")
"""What is patched unless sites are named: of these, what the model has in some layer."""


@dataclass(frozen=True)
class Layout:
    """The cells of one site of one prompt.

    Attributes:
        addresses: of the cells, by layer and by place or unit; a layer without the site has none.
        dims: the axes that they fill, of `shape`.
        shape: how many layers, and how many places or units.
        site: the name of the site.
    """

    addresses: Mapping[tuple[int, int], str]
    dims: tuple[str, str]
    shape: tuple[int, int]
    site: str

    @property
    def capture(self) -> str:
        """What a run must capture for them."""
        return f"*.{self.site}"

    @property
    def layers(self) -> list[int]:
        """The layers that have the site."""
        return list(dict.fromkeys(layer for layer, _ in self.addresses))

    def spread(self, values: Float[Tensor, "*of cell"]) -> Float[Tensor, "*of layer _"]:
        """The values of the cells, in their order, by layer and by place or unit; NaN where there is no cell."""
        whole = values.new_full((*values.shape[:-1], *self.shape), torch.nan)
        layers, places = zip(*self.addresses, strict=True)
        whole[..., list(layers), list(places)] = values
        return whole


def every_position(length: int) -> list[tuple[int, int]]:
    """Each position of a prompt as a place (first, end) of its own."""
    return [(p, p + 1) for p in range(length)]


def named_sites(model: Model, sites: Sequence[str]) -> list[str]:
    """The sites that are asked for; of the default, those that the model has in some layer."""
    points = model.anatomy.hook_points
    there = {site.name for site in points}
    return [site for site in sites if tuple(sites) != DEFAULT_SITES or site.partition("[")[0] in there]


def layout(model: Model, site: str, places: Sequence[tuple[int, int]], axis: str = "pos", units_at: str = "") -> Layout:
    """The cells of a site: every layer that has it by every place (first, end), or by every unit at some positions.

    Raises:
        SiteError: no layer has the site; says why.
    """
    name, by_unit, a = site.partition("[")[0], site.endswith("]"), model.anatomy
    there = [i for i in range(a.n_layers) if Site(name, i) in a.hook_points]
    if not there:
        raise error(SiteError, f"{a.name} has {name} in no layer", got=a.missing.get(Site(name, 0)),
                    do="name other sites")  # fmt: skip
    if by_unit:
        units = {i: a.units(Site(name, i)) for i in there}
        addresses = {(i, u): f"{i}.{name}[{u}]{units_at}" for i in there for u in range(units[i])}
        return Layout(addresses, ("layer", Site(name, 0).spec.unit), (a.n_layers, max(units.values())), name)
    addresses = {(i, k): f"{i}.{name}{at(*place)}" for i in there for k, place in enumerate(places)}
    return Layout(addresses, ("layer", axis), (a.n_layers, len(places)), name)
