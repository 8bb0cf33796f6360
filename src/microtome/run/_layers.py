"""Layer paths and frozen passes: blocks skipped, repeated or scaled, and non-linear parts held constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from microtome.errors import EditError, SiteError, error
from microtome.model import Anatomy, NormWeights, Site, norm_of, parse_selection
from microtome.run._block_edits import Freeze, Repeat, ScaleBlock, Skip
from microtome.run._hooks import Rig
from microtome.run._taps import Shape, divided, divisor, input_of, install, output_of, with_input, with_output


def layer_paths(rig: Rig, anatomy: Anatomy, edit: Skip | Repeat | ScaleBlock) -> None:
    """Install a `Skip`, `Repeat` or `ScaleBlock` around the blocks it names."""
    layers = parse_selection(edit.layers, "layers").resolve(anatomy.n_layers)
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
            rig.around(block, _skip(layer, anatomy.attention == "inline"))
        elif isinstance(edit, Repeat):
            rig.around(block, _repeat(edit.times))
        else:
            rig.after(block, _scale(edit.factor))


def _cached(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("past_key_values") is not None or kwargs.get("layer_past") is not None


def _skip(layer: int, tuples: bool) -> Any:
    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layer == 0 and _cached(kwargs):
            raise error(
                EditError,
                "layer 0 cannot be skipped while a key/value cache counts positions by it",
                do="pass use_cache=False",
            )
        hidden = input_of(args, kwargs)
        # Blocks whose attention is their own still return a tuple; those that use the interface return the tensor.
        return (hidden, None) if tuples else hidden

    return around


def _repeat(times: int) -> Any:
    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _cached(kwargs):
            raise error(
                EditError, "a block cannot be repeated while its keys and values are cached", do="pass use_cache=False"
            )
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


def _tie(value: Tensor, linear: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return value.detach() + (linear - linear.detach())


def freeze(rig: Rig, model: Any, anatomy: Anatomy, edit: Freeze, shape: Shape) -> None:
    """Install a frozen pass."""
    if edit.norms:
        for path in _norm_paths(anatomy):
            norm = norm_of(model.get_submodule(path), path, anatomy.d_model)
            if norm is None:
                raise error(
                    EditError,
                    f"the norm {path} has no known form, so it cannot be frozen",
                    do="use Freeze(norms=False)",
                )
            rig.after(path, _frozen_norm(NormWeights(model.get_submodule(path), norm)))
    for i, layer in enumerate(anatomy.parts.layers):
        if edit.patterns:
            rig.attention(layer.attn).frozen = True
        if edit.activations:
            if layer.act is None:
                raise error(
                    EditError,
                    f"layer {i} has no activation module of its own, so it cannot be frozen",
                    do="use Freeze(activations=False)",
                )
            rig.after(layer.act, _frozen_gate if layer.gate or layer.gate_up else _frozen_ratio)
        if edit.mlps:
            site = Site("mlp_out", i)
            install(rig, model, site, anatomy.taps[site], lambda x: x.detach(), shape, edits=True)


def _norm_paths(anatomy: Anatomy) -> list[str]:
    parts = anatomy.parts
    paths = [n.path for layer in parts.layers for n in (layer.attn_norm, layer.mlp_norm) if n is not None]
    paths += [p for layer in parts.layers for p in (layer.attn_post_norm, layer.mlp_post_norm) if p is not None]
    return list(dict.fromkeys([*paths, parts.final_norm.path] if parts.final_norm else paths))


def _frozen_norm(norm: NormWeights) -> Any:
    def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = input_of(args, kwargs)
        held = divisor(output, norm, x).detach()
        return divided(_tie(output, norm.apply(x, held)), held)

    return after


def _frozen_gate(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    return output.detach()


def _frozen_ratio(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = input_of(args, kwargs)
    ratio = (output / x.where(x != 0, x.new_ones(()))).detach()
    return _tie(output, x * ratio)
