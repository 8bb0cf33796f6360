"""The cells of a site: every layer by every place of a prompt, or by every unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from microtome.anatomy import Site
from microtome.errors import SiteError, error
from microtome.explain._spans import at
from microtome.method import Argument
from microtome.model import Model

BY_POSITION = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn.q", "attn.k", "attn.v", "attn.z")
BY_UNIT = ("attn.q[head]", "attn.k[head]", "attn.v[head]", "attn.z[head]", "attn.pattern[head]", "mlp.post[neuron]")
LAYOUTS = (*BY_POSITION, *BY_UNIT)
"""What can be patched by layer and position, and with its unit behind by layer and unit at all positions."""

Sites = Annotated[
    Sequence[str],
    Argument(
        "what to patch: a site by layer and position, or by layer and unit with the unit in brackets", choices=LAYOUTS
    ),
]
DEFAULT_SITES = ("resid_pre", "attn_out", "mlp_out", "attn.z[head]")


@dataclass(frozen=True)
class Layout:
    """The cells of one site of one prompt.

    Attributes:
        addresses: of the cells, in the order of the axes.
        dims: the axes that they fill, of `shape`.
        shape: how many layers, and how many places or units.
        capture: what a run must capture for them.
    """

    addresses: tuple[str, ...]
    dims: tuple[str, str]
    shape: tuple[int, int]
    capture: str


def every_position(length: int) -> list[tuple[int, int]]:
    """Each position of a prompt as a place (first, end) of its own."""
    return [(p, p + 1) for p in range(length)]


def layout(model: Model, site: str, places: Sequence[tuple[int, int]], axis: str = "pos", units_at: str = "") -> Layout:
    """The cells of a site: every layer by every place (first, end), or by every unit at some positions.

    Raises:
        SiteError: a layer lacks the site; says why.
    """
    name, by_unit = site.partition("[")[0], site.endswith("]")
    n = model.anatomy.n_layers
    absent = next((i for i in range(n) if Site(name, i) not in model.anatomy.hook_points), None)
    if absent is not None:
        why = model.anatomy.missing.get(Site(name, absent))
        raise error(SiteError, f"no {name} in layer {absent}", got=why, do="name other sites")
    if by_unit:
        units = model.anatomy.units(Site(name, 0))
        addresses = tuple(f"{i}.{name}[{u}]{units_at}" for i in range(n) for u in range(units))
        return Layout(addresses, ("layer", Site(name, 0).spec.unit), (n, units), f"*.{name}")
    addresses = tuple(f"{i}.{name}{at(*place)}" for i in range(n) for place in places)
    return Layout(addresses, ("layer", axis), (n, len(places)), f"*.{name}")
