"""A session: edits and captures, compiled against an anatomy into a rig.

Order is the model's: sites are visited as the forward reaches them, and at one site edits come before captures, in the
order they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from microtome.anatomy import Address, Anatomy, Indices, Rule, Site
from microtome.edit import Edit, Freeze, Repeat, ScaleBlock, Selection, SiteEdit, Skip, apply, canonical
from microtome.errors import EditError, SiteError, error
from microtome.run._batch import Batch
from microtome.run.hook._frozen import freeze
from microtome.run.hook._hooks import HookSet
from microtome.run.hook._layer_paths import layer_paths
from microtome.run.hook._points import install

Observer = Callable[[Site, Tensor], None]


class Stop(Exception):
    """Raised inside a forward to end it where nothing more is wanted; caught by the run."""


@runtime_checkable
class Frame(Protocol):
    """Knows the forward that is under way: its shape, and which columns a position names."""

    def shape(self) -> tuple[int, int]:
        """Batch and width."""
        ...

    def columns(self, positions: Indices | Rule) -> Tensor | None:
        """The columns [batch, n] of positions, counted from the first token ever seen (None: all there are)."""
        ...

    def tokens(self) -> tuple[tuple[int, int], ...]:
        """The first column and the number of tokens of every row of the prompt."""
        ...

    def end(self) -> int:
        """How many columns there are, those of earlier forwards included."""
        ...

    def prompt(self) -> int:
        """How many of them are the prompt's."""
        ...

    def beams(self) -> int:
        """How many rows of a forward there are for each row of the prompt, one after another."""
        ...


