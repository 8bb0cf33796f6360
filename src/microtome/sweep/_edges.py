"""Edges: what one component writes, changed in what one input alone reads.

    1 the change that a sender makes is what it writes in the source minus what it writes in the base run;
    2 it is added to the stream that the receiver's norm reads, and the branch of that layer runs on the sum: for q, k
      and v with the other two inputs as in the base run;
    3 of what comes out only the receiver is kept: one head's z, the MLP's output, or the last stream itself;
    4 that becomes an ordinary cell of a sweep, which runs the layers behind it.

So an edge into one head's keys changes them for that query head alone, also where heads share keys and values.

Formula:  x_v = stream_v(base) + (write_u(source) - write_u(base)) at the receiver v; all else reads the base's own.
Cost:     a layer's attention runs three times a sender and its MLP once; then a cell of the receiver's layer an edge.
Check:    equal to plain hooks on the same model with keys and values of its own for every head;
          tests/laws/test_edges.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.anatomy import Address, Anatomy, NormWeights, Site, parse
from microtome.edit import Add, Frame, Set, SiteEdit, Source
from microtome.errors import EditError, SiteError, error
from microtome.run import LoadedModel, Run, run_forward
from microtome.run.hook import lock_of
from microtome.shown import shown

SENDERS = ("embed", "attn.z", "mlp_out")
INPUTS = ("attn.q", "attn.k", "attn.v")
RECEIVERS = (*INPUTS, "mlp.in", "final")
BRANCH_ROWS = 256
"""How many rows one run of a branch holds."""


@shown
@dataclass(frozen=True, eq=False)
class Edge:
    """A cell of a sweep: one sender's change, read by one receiver alone.

    Attributes:
        sender: `embed`, one head ``"3.attn.z[5]"`` or one MLP ``"7.mlp_out"``; with positions, what it writes there.
        receiver: one head's input ``"9.attn.q[2]"``, `k` or `v` (by query head), an MLP ``"9.mlp.in"``, or the logits
            `final`.
        source: a run that captured the sender's site whole, or a mapping from sites to such tensors.
        change: [pos, d_model], instead of a source, what the sender writes more than in the base run.
    """

    sender: str
    receiver: str
    source: Source | Mapping[str, Tensor] | None = None
    change: Tensor | None = None

    def __post_init__(self) -> None:
        sender, receiver = parse(self.sender), parse(self.receiver)
        if sender.name not in SENDERS or (sender.name == "attn.z") != sender.units.is_one or not _one_layer(sender):
            raise error(
                EditError,
                f'"{self.sender}" cannot send',
                allowed='embed, one head ("3.attn.z[5]"), one MLP ("7.mlp_out")',
                do="name one of these",
            )
        if (
            receiver.name not in RECEIVERS
            or (receiver.name in INPUTS) != receiver.units.is_one
            or not _one_layer(receiver)
        ):
            raise error(
                EditError,
                f'"{self.receiver}" cannot receive',
                allowed='one head\'s input ("9.attn.q[2]", k or v), one MLP ("9.mlp.in"), or final',
                do="name one of these",
            )
        source: Any = self.source
        if not (source is None or isinstance(source, Mapping) or hasattr(source, "whole")):
            allowed = "a run, or a mapping from sites to tensors"
            raise error(EditError, f"the edge {self.sender} -> {self.receiver} cannot use this source",
                        got=type(source).__name__, allowed=allowed, do="give the other run")  # fmt: skip
        if (self.source is None) == (self.change is None):
            raise error(EditError, f"the edge {self.sender} -> {self.receiver} needs a source or a change, not both")
        if not _before(sender, receiver):
            raise error(
                EditError,
                f"{self.sender} does not come before {self.receiver}",
                do="name a sender of an earlier layer, or an attention head of the receiving MLP's layer",
            )

    @property
    def layer(self) -> int | None:
        """The receiver's layer, None for the logits."""
        return _layer(parse(self.receiver))

    @property
    def branch(self) -> tuple[int | None, str]:
        """Layer and site of the branch that the receiver is a part of."""
        return self.layer, parse(self.receiver).name

    @property
    def change_of(self) -> tuple[str, int]:
        """What names the change that it makes in a prompt: the sender, and the source or change as an object."""
        return self.sender, id(self.source if self.change is None else self.change)


