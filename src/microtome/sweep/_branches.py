"""Branches that run on inputs of their own: in one forward, every layer's heads and MLP read what they are given.

The model's forward carries one row of tokens, for its masks and positions. At each layer its block runs again on as
many rows as are asked for, up to the place where its heads or its MLP have given what they give:

    heads   q, k and v of each head are the projections of an input of their own, and z is what attention makes of them
    MLP     reads what it is given

Where query heads share keys and values, attention runs once for each head of a group, so that each has keys and values
of its own. A head's projection of its input is a product with its own weights where that is right, which is tried
first; elsewhere, as where one norm spans the queries of all heads, all heads read each input and one is kept.

Cost:   a head its own projections; attention once for each head of a group; the MLP once.
Check:  equal to plain hooks on the same model with keys and values for every head; tests/laws/test_circuit_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microtome.anatomy import Site
from microtome.axes import Tokens
from microtome.edit import Frame, Selection, SiteEdit, apply, canonical
from microtome.errors import MicrotomeError
from microtome.run import LoadedModel
from microtome.run.hook import HookSet, input_of, install, lock_of, output_of, with_input, with_output
from microtome.sweep._pass import columns_of, some_logits, widened

INPUTS = ("q", "k", "v")
CLOSE = 1e-4
"""How far z by a head's own weights may lie from z by the model's projections, relative to its size."""

_OWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Seen(Exception):
    """Raised inside a block when it has given what was asked of it."""


class Layer:
    """The block of one layer, in a forward under way."""

    def __init__(self, branches: Branches, index: int, block: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.index, self.hidden = index, input_of(args, kwargs)
        self._branches, self._block, self._args, self._kwargs = branches, block, args, kwargs

    def _call(self, rows: int) -> None:
        """Run the block on rows until what is wanted of it was seen."""
        self._branches.rows = rows
        args, kwargs = with_input(self._args, self._kwargs, self.hidden.expand(rows, -1, -1).contiguous())
        with suppress(_Seen):
            args, kwargs = widened(args, kwargs, rows)
            self._block(*args, **kwargs)

    def mlp(self, read: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """What the MLP adds to the stream where it reads this, behind its norm."""
        b = self._branches
        b.phase, b.given = "mlp", {"mlp.in": read}
        self._call(len(read))
        b.phase = ""
        return b.taken.pop("mlp_out")

    def heads(
        self, read: Float[Tensor, "row three head pos d_model"], heads: Sequence[int], *, own: bool
    ) -> Float[Tensor, "row head pos d_head"]:
        """z of some heads where the q, k and v of each read these, behind the norm.

        With `own`, by the projection of each head alone; else by those of all.
        """
        b, weights = self._branches, self._branches.model.layers[self.index]
        n, groups = b.model.anatomy.n_heads, b.model.anatomy.parts.layers[self.index].n_kv_heads
        times, index = n // groups, torch.tensor(list(heads), device=read.device)
        made = _projected(weights, read, index, times) if own else self._projected(read, index, times)
        turns = sorted({h % times for h in heads})
        rows, length = len(read), read.shape[3]
        given: dict[str, Tensor] = {}
        for name, x in zip(INPUTS, made, strict=True):  # [row, head, pos, d_head]
            if name == "q":
                whole = x.new_zeros(rows, n, length, x.shape[-1])
                whole[:, index] = x
                given[name] = whole.unsqueeze(1).expand(-1, len(turns), -1, -1, -1).flatten(0, 1).transpose(1, 2)
                continue
            whole = x.new_zeros(rows, len(turns), groups, length, x.shape[-1])
            turn = torch.tensor([turns.index(h % times) for h in heads], device=x.device)
            whole[:, turn, index // times] = x
            given[name] = whole.flatten(0, 1).transpose(1, 2)
        b.phase, b.given = "projections" if own else "attention", given
        self._call(rows * len(turns))
        b.phase = ""
        z = b.taken.pop("z").unflatten(0, (rows, len(turns)))  # [row, turn, pos, head, d_head]
        turn = torch.tensor([turns.index(h % times) for h in heads], device=z.device)
        return z[:, turn, :, index].movedim(0, 1)

    def _projected(self, read: Tensor, index: Int[Tensor, " head"], times: int) -> list[Tensor]:
        """q, k and v [row, head, pos, d_head] as used, by projections of all heads from each input."""
        b, found = self._branches, list[Tensor]()
        for place, name in enumerate(INPUTS):
            given = read[:, place].flatten(0, 1)
            b.phase, b.given = "read", {"attn.in": given}
            self._call(len(given))
            b.phase = ""
            whole = b.taken.pop(name).unflatten(0, (read.shape[0], len(index)))  # [row, head, pos, heads, d_head]
            own = index if name == "q" else index // times
            found.append(torch.stack([whole[:, i, :, int(h)] for i, h in enumerate(own)], dim=1))
        return found


def _projected(weights: Any, read: Tensor, index: Int[Tensor, " head"], times: int) -> list[Tensor]:
    """q, k and v [row, head, pos, d_head] before positions are turned in, by each head's own weights."""
    found: list[Tensor] = []
    for place, name in enumerate(INPUTS):
        own = index if name == "q" else index // times
        weight, bias = getattr(weights, f"W_{name.upper()}")[own], getattr(weights, f"b_{name.upper()}")
        rows, _, length, _ = read[:, place].shape
        x = torch.bmm(read[:, place].transpose(0, 1).flatten(1, 2), weight.to(read.dtype))
        x = x if bias is None else x + bias[own].unsqueeze(1).to(x.dtype)
        found.append(x.unflatten(1, (rows, length)).transpose(0, 1))
    return found