class PromptFrame:
    """The flow of a single forward over a known batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._known: dict[Indices | Rule, Tensor | None] = {}

    def shape(self) -> tuple[int, int]:
        """Batch and width."""
        rows, width = self.batch.tokens.shape
        return rows, width

    def columns(self, positions: Indices | Rule) -> Tensor | None:
        """The columns of the positions, found once."""
        if positions not in self._known:
            self._known[positions] = self.batch.columns(positions)
        return self._known[positions]

    def tokens(self) -> tuple[tuple[int, int], ...]:
        """Pads and lengths."""
        return self.batch.spans

    def end(self) -> int:
        """The width."""
        return self.batch.tokens.shape[1]

    def prompt(self) -> int:
        """The width."""
        return self.batch.tokens.shape[1]

    def beams(self) -> int:
        """One."""
        return 1


class GenerationFrame:
    """The flow of calls that are not ours, such as generation, with a key/value cache or without.

    The first forward of a generation reads the prompt, and positions mean the prompt's ever after. `generated` names
    what came after it; `last` names every token that was the newest when it was computed: the prompt's last one, and
    all that came after it. A forward outside of `generate` that has no cache is a prompt of its own.
    """

    def __init__(self) -> None:
        self._shape, self._end = (0, 0), 0
        self._prompt: Batch | None = None
        self._mask: Tensor | None = None
        self._generating, self._prompts = False, 0

    @contextmanager
    def generating(self, prompts: int, mask: Tensor | None) -> Iterator[None]:
        """Take the forwards of this block for those of one generation from prompts with this mask [batch, pos]."""
        outer = self._generating, self._prompts, self._prompt, self._mask
        self._generating, self._prompts, self._prompt, self._mask = True, prompts, None, mask
        try:
            yield
        finally:
            self._generating, self._prompts, self._prompt, self._mask = outer

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of the model's forward."""
        tokens = kwargs.get("input_ids")
        tokens = tokens if tokens is not None else (args[0] if args else kwargs.get("inputs_embeds"))
        assert tokens is not None
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        self._shape = (int(tokens.shape[0]), int(tokens.shape[1]))
        self._end = before + self._shape[1]
        if self._prompt is None or not (before or self._generating):
            mask = self._mask_of(kwargs.get("attention_mask"))
            mask = torch.ones(self._shape[0], self._end, device=tokens.device) if mask is None else mask
            first = mask.int().argmax(1).tolist()
            shown = torch.zeros(mask.shape, dtype=torch.long, device=tokens.device)
            self._prompt = Batch(shown, tuple(mask.int().sum(1).tolist()), tuple(first))

    def _mask_of(self, mask: object) -> Tensor | None:
        """[batch, pos] True at real tokens: a forward's, or the call's where a static cache gave it another form."""
        rows, end = self._shape[0], self._end
        if isinstance(mask, Tensor) and mask.shape == (rows, end):
            return mask
        given = self._mask
        if given is None or given.dim() != 2 or given.shape[1] != end or rows % given.shape[0]:
            return None
        return given.repeat_interleave(rows // given.shape[0], dim=0)  # each prompt has as many rows as it has beams

    def shape(self) -> tuple[int, int]:
        """Batch and width of the forward under way."""
        return self._shape

    def tokens(self) -> tuple[tuple[int, int], ...]:
        """Pads and lengths of the prompt."""
        return () if self._prompt is None else self._prompt.spans

    def end(self) -> int:
        """The width of all that was seen."""
        return self._end

    def prompt(self) -> int:
        """The width of the first forward."""
        return 0 if self._prompt is None else self._prompt.tokens.shape[1]

    def beams(self) -> int:
        """Beams, or sequences, of a generation."""
        return max(1, self._shape[0] // self._prompts) if self._generating else 1

    def columns(self, positions: Indices | Rule) -> Tensor | None:
        """Columns of all that was seen."""
        assert self._prompt is not None
        shown = self._prompt.tokens
        rows, width = shown.shape
        added = torch.arange(width, self._end, device=shown.device).expand(rows, -1)
        if positions == "generated":
            return added
        if positions == "prompt":
            return torch.arange(width, device=shown.device).expand(rows, -1)
        columns = self._prompt.columns(positions)
        return torch.cat([columns, added], dim=1) if positions == "last" and columns is not None else columns


def _alone(x: Tensor) -> Tensor:
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
        for address in self.captures:
            self.session.captured[address] = _alone(self.session.cut(x, self.site, address))
        for observe in self.observers:
            observe(self.site, x)
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
        stands: bool = False,
    ) -> None:
        self.model, self.anatomy, self.frame, self.grad = model, anatomy, frame, grad
        self.captured: dict[Address, Tensor] = {}
        self.nodes: dict[Site, Tensor] = {}
        self.fired: set[tuple[int, Site]] = set()
        self.visited: set[Site] = set()
        self.hooks = HookSet(model, anatomy.attention, anatomy.n_heads, edits if stands else None)
        self.site_edits = [edit for edit in edits if isinstance(edit, SiteEdit)]
        for edit in edits:
            self._install_other(edit)
        visitors: dict[Site, _Visitor] = {}
        for edit in self.site_edits:
            for site in anatomy.sites(edit.address):
                self._visitor(visitors, site).edits.append((edit, edit.address))
        for address in captures:
            for site in anatomy.sites(address):
                self._visitor(visitors, site).captures.append(address.at(site.layer))
        for address, observe in (observers or {}).items():
            for site in anatomy.sites(address):
                self._visitor(visitors, site).observers.append(observe)
        if grad:
            self._visitor(visitors, Site("embed"))
        for site in sorted(visitors, key=anatomy.order):
            visitor = visitors[site]
            changes = bool(visitor.edits) or grad
            install(self.hooks, model, site, anatomy.hook_points[site], visitor, frame.shape, changes)

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
            freeze(self.hooks, self.model, self.anatomy, edit, self.frame.shape)
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
        """Where an edit applies in the forward under way; nowhere, and it is an empty list.

        One place serves all rows, unless a cache has dropped what is named of some rows and not of others.
        """
        batch, width = canonical(x, site).shape[:2]
        chosen = None if rows is None else self._rows(rows, batch, site).to(x.device)
        # A static cache holds columns that are not there yet; nothing begins before the first.
        frame = self.frame
        columns, offset = frame.columns(address.positions), max(frame.end() - width, 0)
        units = self.units(address, x, site)

        def place(of: Tensor | None, at: Tensor | None) -> Selection:
            return Selection(site, of, at, units, None, offset, frame.tokens(), frame.end(), frame.prompt())

        if columns is None or columns.shape[1] == 0:
            return [place(chosen, None)] if columns is None else []
        if offset == 0:
            return [place(chosen, columns)]
        # This tensor may begin later: a cache holds the columns before it, or only the last logits are computed.
        columns = columns - offset
        kinds, of_row = (columns >= 0).unique(dim=0, return_inverse=True)
        if len(kinds) == 1:
            columns = columns[:, kinds[0]]
            return [place(chosen, columns)] if columns.shape[1] else []
        every = torch.arange(batch, device=x.device) if chosen is None else chosen
        parts = [(every[of_row[every] == k], columns[:, kind].clamp(min=0)) for k, kind in enumerate(kinds)]
        return [place(of, at) for of, at in parts if len(of) and at.shape[1]]

    def _rows(self, rows: tuple[int, ...], batch: int, site: Site) -> Tensor:
        """The rows of a forward that rows of the prompt are; all beams of a prompt are its rows."""
        beams = self.frame.beams()
        if not all(0 <= r < batch // beams for r in rows):
            allowed = f"0 to {batch // beams - 1}"
            raise error(EditError, f"no rows {rows} at {site}", allowed=allowed, do="choose rows of the batch")
        return (torch.tensor(rows).unsqueeze(1) * beams + torch.arange(beams)).flatten()

    def cut(self, x: Tensor, site: Site, address: Address) -> Tensor:
        """The part of a tensor that an address names; the tensor itself where it names all."""
        if address.whole:
            return x
        for where in self.places(site, address, None, x):
            return canonical(where.cut(canonical(x, site)), site)
        return x[:0]
