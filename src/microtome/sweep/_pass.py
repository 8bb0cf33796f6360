"""Exact sweeps: thousands of edited runs in a few passes over the layers.

A cell is one edited run of one prompt. All cells whose first affected position is p share one pass:

    1 the model's own forward runs on the positions from p on, with the base run's keys and values before them;
    2 at layer l the rows of the cells that first act there join the batch, with what the base run had entering l,
      so that layers before l are never computed for them;
    3 each row's edits are applied to that row alone;
    4 only the positions that the metric reads go through the last MLP and the unembedding, and only the tokens that it
      reads have their logits computed.

The forward, its masks and its positions are the model's: only the batch grows inside it. What comes out is equal to one
forward a cell, to rounding, in the models that allow it: which of this a model allows is tried first (`_sharing`).

Cost:   a cell at layer l and position p costs (L - l)/L * (T - p)/T of a forward.
Check:  equal to one literal forward a cell for every site and family; tests/laws/test_sweep.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from microtome.anatomy import Site, bias_of, packed, weight_of
from microtome.axes import Tokens
from microtome.edit import Apply, Frame, Mean, Selection, SiteEdit, apply, canonical
from microtome.errors import EditError, SiteError, error
from microtome.run import Batch, LoadedModel
from microtome.run.hook import HookSet, input_of, install, lock_of, output_of, with_input, with_output
from microtome.sweep._written import Act, written

Cell = SiteEdit | Sequence[SiteEdit]
HOST = torch.empty(0).cpu().device


@dataclass(frozen=True)
class Row:
    """A cell ready to run: its place in the result, its prompt, its acts, where it joins, and from which column on.

    Of acts that stand in every row only those behind the entry are left; they act from whichever column a pass has on.
    """

    place: int
    prompt: int
    acts: tuple[Act, ...]
    entry: int
    first: int


@dataclass(frozen=True)
class Base:
    """What the base run left for its edited copies: the stream before every layer, keys and values, and logits.

    Attributes:
        prompts: the prompts of this batch, by number, all of one length.
        stream: [layer, batch, pos, d_model], what enters each layer.
        keys, values: by layer, as the model caches them.
        read: [batch, read] columns that the metric reads.
        ids: [vocab] the tokens whose logits it reads, or None for all.
        logits: [batch, read, vocab].
    """

    prompts: tuple[int, ...]
    tokens: Tokens
    stream: Float[Tensor, "layer batch pos d_model"]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    read: Int[Tensor, "batch read"]
    ids: Int[Tensor, " vocab"] | None
    logits: Float[Tensor, "batch read vocab"]


class _Prefix(DynamicLayer):
    """Keys and values of the base run before column `first`, put in front of every row's own; nothing is stored."""

    def __init__(self, batched_pass: BatchedPass, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.within, self.prefix = batched_pass, (keys, values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The base's prefix for each row, followed by the row's own."""
        rows = self.within.bases
        keys, values = (x.narrow(-2, 0, self.within.first)[rows] for x in self.prefix)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Columns before the rows' own."""
        return self.within.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns attended to, and the first of them."""
        return self.within.first + query_length, 0


class BatchedPass:
    """One pass over the layers for cells that begin at one column."""

    def __init__(self, model: LoadedModel, base: Base, rows: Sequence[Row], first: int, *, narrow: bool = True) -> None:
        """With `narrow`, the last MLP runs only at the columns that are read, which not every MLP allows."""
        self.model, self.base, self.first, self._narrow = model, base, first, narrow
        self.rows = sorted(rows, key=lambda r: r.entry)
        self.bases = torch.tensor([base.prompts.index(r.prompt) for r in self.rows])[:0]
        self._all = torch.tensor([base.prompts.index(r.prompt) for r in self.rows], device=base.tokens.device)
        self._entries = [r.entry for r in self.rows]
        self._width = base.tokens.shape[1]
        self._active = 0
        self._aside: Tensor | None = None

    def run(self) -> Float[Tensor, "row read vocab"]:
        """Logits [row, read, vocab] of the rows, in the order of `rows`."""
        model = self.model
        hooks = HookSet(model.hf, model.anatomy.attention, model.anatomy.n_heads)
        for i, layer in enumerate(model.anatomy.parts.layers):
            hooks.before(layer.block, self._enter(i))
            hooks.around(layer.block, self._block)
        _install_acts(hooks, model, [row.acts for row in self.rows], self._shape)
        if self._narrow:
            self._narrow_last(hooks)
        unembedding = model.anatomy.parts.unembedding
        if (norm := model.read_norm) is not None:
            hooks.after(norm.path, self._set_aside, norm.call)
        hooks.before(unembedding, self._read)
        if self.base.ids is not None:
            hooks.around(unembedding, some_logits(model.hf.get_submodule(unembedding), self.base.ids))
        inputs: dict[str, Any] = {"input_ids": self.base.tokens[:1, self.first :]}
        if self.first:
            cache = DynamicCache()
            cache.layers.extend(_Prefix(self, k, v) for k, v in zip(self.base.keys, self.base.values, strict=True))
            inputs |= {"past_key_values": cache, "use_cache": True}
        elif model.anatomy.causal:
            inputs["use_cache"] = False
        with torch.no_grad(), hooks, lock_of(model.hf).aside():
            return model.hf(**inputs).logits

    def _enter(self, layer: int) -> Any:
        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_input(args, kwargs, self._join(input_of(args, kwargs), layer))

        return before

    def _block(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active:
            # No row is edited this early: the forward carries one placeholder row, which no layer needs to compute.
            return self.model.anatomy.instead(input_of(args, kwargs))
        args, kwargs = widened(args, kwargs, self._active)
        return forward(*args, **kwargs)

    def _join(self, hidden: Float[Tensor, "before pos d_model"], layer: int) -> Float[Tensor, "row pos d_model"]:
        """The batch with the rows that first act at this layer."""
        stop = sum(e <= layer for e in self._entries)
        if stop == self._active:
            return hidden
        new = self.base.stream[layer, self._all[self._active : stop], self.first :]
        hidden = torch.cat([hidden, new]) if self._active else new
        self._active, self.bases = stop, self._all[:stop]
        return hidden

    def _columns(self) -> Int[Tensor, "row read"]:
        """[row, read] The columns that the metric reads; those before `first` are read off the base later."""
        return (self.base.read[self.bases] - self.first).clamp(min=0)

    def _set_aside(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Hand over one row of what the final norm gives, as some trunks give what follows the shape of the tokens.

        The unembedding reads just what that norm gives, as the proof says, and is given all rows again.
        """
        self._aside = output
        return output[:1]

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = input_of(args, kwargs) if self._aside is None else self._aside
        return with_input(args, kwargs, columns_of(rows, self._columns()))

    def _narrow_last(self, hooks: HookSet) -> None:
        """Let the last MLP see only the columns that are read: nothing comes after it, and it was tried."""
        last = self.model.anatomy.n_layers - 1
        acts = [act for row in self.rows for act in row.acts if act.site.layer == last]
        edited = any(act.site.name.startswith("mlp") or _mixes_positions(act.edit) for act in acts)
        path = self.model.anatomy.parts.layers[last].mlp
        if path is None or edited or self.base.read.shape[1] >= self._width - self.first:
            return

        def token_subset(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            shape, columns = input_of(args, kwargs).shape, self._columns()

            def cut(value: Any) -> Any:
                return columns_of(value, columns) if isinstance(value, Tensor) and value.shape == shape else value

            output = forward(*map(cut, args), **{k: cut(v) for k, v in kwargs.items()})
            some = output_of(output)
            index = columns.unsqueeze(-1).expand(-1, -1, some.shape[-1])
            return with_output(output, some.new_zeros(shape).scatter(1, index, some))

        hooks.around(path, token_subset)

    def _shape(self) -> tuple[int, int]:
        return self._active, self._width - self.first


def _install_acts(
    hooks: HookSet, model: LoadedModel, acts: Sequence[Sequence[Act]], shape: Callable[[], tuple[int, int]]
) -> None:
    """Let every row of a batch, by its number, be changed by its own acts."""
    at: dict[Site, list[tuple[int, Act]]] = {}
    for number, of_row in enumerate(acts):
        for act in of_row:
            at.setdefault(act.site, []).append((number, act))
    for site in sorted(at, key=model.anatomy.order):
        point = model.anatomy.hook_points[site]
        # What leaves a layer is changed where it enters the next, before what is changed there.
        in_order = sorted(at[site], key=lambda numbered: model.anatomy.order(numbered[1].named))
        install(hooks, model.hf, site, point, _visit(site, in_order), shape, edits=True)


def _visit(site: Site, acts: Sequence[tuple[int, Act]]) -> Callable[[Tensor], Tensor | None]:
    together, others = written(acts)

    def visit(x: Tensor) -> Tensor:
        x = x.clone()
        fit = all(one.fits(x) for one in together)
        for one in together if fit else ():
            one.put(x)
        for number, act in (acts[place] for place in others) if fit else acts:
            row = x[number : number + 1]
            for where in _selections(row, site, act):
                row = apply(act.edit, row, where)
            x[number : number + 1] = row
        return x

    return visit


def _selections(x: Tensor, site: Site, act: Act) -> list[Selection]:
    """The part of one row that an act changes. Keys and values have the prefix in front, everything else has not."""
    width, units = (*canonical(x, site).shape[1:3], 1)[:2]  # what a norm divides by has no units
    chosen = None if act.address.units.is_all else torch.tensor(act.address.units.resolve(units), device=x.device)
    if not act.standing:
        return [Selection(act.named, chosen, act.frame.at(width))]
    cuts = act.frame.select(act.address.positions, None, width, x.device)
    return [Selection(act.named, chosen, cut) for cut in cuts]


def widened(args: Any, kwargs: dict[str, Any], rows: int) -> tuple[Any, dict[str, Any]]:
    """Arguments made for one row, for many: tensors with a batch axis of one are expanded, not copied."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1:
            return value.expand(rows, *value.shape[1:])
        return tuple(widen(v) for v in value) if isinstance(value, tuple) else value

    found = {k: v if k == "hidden_states" else widen(v) for k, v in kwargs.items()}
    bias = found.get("alibi")
    if isinstance(bias, Tensor) and bias.dim() == 3:  # its first axis is batch times head
        found["alibi"] = bias.repeat(rows, 1, 1)
    return ((args[0], *map(widen, args[1:])) if args else args), found


def columns_of(x: Float[Tensor, "row pos width"], columns: Int[Tensor, "row read"]) -> Float[Tensor, "row read width"]:
    """Columns [row, read] of x [row, pos, d_model]."""
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def some_logits(unembedding: Any, ids: Int[Tensor, " id"]) -> Any:
    """The unembedding for some tokens only; what the model does to logits after it is done to these."""
    if packed(unembedding) is not None:  # what rounds what it reads is no product with a matrix

        def whole(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return forward(*args, **kwargs)[..., ids]

        return whole
    weight, bias = weight_of(unembedding)[ids], bias_of(unembedding)
    bias = None if bias is None else bias[ids]

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return torch.nn.functional.linear(input_of(args, kwargs), weight, bias)

    return around


def base_of(
    model: LoadedModel,
    batch: Batch,
    prompts: Sequence[int],
    read: Int[Tensor, "batch read"],
    ids: Int[Tensor, " id"] | None,
    standing: Sequence[SiteEdit],
    cached: bool,
    start: Float[Tensor, "batch pos d_model"] | None = None,
) -> Base:
    """Run prompts of one length with nothing but the standing edits, and keep what sweeps over them need.

    `start` replaces what enters the first layer.
    """
    n = model.anatomy.n_layers
    tokens = batch.tokens
    streams: list[Tensor] = [torch.empty(0)] * n
    hooks = HookSet(model.hf, model.anatomy.attention, model.anatomy.n_heads)

    def keep(i: int) -> Any:
        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            streams[i] = input_of(args, kwargs).detach() if i or start is None else start
            return None if i or start is None else with_input(args, kwargs, start)

        return before

    def select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_input(args, kwargs, columns_of(input_of(args, kwargs), read))

    for i, layer in enumerate(model.anatomy.parts.layers):
        hooks.before(layer.block, keep(i))
    # What enters a layer is kept as it is before edits: a row that joins there is edited like all others.
    has_start = start is not None
    acts = [standing_acts(model, standing, prompt, tokens.shape[1], has_start=has_start) for prompt in prompts]
    _install_acts(hooks, model, acts, lambda: (int(tokens.shape[0]), int(tokens.shape[1])))
    unembedding = model.anatomy.parts.unembedding
    hooks.before(unembedding, select)
    if ids is not None:
        hooks.around(unembedding, some_logits(model.hf.get_submodule(unembedding), ids))
    cache = DynamicCache()
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True} if cached else {}
    if not cached and model.anatomy.causal:
        inputs["use_cache"] = False
    with torch.no_grad(), hooks, lock_of(model.hf).aside():
        logits: Tensor = model.hf(input_ids=tokens, **inputs).logits
    layers: list[Any] = list(cache.layers) if cached else []
    keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
    return Base(tuple(prompts), tokens, torch.stack(streams), keys, values, read, ids, logits)


def standing_acts(
    model: LoadedModel, standing: Sequence[SiteEdit], prompt: int, length: int, *, has_start: bool = False
) -> list[Act]:
    """The edits that stand in every row of a sweep, each narrowed to one layer, for one prompt.

    Those of what enters the first layer are left out where the sweep has begun with it: it holds them already.

    Raises:
        SiteError: one lies outside the layers, or beyond the prompt.
        EditError: one names rows.
    """
    frame, n = Frame(((0, length),), length, source_row=prompt), model.anatomy.n_layers
    found: list[Act] = []
    for edit in standing:
        if edit.rows is not None:
            raise error(EditError, f"{edit!r} of `editing` names rows, but a cell of a sweep is one row",
                        do="leave rows= out, or put the edit into the cells that it is for")  # fmt: skip
        frame.columns_of(edit.address.positions)
        found += [replace(_act(edit, site, frame, n), standing=True) for site in model.anatomy.sites(edit.address)]
    return [act for act in found if not (has_start and act.site in STARTS)]


STARTS = (Site("embed"), Site("resid_pre", 0))
"""What enters the first layer."""


def _mixes_positions(edit: SiteEdit) -> bool:
    """Whether what an edit does at one position may depend on others."""
    return isinstance(edit, Apply) or (isinstance(edit, Mean) and edit.mean is None)


def _first_whole(act: Act) -> int:
    """The first column of a standing act that must see all of its columns at once; else one behind all."""
    dims = len(act.named.spec.dims)
    values = [getattr(act.edit, name, None) for name in ("value", "factor", "mean")]
    by_position = any(isinstance(v, Tensor) and v.dim() >= dims - 1 and v.shape[1 - dims] > 1 for v in values)
    if not (by_position or _mixes_positions(act.edit)):
        return act.frame.width
    columns = act.frame.columns_of(act.address.positions)
    return 0 if columns is None else int(columns.min())


def rows_of(
    model: LoadedModel,
    batch: Batch,
    cells: Sequence[Cell],
    prompts: Sequence[int],
    standing: Sequence[SiteEdit] = (),
    *,
    has_start: bool = False,
) -> list[Row]:
    """Rows of a pass from cells: every edit narrowed to one layer, at the site where it first acts.

    Raises:
        SiteError: an address matches nothing, or positions lie beyond a prompt.
        EditError: a cell is empty, holds something other than edits of sites, or its edit names rows.
    """
    n = model.anatomy.n_layers
    frames = [Frame(((0, length),), length, source_row=prompt) for prompt, length in enumerate(batch.lengths)]
    rows: list[Row] = []
    always: dict[int, list[Act]] = {}
    for place, (cell, prompt) in enumerate(zip(cells, prompts, strict=True)):
        edits = edits_of(cell, place)
        acts: list[Act] = []
        for edit in edits:
            if edit.rows is not None:
                raise error(EditError, f"{edit!r} names rows, but a cell is one row", do="give prompts= instead")
            frame = frames[prompt]
            # Columns of cells stay on the host, where they are read one by one: a device would be waited for each time.
            (cut,) = frame.select(edit.address.positions, None, frame.width, HOST)
            acts += [_act(edit, site, cut, n) for site in model.anatomy.sites(edit.address)]
        entry, first = min(_entry(act.site) for act in acts), min(act.frame.first for act in acts)
        if prompt not in always:
            always[prompt] = standing_acts(model, standing, prompt, batch.lengths[prompt], has_start=has_start)
        later = [act for act in always[prompt] if _entry(act.site) >= entry]
        first = min([first, *map(_first_whole, later)])
        rows.append(Row(place, prompt, (*later, *acts), entry, first))
    return rows


def edits_of(cell: object, place: int) -> list[SiteEdit]:
    """The edits of a cell.

    Raises:
        EditError: it holds none, or something other than edits of sites.
    """
    edits = list(cast("Sequence[object]", cell)) if isinstance(cell, Sequence) else [cell]
    if not edits:
        raise error(EditError, f"cell {place} of the sweep holds no edit", do="give at least one")
    found = [edit for edit in edits if isinstance(edit, SiteEdit)]
    if len(found) < len(edits):
        other = next(edit for edit in edits if not isinstance(edit, SiteEdit))
        raise error(
            EditError,
            f"cell {place} of the sweep holds something other than edits of sites",
            got=repr(other),
            allowed="edits of sites, or a single Edge",
            do="give each Edge its own cell, and other edits to run(edits=)",
        )
    return found


def _act(edit: SiteEdit, named: Site, frame: Frame, n_layers: int) -> Act:
    """The edit in one layer; what leaves a layer is edited as what enters the next, which computes nothing twice."""
    if named.layer is None and named.name != "embed":
        raise error(SiteError, f"a sweep acts inside the layers, not at {named}", do="edit the last resid_post instead")
    site = named
    if named.name == "resid_post" and named.layer is not None and named.layer + 1 < n_layers:
        site = Site("resid_pre", named.layer + 1)
    return Act(edit, named, site, edit.address.at(named.layer), frame)


def _entry(site: Site) -> int:
    return 0 if site.layer is None else site.layer


def source_rows(edit: object) -> int | None:
    """How many rows the source of an edit has; None where it has none, or no tensors."""
    source = getattr(edit, "source", None)
    batch = getattr(source, "batch", None)
    if batch is not None:
        return len(batch.lengths)
    held = [len(x) for x in source.values() if isinstance(x, Tensor)] if isinstance(source, Mapping) else []
    return max(held, default=None)
