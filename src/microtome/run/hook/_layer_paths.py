"""Layer paths: blocks skipped, repeated or scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from microtome.anatomy import Anatomy, parse_indices
from microtome.edit import Repeat, ScaleBlock, Skip
from microtome.errors import EditError, SiteError, error
from microtome.run.hook._hooks import HookSet
from microtome.run.hook._points import input_of, output_of, with_input, with_output


def layer_paths(hooks: HookSet, anatomy: Anatomy, edit: Skip | Repeat | ScaleBlock) -> None:
    """Install a `Skip`, `Repeat` or `ScaleBlock` around the blocks it names."""
    layers = parse_indices(edit.layers, "layers").resolve(anatomy.n_layers)
    if layers is None:
        raise error(
            SiteError,
            f"no layers {edit.layers} for {edit!r} in {anatomy.name}",
            allowed=f"layers 0 to {anatomy.n_layers - 1}",
            do="choose layers of the model",
        )
    if isinstance(edit, Repeat) and edit.times < 1:
        raise error(EditError, f"{edit!r} cannot run a block {edit.times} times", allowed="1 or more", do="use Skip")
    for layer in layers:
        block = anatomy.parts.layers[layer].block
        if isinstance(edit, Skip):
            hooks.around(block, _skip(anatomy.instead))
        elif isinstance(edit, Repeat):
            hooks.around(block, _repeat(edit.times))
        else:
            hooks.after(block, _scale(edit.factor))


def _skip(instead: Callable[[Tensor], Any]) -> Any:
    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return instead(input_of(args, kwargs))

    return around


def _repeat(times: int) -> Any:
    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        for _ in range(times - 1):
            args, kwargs = with_input(args, kwargs, output_of(output))
            output = forward(*args, **kwargs)
        return output

    return around


def _scale(factor: float) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before, now = input_of(args, kwargs), output_of(output)
        return with_output(output, before + factor * (now - before))

    return after
