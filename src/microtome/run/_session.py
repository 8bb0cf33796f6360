"""A session: edits and captures, compiled against an anatomy into a hook set.

Order is the model's: sites are visited as the forward reaches them, and at one site edits come before captures, in the
order they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import Address, Anatomy, Site
from microtome.edit import Edit, Frame, Freeze, Repeat, ScaleBlock, Selection, SiteEdit, Skip, apply, canonical
from microtome.errors import EditError, SiteError, error
from microtome.run.hook._frozen import freeze
from microtome.run.hook._hooks import HookSet
from microtome.run.hook._layer_paths import layer_paths
from microtome.run.hook._points import install

Observer = Callable[[Site, Tensor], None]


class Stop(Exception):
    """Raised inside a forward to end it where nothing more is wanted; caught by the run."""


def compact(x: Tensor) -> Tensor:
    """A tensor to be kept: a copy where it is cut out of a larger one, all of which it would keep with it."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


@dataclass
class _Visitor:
    """What happens at one site."""

    session: Session
    site: Site
    edits: list[tuple[SiteEdit, Address]]
    captures: list[Address]
    observers: list[Observer]
    names: set[Site] = field(default_factory=set)

    def __call__(self, x: Tensor) -> Tensor | None:
        own = x
        self.session.visited.update(self.names)
        for edit, address in self.edits:
            named = Site(address.name, self.site.layer)
            for where in self.session.places(named, address, edit.rows, x):
                self.session.fired.add((id(edit), named))
                x = apply(edit, x, where)
        if self.session.grad and (self.captures or self.site.name == "embed"):
            x = self._node(x)
        # Models that are set up for gradient checkpointing let embeddings require gradients also where none are kept.
        seen = x if self.session.grad else x.detach()
        for address in self.captures:
            self.session.captured[address] = compact(self.session.cut(seen, self.site, address))
        for observe in self.observers:
            observe(self.site, seen)
        self.session.waiting.discard(self.site)
        if self.session.ends and not self.session.waiting:
            raise Stop
        return None if x is own else x

    def _node(self, x: Tensor) -> Tensor:
        # A fresh node of the graph, through which all later computation passes, so that it has a gradient.
        x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        for name in {self.site.name, *(address.name for address in self.captures)}:
            self.session.nodes[Site(name, self.site.layer)] = x
        return x


class Session:
    """Edits and captures bound to one model, with what they gathered."""

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        frame: Frame,
        *,
        edits: Sequence[Edit] = (),
        captures: Sequence[Address] = (),
        observers: Mapping[Address, Observer] | None = None,
        grad: bool = False,
        active: bool = False,
        first: int = 0,
    ) -> None:
        self.model, self.anatomy, self.frame, self.grad = model, anatomy, frame, grad
        self.captured: dict[Address, Tensor] = {}
        self.nodes: dict[Site, Tensor] = {}
        self.fired: set[tuple[int, Site]] = set()
        self.visited: set[Site] = set()
        self.waiting: set[Site] = set()
        self.ends = False
        self._first = first
        self.hooks = HookSet(model, anatomy.attention, anatomy.n_heads, edits if active else None)
        self.site_edits = [edit for edit in edits if isinstance(edit, SiteEdit)]
        for edit in edits:
            self._install_other(edit)
        visitors: dict[Site, _Visitor] = {}
        for edit in self.site_edits:
            for site in self._sites(edit.address):
                self._visitor(visitors, site).edits.append((edit, edit.address))
        for address in captures:
            for site in self._sites(address):
                self._visitor(visitors, site).captures.append(address.at(site.layer))
        for address, observe in (observers or {}).items():
            for site in self._sites(address):
                self._visitor(visitors, site).observers.append(observe)
        if grad:
            self._visitor(visitors, Site("embed"))
        self.waiting = set(visitors)
        for site in sorted(visitors, key=anatomy.order):
            visitor = visitors[site]
            changes = bool(visitor.edits) or grad
            install(self.hooks, model, site, anatomy.hook_points[site], visitor, self._shape, changes)

    def end_after_last(self) -> None:
        """Let the forward end when every site that is edited, captured or observed has been seen."""
        self.ends = True

    def _shape(self) -> tuple[int, int]:
        """Rows and columns of the forward under way."""
        return self.frame.shape

    def _sites(self, address: Address) -> list[Site]:
        """The sites of an address in the layers that are computed."""
        return [s for s in self.anatomy.sites(address) if s.layer is None or s.layer >= self._first]

    def take(self) -> tuple[dict[Address, Tensor], dict[Site, Tensor]]:
        """What was captured, with the nodes of its gradients; the session keeps none of it.

        Session and hooks refer to each other, so what it kept would stay in memory until the next garbage collection.
        """
        captured, nodes, self.captured, self.nodes = self.captured, self.nodes, {}, {}
        return captured, nodes

    def _visitor(self, visitors: dict[Site, _Visitor], site: Site) -> _Visitor:
        place, first = site, Site("attn.scale", site.layer)
        if site.name == "mlp.scale" and self.anatomy.hook_points.get(first) == self.anatomy.hook_points[site]:
            place = first  # one norm serves both branches: its divisor is one site by two names
        visitor = visitors.setdefault(place, _Visitor(self, place, [], [], []))
        visitor.names.add(site)
        return visitor

    def _install_other(self, edit: Edit) -> None:
        if isinstance(edit, Skip | Repeat | ScaleBlock):
            layer_paths(self.hooks, self.anatomy, edit)
        elif isinstance(edit, Freeze):
            freeze(self.hooks, self.model, self.anatomy, edit, self._shape)
        elif not isinstance(edit, SiteEdit):
            raise error(EditError, "not an edit", got=repr(edit), allowed="the edits of microtome", do="pass an edit")

    def units(self, address: Address, x: Tensor, site: Site) -> Tensor | None:
        """The selected units of a tensor in the site's own axes, or None for all."""
        if address.units.is_all:
            return None
        size = canonical(x, site).shape[2]
        chosen = address.units.resolve(size)
        if chosen is None:
            raise error(
                SiteError,
                f"no units [{address.units}] at {site}",
                allowed=f"0 to {size - 1}",
                do="choose units that exist",
            )
        return torch.tensor(chosen, device=x.device)

    def places(self, site: Site, address: Address, rows: tuple[int, ...] | None, x: Tensor) -> list[Selection]:
        """The parts of x that an address names in the forward under way; see `Frame.select`."""
        if not self.frame.spans:
            raise error(
                EditError, f"{site} is reached by a call of a part of the model, whose positions are not known",
                do="inside `editing`, call the model itself",
            )  # fmt: skip
        width, units = canonical(x, site).shape[1], self.units(address, x, site)
        return [Selection(site, units, cut) for cut in self.frame.select(address.positions, rows, width, x.device)]

    def cut(self, x: Tensor, site: Site, address: Address) -> Tensor:
        """The part of a tensor that an address names; the tensor itself where it names all."""
        if address.whole:
            return x
        for where in self.places(site, address, None, x):
            return canonical(where.cut(canonical(x, site)), site)
        return x[:0]