class Branches:
    """Runs the branches of the layers of a model on inputs that a function gives layer by layer."""

    def __init__(self, model: LoadedModel, standing: Sequence[SiteEdit] = ()) -> None:
        """Edits that are standing hold inside of every branch."""
        self.model, self._standing = model, list(standing)
        self.phase, self.rows, self._width = "", 1, 1
        self.given: dict[str, Tensor] = {}
        self.taken: dict[str, Tensor] = {}
        self._like: dict[int, Any] = {}
        self._aside: Tensor | None = None

    def run(
        self,
        tokens: Tokens,
        layers: Sequence[bool],
        work: Callable[[Layer], None],
        end: Callable[[], Float[Tensor, "row pos d_model"]],
        read: Int[Tensor, "row read"],
        ids: Int[Tensor, " id"] | None = None,
        *,
        grad: bool = False,
    ) -> Float[Tensor, "row read vocab"]:
        """Logits of the streams that `end` gives behind the last layer.

        Args:
            tokens: [1, pos] of the length that all rows have.
            layers: whether `work` is called in each layer.
            work: asks a layer for what its heads and its MLP give.
            end: called behind the last layer.
            read: [row, read] columns whose logits are computed.
            ids: the tokens of the vocabulary that are, all by default.
            grad: whether they keep their graph.
        """
        model = self.model
        self._width = int(tokens.shape[1])
        hooks = HookSet(model.hf, model.anatomy.attention, model.anatomy.n_heads)
        for i, layer in enumerate(model.anatomy.parts.layers):
            hooks.around(layer.block, self._around(i, layers[i], work, end))
            if layers[i]:
                self._install(hooks, i)
        unembedding = model.anatomy.parts.unembedding
        if (norm := model.read_norm) is not None:
            hooks.after(norm.path, self._set_aside, norm.call)

        def at_end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            rows = input_of(args, kwargs) if self._aside is None else self._aside
            return with_input(args, kwargs, columns_of(rows, read))

        hooks.before(unembedding, at_end)
        if ids is not None:
            hooks.around(unembedding, some_logits(model.hf.get_submodule(unembedding), ids))
        options: dict[str, Any] = {"use_cache": False} if model.anatomy.causal else {}
        with torch.set_grad_enabled(grad), hooks, lock_of(model.hf).aside():
            try:
                return model.hf(input_ids=tokens, **options).logits
            finally:
                self._aside, self.phase = None, ""

    def _set_aside(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        self._aside = output
        return output[:1]

    def _around(self, i: int, active: bool, work: Callable[[Layer], None], end: Callable[[], Tensor]) -> Any:
        last = self.model.anatomy.n_layers - 1

        def around(block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if active:
                work(Layer(self, i, block, args, kwargs))
            # What the row that is carried holds is never read: it is there for masks and positions.
            return self.model.anatomy.instead(end() if i == last else input_of(args, kwargs))

        return around

    def _install(self, hooks: HookSet, i: int) -> None:
        """Let the block of a layer read what is given, and keep what is wanted of it."""
        model, layer = self.model, self.model.anatomy.parts.layers[i]

        def at(name: str, visit: Callable[[Tensor], Tensor | None]) -> None:
            site = Site(name, i)
            install(hooks, model.hf, site, model.anatomy.hook_points[site], visit, self._shape, edits=True)

        if layer.attn is not None:
            hooks.around(layer.attn, self._attention(i))
        # What is given stands before the edits of `editing`, and what is taken behind them.
        at("attn.in", self._reads("attn.in", "read"))
        at("mlp.in", self._reads("mlp.in", "mlp"))
        for edit in self._standing:
            for site in model.anatomy.sites(edit.address):
                if site.layer == i and site.name.startswith(("attn.", "mlp")):
                    at(site.name, self._edits(site, edit))
        for name in INPUTS:
            at(f"attn.{name}", self._asks(name))
        self._project(hooks, i)
        at("attn.z", self._z)
        at("mlp_out", self._keeps("mlp_out", "mlp"))

    def _shape(self) -> tuple[int, int]:
        return self.rows, self._width

    def _attention(self, i: int) -> Any:
        """Attention is left out where the MLP alone is wanted."""

        def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.phase != "mlp":
                return forward(*args, **kwargs)
            hidden = input_of(args, kwargs)
            if i not in self._like:
                self._like[i] = forward(*args, **kwargs)
            like = self._like[i]
            return with_output(like, torch.zeros_like(output_of(like)[:1]).expand(len(hidden), -1, -1))

        return around

    def _edits(self, site: Site, edit: SiteEdit) -> Callable[[Tensor], Tensor | None]:
        """One edit of `editing`, in all rows alike."""

        def visit(x: Tensor) -> Tensor:
            frame = Frame(((0, self._width),) * self.rows, self._width)
            size = canonical(x, site).shape
            chosen = None if edit.address.units.is_all else edit.address.units.resolve(size[2])
            units = None if chosen is None else torch.tensor(chosen, device=x.device)
            for cut in frame.select(edit.address.positions, None, size[1], x.device):
                x = apply(edit, x, Selection(site, units, cut))
            return x

        return visit

    def _reads(self, name: str, phase: str) -> Callable[[Tensor], Tensor | None]:
        return lambda x: self.given[name].contiguous() if self.phase == phase else None

    def _keeps(self, name: str, phase: str) -> Callable[[Tensor], Tensor | None]:
        def visit(x: Tensor) -> None:
            if self.phase == phase:
                self.taken[name] = x
                raise _Seen

        return visit

    def _asks(self, name: str) -> Callable[[Tensor], Tensor | None]:
        def visit(x: Tensor) -> Tensor | None:
            if self.phase == "read":
                self.taken[name] = x
            return self.given[name] if self.phase == "attention" else None

        return visit

    def _z(self, x: Tensor) -> None:
        if self.phase in ("attention", "projections"):
            self.taken["z"] = x
        if self.phase in ("attention", "projections", "read"):
            raise _Seen

    def _project(self, hooks: HookSet, i: int) -> None:
        """Let the projections of a layer give what each head made by its own weights."""
        try:
            splits = {name: self.model.layers[i].projection(name) for name in INPUTS}
        except MicrotomeError:
            return
        by_path: dict[str, list[str]] = {}
        for name, (path, _) in splits.items():
            by_path.setdefault(path, []).append(name)

        def instead(names: list[str]) -> Any:
            def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if self.phase != "projections":
                    return forward(*args, **kwargs)
                first = self.given[names[0]]
                size = sum(self.given[name][0, 0].numel() for name in names)
                whole = first.new_zeros(*first.shape[:2], size)
                for name in names:
                    view = splits[name][1].view(whole)
                    view.copy_(self.given[name].reshape(view.shape))
                return whole

            return around

        for path, names in by_path.items():
            hooks.around(path, instead(names))


def reads_own_weights(model: LoadedModel, tokens: Tokens) -> bool:
    """Whether a head's projections by its own weights give the z that the model's give; tried once a model."""
    known = _OWN.get(model.hf)
    if known is None:
        known = _OWN[model.hf] = _tried(model, tokens)
    return known


def _tried(model: LoadedModel, tokens: Tokens) -> bool:
    a = model.anatomy
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, a.n_heads, int(tokens.shape[1]), a.d_model)
    read = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    close: list[bool] = []

    def work(layer: Layer) -> None:
        z = [layer.heads(read, range(a.n_heads), own=own).float() for own in (True, False)]
        close.append(bool((z[0] - z[1]).abs().max() <= CLOSE * z[1].abs().max()))

    try:
        for i in {0, a.n_layers - 1}:
            model.layers[i].projection("q")
        last = torch.full((1, 1), int(tokens.shape[1]) - 1, device=model.device)
        stream = torch.zeros(1, int(tokens.shape[1]), a.d_model, device=model.device, dtype=model.dtype)
        active = [i in (0, a.n_layers - 1) for i in range(a.n_layers)]
        Branches(model).run(tokens[:1], active, work, lambda: stream, last)
    except (MicrotomeError, RuntimeError):
        return False
    return all(close) and bool(close)
