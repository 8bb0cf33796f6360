"""Hook points become hooks: for each kind of hook point, how its tensor is read and how an edit is written back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import HookPoint, NormWeights, Site, parameter_of, weight_of
from microtome.run.hook import _experts
from microtome.run.hook._hooks import HookSet
from microtome.run.hook._tensors import input_of, made_of, output_of, remembering, with_input, with_output

Visit = Callable[[Tensor], Tensor | None]
Shape = Callable[[], tuple[int, int]]
"""Rows and columns of the current forward: some modules see them flattened into one axis."""


def install(hooks: HookSet, model: Any, site: Site, point: HookPoint, visit: Visit, shape: Shape, edits: bool) -> None:
    """Show the tensor of a site to `visit` in every forward of a hook set, and replace it by what it returns."""
    if point.side == "attention":
        watch = hooks.attention(point.module)
        watch.add(site.name.removeprefix("attn."), visit if point.heads is None else _shared(visit, point.heads), edits)
    elif point.side in ("input", "inplace"):
        hooks.before(point.module, _before(point, visit, shape), point.call)
    elif point.beside is not None:
        for path, after in _together(point, visit, shape).items():
            hooks.after(path, after)
    elif point.side == "output":
        plus = None if point.plus is None else parameter_of(model, point.plus)
        hooks.after(point.module, _after(point, visit, shape, plus), point.call)
    elif point.side == "norm":
        assert point.norm is not None
        norm = NormWeights(model.get_submodule(point.module), point.norm)
        hooks.after(point.module, _norm(norm, visit, shape), point.call)
    elif point.side == "result":
        hooks.after(point.module, _result(model.get_submodule(point.module), point, visit))
    elif point.side == "router":
        hooks.before(point.module, _experts.router(point, model.get_submodule(point.module), visit, shape))
    elif point.side in ("experts", "neurons"):
        kind = _experts.slots if point.side == "experts" else _experts.neurons
        hooks.after(point.module, kind(point, model.get_submodule(point.module), visit, shape))
    else:
        hooks.after(point.module, _logits(visit))


def read(point: HookPoint, raw: Tensor, shape: tuple[int, int]) -> Tensor:
    """The value of a site in the tensor that a module holds: [batch, pos, ...]."""
    x = raw.unflatten(0, shape) if raw.dim() == 2 else raw
    if point.lanes is not None:
        x = x.movedim(point.lanes, -2).flatten(-2)
    if point.split is not None:
        x = point.split.view(x).flatten(-3)
    if point.heads is not None:
        x = x.unflatten(-1, (point.heads, -1))
    return x * point.scale if point.scale != 1.0 else x


def write(point: HookPoint, raw: Tensor, value: Tensor) -> Tensor:
    """A tensor like `raw`, in which the site has a new value."""
    if point.scale != 1.0:
        value = value / point.scale
    if point.heads is not None:
        value = value.flatten(-2)
    if point.lanes is not None:
        value = value.unflatten(-1, (raw.shape[point.lanes], -1)).movedim(-2, point.lanes)
    if point.split is None:
        return value.reshape(raw.shape)
    new = raw.clone()
    view = point.split.view(new)
    view.copy_(value.reshape(view.shape))
    return new


def _before(point: HookPoint, visit: Visit, shape: Shape) -> Any:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raw = input_of(args, kwargs)
        new = visit(read(point, raw, shape()))
        if new is None:
            return None
        if point.side == "inplace":
            # The block keeps this very tensor for its residual sum: writing into it changes both readers.
            raw.copy_(write(point, raw, new))
            return None
        return with_input(args, kwargs, write(point, raw, new))

    return before


def _after(point: HookPoint, visit: Visit, shape: Shape, plus: Tensor | None) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        raw = output_of(output)
        value = read(point, raw, shape())
        value = value if plus is None else value + plus
        new = visit(value.clone() if point.clone else value)
        if new is None:
            return None
        new = new if plus is None else new - plus
        return with_output(output, write(point, raw, new.clone() if point.clone else new))

    return after


def _together(point: HookPoint, visit: Visit, shape: Shape) -> dict[str, Any]:
    """Show the sum of what two modules give when both have given it; an edit of the sum changes the later one's."""
    given: dict[str, Tensor] = {}

    def one(path: str) -> Any:
        def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given[path] = raw = output_of(output)
            if len(given) < 2:
                return None
            other = next(x for name, x in given.items() if name != path)
            given.clear()
            new = visit(read(point, other.reshape(raw.shape) + raw, shape()))
            return None if new is None else with_output(output, write(point, raw, new) - other.reshape(raw.shape))

        return after

    return {path: one(path) for path in (point.module, point.beside or "")}


def divisor(output: Tensor, norm: NormWeights, x: Tensor) -> Tensor:
    """What a norm's output was divided by: what an earlier edit put there, or the scale of its input x."""
    return made_of(output, "divisor", lambda: norm.scale(x))


def divided(output: Tensor, by: Tensor) -> Tensor:
    """A norm's output that remembers what divided it."""
    return remembering(output, "divisor", by)


def _norm(norm: NormWeights, visit: Visit, shape: Shape) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        own = divisor(output, norm, input_of(args, kwargs))
        new = visit(own.unflatten(0, shape()) if own.dim() == 1 else own)
        if new is None:
            return None
        new = new.reshape(own.shape)
        factor = (own / new).unsqueeze(-1).to(output.dtype)
        bias = 0.0 if norm.bias is None else norm.bias
        return divided((output - bias) * factor + bias, new)

    return after


def _result(o: Any, point: HookPoint, visit: Visit) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        def compute() -> Tensor:
            z = input_of(args, kwargs).unflatten(-1, (point.heads or 1, -1))
            return torch.einsum("bphd,hdm->bphm", z, weight_of(o).T.unflatten(0, (point.heads or 1, -1)))

        whole = output_of(output)
        own = made_of(whole, "results", compute)
        new = visit(own)
        return None if new is None else with_output(output, remembering(whole + (new - own).sum(2), "results", new))

    return after


def _shared(visit: Visit, heads: int) -> Visit:
    """Keys or values once each, also in models that repeat them for every query head before they are seen."""

    def shared(x: Tensor) -> Tensor | None:
        times = x.shape[2] // heads
        if times == 1:
            return visit(x)
        new = visit(x[:, :, ::times])
        return None if new is None else new.repeat_interleave(times, dim=2)

    return shared


def _logits(visit: Visit) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        logits = output[0] if isinstance(output, tuple) else output.logits
        new = visit(logits)
        if new is None:
            return None
        if isinstance(output, tuple):
            return (new, *output[1:])
        changed = type(output)(**output)
        changed["logits"] = new
        return changed

    return after