@dataclass(frozen=True, eq=False)
class _Placed:
    """An edge of one prompt: the row of its tokens here, and its number in the sweep."""

    edge: Edge
    row: int
    prompt: int

    @property
    def origin(self) -> tuple[str, int, int]:
        """What names the change that it makes: edges of one sender, one source and one prompt share it."""
        return *self.edge.change_of, self.row


def bytes_of_edges(model: LoadedModel, edges: Sequence[tuple[Edge, int]], lengths: Sequence[int]) -> int:
    """Bytes of edges, each with the number of its prompt, in addition to their cells: base run, changes, outputs."""
    if not edges:
        return 0
    a = model.anatomy
    heads, mixed = a.n_heads * a.d_head, 2 * a.n_kv_heads * a.d_head
    base = a.d_model + a.n_layers * (4 * a.d_model + 2 * heads + mixed)
    held = sum(base * lengths[prompt] for prompt in {prompt for _, prompt in edges})
    held += sum(a.d_model * lengths[prompt] for _, prompt in {(e.change_of, prompt) for e, prompt in edges})
    outputs = {(e.branch, e.change_of, prompt) for e, prompt in edges}
    each = {name: a.d_model if name == "mlp.in" else heads if name in INPUTS else 0 for name in RECEIVERS}
    held += sum(each[name] * lengths[prompt] for (_, name), _, prompt in outputs)
    rows, longest = min(BRANCH_ROWS, len(outputs)), max(lengths)
    held += rows * longest * (6 * a.d_model + 3 * a.d_mlp + 4 * heads + a.n_heads * longest)
    return held * (torch.finfo(model.dtype).bits // 8)


def _one_layer(address: Address) -> bool:
    return address.layers is None or (address.layers.is_one and not address.layers.from_end)


def _layer(address: Address) -> int | None:
    return None if address.layers is None or address.layers.ranges is None else address.layers.ranges[0][0]


def _before(sender: Address, receiver: Address) -> bool:
    written, read = _layer(sender), _layer(receiver)
    if written is None or read is None:
        return True
    same = sender.name == "attn.z" and receiver.name == "mlp.in"
    return written < read or (written == read and same)


def _from_first(differs: Bool[Tensor, " pos *of"]) -> tuple[str, int]:
    """The positions from the first one on where anything differs, and that one."""
    first = int(differs.flatten(1).any(1).int().argmax())
    return f"@{first}-{len(differs) - 1}", first


def _set(site: str, new: Float[Tensor, " pos *of"], own: Float[Tensor, " pos *of"]) -> SiteEdit:
    """The edit that puts `new` in place of `own`, from the first position on where they differ."""
    where, first = _from_first(new != own)
    return Set(site + where, value=new[first:])


def require_edges(anatomy: Anatomy) -> None:
    """Refuse a model whose residual stream is not a sum over its parts.

    Raises:
        SiteError: norms lie on the residual stream itself, or something is added that is no head and no MLP.
    """
    why = anatomy.why_no_sum or anatomy.why_other_branches
    if why is not None:
        raise error(
            SiteError,
            f"{anatomy.name} has no edges between heads and MLPs",
            got=why,
            do="use a model with norms before its branches, attention and MLPs",
        )


class Edges:
    """Converts edges over prompts of one length into ordinary cells."""

    def __init__(
        self, model: LoadedModel, tokens: Tensor, prompts: Sequence[int], standing: Sequence[SiteEdit] = ()
    ) -> None:
        """Run prompts, tokens [prompt, pos] by their numbers, and keep what senders write and branches read.

        Edits that are standing hold in the base run, and in every branch for what comes behind its input.
        """
        a = model.anatomy
        require_edges(a)
        self.model, self.tokens, self.prompts, self.standing = model, tokens, list(prompts), list(standing)
        self.parallel = a.parts.form == "parallel"
        names = ["resid_pre", "attn.q", "attn.k", "attn.v", "attn.z", "attn_out", "mlp_out"]
        names += [] if self.parallel else ["resid_mid"]
        with torch.no_grad(), lock_of(model.hf).aside():
            self.base: Run = run_forward(
                model, tokens, capture=["embed", *(f"*.{name}" for name in names)], edits=self.standing, logits=False
            )
        self._changes: dict[tuple[str, int, int], Tensor] = {}

    def cells(self, edges: Sequence[Edge], prompts: Sequence[int]) -> list[SiteEdit]:
        """An ordinary edit for every edge of a prompt, in their order.

        Raises:
            SiteError: the model or the source lacks a site of a sender or receiver.
            EditError: in a parallel block an MLP does not read its own layer's attention.
        """
        found: list[SiteEdit | None] = [None] * len(edges)
        by_branch: dict[tuple[int | None, str], list[int]] = {}
        for place, edge in enumerate(edges):
            self._check(edge)
            by_branch.setdefault(edge.branch, []).append(place)
        with torch.no_grad():
            for (layer, name), places in by_branch.items():
                mine = [_Placed(edges[place], self.prompts.index(prompts[place]), prompts[place]) for place in places]
                if layer is None:
                    cells = self._into_logits(mine)
                elif name == "mlp.in":
                    cells = self._into_mlp(mine, layer)
                else:
                    cells = self._into_heads(mine, layer, name)
                for place, cell in zip(places, cells, strict=True):
                    found[place] = cell
        return [cell for cell in found if cell is not None]

    def _check(self, edge: Edge) -> None:
        a, sender, receiver = self.model.anatomy, parse(edge.sender), parse(edge.receiver)
        a.sites(sender)
        whole = Address(receiver.name, receiver.layers) if receiver.name in INPUTS else receiver
        a.sites(whole)
        if receiver.name in INPUTS and receiver.units.resolve(a.n_heads) is None:
            allowed = f"heads 0 to {a.n_heads - 1}"
            raise error(SiteError, f"no head [{receiver.units}] to receive in {a.name}", allowed=allowed)
        if self.parallel and receiver.name == "mlp.in" and sender.name == "attn.z" and _layer(sender) == edge.layer:
            raise error(
                EditError,
                f"{edge.sender} does not come before {edge.receiver} in a parallel block",
                do="name a sender of an earlier layer",
            )

    def change(self, placed: _Placed) -> Float[Tensor, "pos d_model"]:
        """[pos, d_model] What the sender adds to the stream in the source, minus what it adds in the base run."""
        if placed.origin not in self._changes:
            self._changes[placed.origin] = self._change(placed)
        return self._changes[placed.origin]

    def _change(self, placed: _Placed) -> Float[Tensor, "pos d_model"]:
        edge, sender = placed.edge, parse(placed.edge.sender)
        site = Site(sender.name, _layer(sender))
        here = self.base[str(site)][placed.row]
        if edge.change is not None:
            new = edge.change.to(device=here.device, dtype=here.dtype)
            if new.shape != (len(here), self.model.anatomy.d_model):
                raise error(
                    EditError,
                    f"the change of {edge.sender} does not fit",
                    got=f"shape {list(new.shape)}",
                    allowed=f"[{len(here)}, {self.model.anatomy.d_model}] [pos, d_model]",
                )
        else:
            there = self._of(placed, site, here).to(device=here.device, dtype=here.dtype)
            new = self._written(site, here, there, int((sender.units.resolve(here.shape[1]) or [0])[0]))
        columns = self.base.batch.frame.columns_of(sender.positions, new.device)
        if columns is None:
            return new
        return torch.zeros_like(new).index_copy(0, columns[placed.row], new[columns[placed.row]])

    def _of(self, placed: _Placed, site: Site, here: Float[Tensor, " pos *of"]) -> Float[Tensor, " pos *of"]:
        source = placed.edge.source
        if isinstance(source, Mapping):
            if str(site) not in source:
                raise error(EditError, f"the source of an edge has no {site}", do="capture the whole site")
            there = source[str(site)]
        else:
            assert source is not None
            there = source.whole(site)
        rows, batch = there.shape[0], getattr(source, "batch", None)
        frame = Frame(((0, len(here)),), len(here), source_row=placed.prompt)
        fits = rows == 1 or placed.prompt < rows
        own = frame.source_of(there, site.spec.dims, None if batch is None else batch.spans)[0] if fits else there[-1]
        if not fits or own.shape != here.shape:
            raise error(
                EditError,
                f"the source of {placed.edge.sender} does not fit prompt {placed.prompt}",
                got=f"{rows} rows, {len(own)} tokens in its own" if fits else f"{rows} rows",
                allowed=f"{len(here)} tokens, in one row or in one row per prompt",
                do="run other prompts of the same numbers of tokens",
            )
        return own

    def _written(
        self, site: Site, here: Float[Tensor, " pos *of"], there: Float[Tensor, " pos *of"], head: int
    ) -> Float[Tensor, "pos d_model"]:
        if site.name != "attn.z":
            return there - here
        layer = site.layer or 0
        weights, path = self.model.layers[layer], self.model.anatomy.parts.layers[layer].attn_post_norm
        added = (there[:, head] - here[:, head]) @ weights.W_O[head]
        point = self.model.anatomy.hook_points[Site("attn_out", layer)]
        if path is None:
            return added * point.scale
        # A norm behind the branch: what it gives when this head alone has changed.
        raw = torch.einsum("phd,hdm->pm", here, weights.W_O)
        raw = raw if weights.b_O is None else raw + weights.b_O
        norm = self.model.hf.get_submodule(path)
        return (norm(raw + added) - norm(raw)) * point.scale

    def _into_logits(self, edges: Sequence[_Placed]) -> list[SiteEdit]:
        site = f"{self.model.anatomy.n_layers - 1}.resid_post"
        cells: list[SiteEdit] = []
        for placed in edges:
            change = self.change(placed)
            where, first = _from_first(change != 0)
            cells.append(Add(site + where, value=change[first:]))
        return cells

    def _into_mlp(self, edges: Sequence[_Placed], layer: int) -> list[SiteEdit]:
        stream = self.base[f"{layer}.resid_pre" if self.parallel else f"{layer}.resid_mid"]
        senders, own = {placed.origin: placed for placed in edges}, self.base[f"{layer}.mlp_out"]
        out = self._branch(layer, self.model.layers[layer].mlp_norm, stream, senders, "mlp.in", (), "mlp_out")
        return [_set(f"{layer}.mlp_out", out[placed.origin], own[placed.row]) for placed in edges]

    def _into_heads(self, edges: Sequence[_Placed], layer: int, name: str) -> list[SiteEdit]:
        """Every sender's change runs through the attention once, for all of its heads."""
        stream, own = self.base[f"{layer}.resid_pre"], self.base[f"{layer}.attn.z"]
        senders, held = {placed.origin: placed for placed in edges}, [n for n in INPUTS if n != name]
        z = self._branch(layer, self.model.layers[layer].attn_norm, stream, senders, "attn.in", held, "attn.z")
        cells: list[SiteEdit] = []
        for placed in edges:
            head = (parse(placed.edge.receiver).units.resolve(self.model.anatomy.n_heads) or [0])[0]
            part = slice(head, head + 1)
            cells.append(_set(f"{layer}.attn.z[{head}]", z[placed.origin][:, part], own[placed.row][:, part]))
        return cells

    def _branch(
        self,
        layer: int,
        norm: NormWeights | None,
        stream: Tensor,
        senders: Mapping[tuple[str, int, int], _Placed],
        into: str,
        held: Sequence[str],
        out: str,
    ) -> dict[tuple[str, int, int], Tensor]:
        """What comes out of one branch, by sender, when its norm reads the stream plus the sender's change.

        Only that layer runs; sites in `held` keep the base run's values.
        """
        found: list[Tensor] = []
        placed = list(senders.values())
        stop = layer + 1 if layer + 1 < self.model.anatomy.n_layers else None
        for first in range(0, len(placed), BRANCH_ROWS):
            part = placed[first : first + BRANCH_ROWS]
            rows = torch.tensor([one.row for one in part], device=stream.device)
            changed = torch.stack([stream[one.row] + self.change(one) for one in part])
            read = changed if norm is None else norm.module(changed)
            edits: list[SiteEdit] = [Set(f"{layer}.{into}", value=read), *self._standing(layer, out)]
            edits += [Set(f"{layer}.{name}", value=self.base[f"{layer}.{name}"][rows]) for name in held]
            site, given = f"{layer}.{out}", self.base[f"{layer}.resid_pre"][rows]
            with lock_of(self.model.hf).aside():
                run = run_forward(
                    self.model, self.tokens[rows], site, edits, start_at=layer, given=given, stop_at=stop, logits=False
                )
            found += run[site]
        return dict(zip(senders, found, strict=True))

    def _standing(self, layer: int, out: str) -> list[SiteEdit]:
        """The standing edits that act in a branch of a layer, each in this layer alone."""
        names = ("attn.",) if out == "attn.z" else ("mlp.", "mlp_out")
        found: list[SiteEdit] = []
        for edit in self.standing:
            sites = self.model.anatomy.sites(edit.address)
            if any(site.layer == layer and site.name.startswith(names) for site in sites):
                found.append(replace(edit, site=str(edit.address.at(layer))))
        return found
