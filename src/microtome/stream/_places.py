"""The sites of a harvest: what each keeps of a token, and how it is cut out of what a forward shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.anatomy import Address, Anatomy, Site, parse_list
from microtome.errors import ArgumentError, DataError, SiteError, error
from microtome.stream._documents import Row


@dataclass(frozen=True)
class Kept:
    """A site, or some units of it.

    Attributes:
        name: its address, as a harvest calls it.
        site: the site.
        shape: the axes of one token.
        units: which units of the first of these axes, None for all.
    """

    name: str
    site: Site
    shape: tuple[int, ...]
    units: tuple[int, ...] | None

    def cut(self, x: Tensor, lead: int) -> Tensor:
        """The values [batch, pos, ...] of text, from what a forward shows, whose first `lead` tokens are none."""
        x = x[:, lead:] if lead else x
        return x if self.units is None else x.index_select(2, torch.tensor(self.units, device=x.device))


def kept_of(anatomy: Anatomy, sites: str | Address | Iterable[str | Address]) -> list[Kept]:
    """What addresses keep of each token, each place once, in the order of the model.

    Raises:
        SiteError: an address matches nothing, names positions, or is of a site without a value for each token.
        ArgumentError: there is no address.
    """
    found: dict[str, Kept] = {}
    for address in parse_list(sites):
        if isinstance(address.positions, str) or not address.positions.is_all:
            what, do = f'"{address}" names positions', "leave them out: every token is kept"
            raise error(SiteError, what, do=do)
        if address.spec.dims[1] != "pos":
            dims = ", ".join(address.spec.dims)
            what = f'"{address}" has no value for each token'
            raise error(SiteError, what, got=f"[{dims}]", allowed="sites [batch, pos, ...]", do="name another site")
        for site in anatomy.sites(address):
            shape = tuple(anatomy.size(site, axis) for axis in address.spec.dims[2:])
            units = None
            if not address.units.is_all:
                units = tuple(address.units.resolve(anatomy.units(site)) or ())
                shape = (len(units), *shape[1:])
            name = str(address.at(site.layer))
            found[name] = Kept(name, site, shape, units)
    if not found:
        raise error(ArgumentError, "no site is named", do='name some, such as "*.resid_post"')
    return sorted(found.values(), key=lambda kept: (anatomy.order(kept.site), kept.name))


def watching(
    kept: Sequence[Kept], lead: int, take: Callable[[Kept, Tensor], None]
) -> dict[str, Callable[[Site, Tensor], None]]:
    """What to call at each address of a forward: `take` gets what is kept of each site."""
    by_site: dict[Site, list[Kept]] = {}
    for one in kept:
        by_site.setdefault(one.site, []).append(one)

    def see(site: Site, x: Tensor) -> None:
        for one in by_site[site]:
            take(one, one.cut(x, lead))

    return {str(site): see for site in by_site}


def require_finite(kept: Kept, x: Tensor, rows: Sequence[Row]) -> None:
    """Refuse values [batch, pos, ...] that are not finite: the site and the document are named.

    Raises:
        DataError: there is one.
    """
    if bool(torch.isfinite(x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32))):
        return
    bad = ~torch.isfinite(x)
    if not bool(bad.any()):  # the sum itself overflowed
        return
    row, pos, *_ = first = tuple(int(i) for i in bad.nonzero()[0])
    document, token = rows[row].source, rows[row].place.token + pos
    what = f'{kept.name} is not finite at token {token} of document {document} (group "{rows[row].group}")'
    do = "leave the document out, or open the model in a wider dtype"
    raise error(DataError, what, got=f"{x[first].item()}, {int(bad.sum())} such values in its batch", do=do)
