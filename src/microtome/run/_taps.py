"""Taps become hooks: for each way a site can lie in a model, how its tensor is read and how an edit is written back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome.model import NormWeights, Site, Tap
from microtome.run._hooks import Rig

Visit = Callable[[Tensor], Tensor | None]
Shape = Callable[[], tuple[int, int]]
"""Batch and width of the forward that is under way: some modules see them flattened into one axis."""


def install(rig: Rig, model: Any, site: Site, tap: Tap, visit: Visit, shape: Shape, edits: bool) -> None:
    """Show the tensor of a site to `visit` in every forward of a rig, and put in place what it returns."""
    if tap.side == "attention":
        watch = rig.attention(tap.module)
        watch.add(site.name.removeprefix("attn."), visit if tap.heads is None else _shared(visit, tap.heads), edits)
    elif tap.side in ("input", "inplace"):
        rig.before(tap.module, _before(tap, visit, shape))
    elif tap.side == "output":
        rig.after(tap.module, _after(tap, visit, shape))
    elif tap.side == "norm":
        assert tap.norm is not None
        rig.after(tap.module, _norm(NormWeights(model.get_submodule(tap.module), tap.norm), visit, shape))
    elif tap.side == "result":
        rig.after(tap.module, _result(model.get_submodule(tap.module), tap, visit))
    elif tap.side == "router":
        rig.after(tap.module, _router(visit, shape))
    elif tap.side == "experts":
        rig.after(tap.module, _experts(model.get_submodule(tap.module), visit, shape))
    else:
        rig.after(tap.module, _logits(visit))


def read(tap: Tap, raw: Tensor, shape: tuple[int, int]) -> Tensor:
    """The value of a site in the tensor that a module holds: [batch, pos, ...]."""
    x = raw.unflatten(0, shape) if raw.dim() == 2 else raw
    if tap.split is not None:
        x = tap.split.view(x).flatten(-3)
    if tap.heads is not None:
        x = x.unflatten(-1, (tap.heads, -1))
    return x * tap.scale if tap.scale != 1.0 else x


def write(tap: Tap, raw: Tensor, value: Tensor) -> Tensor:
    """A tensor like `raw`, in which the site has a new value."""
    if tap.scale != 1.0:
        value = value / tap.scale
    if tap.heads is not None:
        value = value.flatten(-2)
    if tap.split is None:
        return value.reshape(raw.shape)
    new = raw.clone()
    view = tap.split.view(new)
    view.copy_(value.reshape(view.shape))
    return new


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a module."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return kwargs["hidden_states"]


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with other hidden states."""
    if args and isinstance(args[0], Tensor):
        return (new, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": new}


def output_of(output: Any) -> Tensor:
    """The hidden states in the output of a module: it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_output(output: Any, new: Tensor) -> Any:
    """The output, with other hidden states."""
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _before(tap: Tap, visit: Visit, shape: Shape) -> Any:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raw = input_of(args, kwargs)
        new = visit(read(tap, raw, shape()))
        if new is None:
            return None
        if tap.side == "inplace":
            # The block keeps this very tensor for its residual sum: writing into it changes both readers.
            raw.copy_(new.reshape(raw.shape))
            return None
        return with_input(args, kwargs, write(tap, raw, new))

    return before


def _after(tap: Tap, visit: Visit, shape: Shape) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        raw = output_of(output)
        value = read(tap, raw, shape())
        new = visit(value.clone() if tap.clone else value)
        if new is None:
            return None
        return with_output(output, write(tap, raw, new.clone() if tap.clone else new))

    return after


def made_of(output: Tensor, part: str, compute: Callable[[], Tensor]) -> Tensor:
    """What an output was made of: what an earlier edit left on it, or else what is computed."""
    known = getattr(output, part, None)
    return compute() if known is None else known


def remembering(output: Tensor, part: str, value: Tensor) -> Tensor:
    """An output that remembers what it was made of, so that whoever looks at that next sees it changed, once."""
    setattr(output, part, value)
    return output


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


def _result(o: Any, tap: Tap, visit: Visit) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        def compute() -> Tensor:
            z = input_of(args, kwargs).unflatten(-1, (tap.heads or 1, -1))
            weight = o.weight if type(o).__name__ == "Conv1D" else o.weight.T
            return torch.einsum("bphd,hdm->bphm", z, weight.unflatten(0, (tap.heads or 1, -1)))

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


def _router(visit: Visit, shape: Shape) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        logits, weights, chosen = output
        dense = torch.zeros(*logits.shape, dtype=weights.dtype, device=weights.device).scatter(-1, chosen, weights)
        new = visit(dense.unflatten(0, shape()))
        if new is None:
            return None
        new = new.flatten(0, 1)
        unused = torch.ones_like(new, dtype=torch.bool).scatter(-1, chosen, value=False)
        if bool((new.detach()[unused] != 0).any()):
            # Experts are used that the router did not choose: each token gets all that have a weight.
            most = int((new.detach() != 0).sum(-1).max())
            chosen = new.detach().abs().topk(max(most, chosen.shape[-1]), dim=-1).indices
        return logits, new.gather(-1, chosen), chosen

    return after


def _experts(experts: Any, visit: Visit, shape: Shape) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        def compute() -> Tensor:
            hidden, chosen, weights = args
            each = range(chosen.shape[1])
            return torch.stack([experts.forward(hidden, chosen[:, [i]], weights[:, [i]]) for i in each], dim=1)

        own = made_of(output, "slots", compute)
        new = visit(own.unflatten(0, shape()))
        if new is None:
            return None
        new = new.flatten(0, 1)
        return remembering(output + (new - own).sum(1), "slots", new)

    return after


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
