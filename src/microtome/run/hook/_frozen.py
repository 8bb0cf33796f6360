"""Frozen passes: non-linear parts held constant for gradients, while values stay what they are.

norms               y = gain * centre(x) / sg[scale(x)] + bias, and those with a gate; see `_frozen_norms`
attention pattern   z = sg[A] v
gate, whole         y = sg[act(g)] * u
gate, ratio         y = g sg[act(g) / g] * u
half products       y/2 + sg[y/2]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from microtome.anatomy import Anatomy, Site
from microtome.edit import Freeze
from microtome.errors import EditError, error
from microtome.run.hook._frozen_norms import frozen_norms, tie
from microtome.run.hook._hooks import HookSet
from microtome.run.hook._points import Shape, install
from microtome.run.hook._tensors import input_of, with_input


def freeze(hooks: HookSet, model: Any, anatomy: Anatomy, edit: Freeze, shape: Shape) -> None:
    """Install a frozen pass."""
    if edit.norms:
        for path, after in frozen_norms(model, anatomy):
            hooks.after(path, after)
    for i, layer in enumerate(anatomy.parts.layers):
        if edit.patterns and layer.attn is None and layer.mixer is not None:
            raise error(
                EditError,
                f"layer {i} mixes positions without attention, so that it has no pattern that could be frozen",
                do="use Freeze(patterns=False)",
            )
        if edit.patterns and layer.attn is not None:
            hooks.attention(layer.attn).frozen = True
        if edit.activations:
            if layer.act is None and layer.mlp is None:
                continue
            if layer.act is None:
                raise error(
                    EditError,
                    f"layer {i} has no activation module of its own, so it cannot be frozen",
                    do="use Freeze(activations=False)",
                )
            whole = edit.activations != "ratio" and bool(layer.gate or layer.gate_up)
            hooks.after(layer.act, _frozen_gate if whole else _frozen_ratio)
        if edit.half_products and (layer.gate or layer.gate_up):
            hooks.before(_product_of(i, layer.down), _halved)
        if edit.mlps:
            site = Site("mlp_out", i)
            install(hooks, model, site, anatomy.hook_points[site], lambda x: x.detach(), shape, edits=True)


def _product_of(i: int, down: str | None) -> str:
    """The module that reads the product of gate and up branch."""
    if down is None:
        raise error(
            EditError,
            f"the products of layer {i} are inside its experts, so they cannot be halved",
            do="use Freeze(half_products=False)",
        )
    return down


def _halved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = input_of(args, kwargs)
    return with_input(args, kwargs, tie(x, x / 2))


def _frozen_gate(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    return output.detach()


def _frozen_ratio(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = input_of(args, kwargs)
    ratio = (output / x.where(x != 0, x.new_ones(()))).detach()
    return tie(output, x * ratio)
