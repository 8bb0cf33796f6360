"""Weights as they are stored: plain, quantised, offloaded by accelerate, or with adapters on them; and as matrices.

A quantised weight is dequantised by the library that packed it where its tensor offers that, each time it is asked for;
what else is packed is read off what its module makes of unit vectors (see `microtome.anatomy._weights`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKED = ("qweight", "W_q", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv")
"""Names under which quantised projections of some packages keep their numbers, in or beside `weight`."""


def is_plain(weight: object) -> bool:
    """Whether a weight is a plain matrix of floating numbers, here or offloaded."""
    if not isinstance(weight, Tensor) or weight.dtype not in PLAIN or weight.is_quantized:
        return False
    return not is_traceable_wrapper_subclass(weight)


def packed(module: Any) -> str | None:
    """How the weight of a module is stored, where it is no plain matrix; None where it is, or where there is none."""
    held: dict[str, Any] = vars(module)["_parameters"] | vars(module)["_buffers"]
    weight = held.get("weight", getattr(type(module), "weight", None))
    whose = type(module).__module__.partition(".")[0]
    if isinstance(weight, Tensor):
        if is_plain(weight) and not any(name in held for name in PACKED):
            return None
        kind = type(weight) if type(weight) not in (Tensor, nn.Parameter) else type(module)
        return f"{str(weight.dtype).removeprefix('torch.')}, {kind.__name__} of {kind.__module__.partition('.')[0]}"
    if callable(weight):  # what torch.ao made of a projection gives its weight by a function
        return f"{str(module.weight().dtype).removeprefix('torch.')}, {type(module).__name__} of {whose}"
    return f"{type(module).__name__} of {whose}" if any(name in held for name in PACKED) else None


def dequantised(module: Any) -> Tensor | None:
    """[out, in] the weight of a quantised module as its library dequantises it; None where it offers no way."""
    weight: Any = getattr(module, "weight", None)
    weight = weight() if callable(weight) else weight
    if not isinstance(weight, Tensor):
        return None
    with torch.no_grad():
        if weight.is_quantized or is_traceable_wrapper_subclass(weight):
            given: Any = getattr(weight, "dequantize", None)
            return cast("Tensor", given()) if callable(given) else None
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            return None
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):  # not to be unpacked
            return None
        from transformers.integrations import bitsandbytes

        made = bitsandbytes.dequantize_bnb_weight(cast("nn.Parameter", weight), getattr(module, "state", None))
        return made.reshape(sizes(module))


def rounds_together(model: nn.Module) -> bool:
    """Whether layers of LLM.int8 (Dettmers et al. 2022) spare columns with a large element in any row or position."""
    return any(getattr(getattr(module, "state", None), "threshold", 0.0) for module in model.modules())


def sizes(module: Any) -> tuple[int, int]:
    """Output and input size of a projection, or of an embedding that is read as one, however its weight is stored."""
    inner = module
    while isinstance(getattr(inner, "base_layer", None), nn.Module):
        inner = inner.base_layer
    weight = getattr(inner, "weight", None)
    if isinstance(weight, Tensor) and is_plain(weight) and weight.dim() == 2:
        rows, columns = weight.shape
        return (columns, rows) if type(inner).__name__ == "Conv1D" else (rows, columns)
    pairs = (("out_features", "in_features"), ("outfeatures", "infeatures"), ("num_embeddings", "embedding_dim"))
    for out, into in pairs:
        if isinstance(getattr(inner, out, None), int) and isinstance(getattr(inner, into, None), int):
            return getattr(inner, out), getattr(inner, into)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    raise TypeError(f"a {type(inner).__name__} does not say what sizes it has")


def present(module: nn.Module, tensor: Any) -> Any:
    """A parameter or buffer of a module, or of one inside: itself, or where accelerate offloaded it, as it is loaded.

    Raises:
        RuntimeError: it is on no device, and nothing says where it is.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_meta:
        return tensor
    if not any(hasattr(part, "_hf_hook") for part in module.modules()):  # nothing of it is offloaded
        return tensor
    from accelerate.utils import align_module_device

    for part in module.modules():
        for held in ("_parameters", "_buffers"):
            name = next((name for name, own in vars(part)[held].items() if own is tensor), None)
            if name is not None:
                with align_module_device(part):
                    found = vars(part)[held][name]
                if not found.is_meta:
                    return found
    raise RuntimeError("a weight is on no device")


def runs_on(model: Any) -> torch.device:
    """The device on which a model takes tokens: that of its weights, or where they are offloaded, of its forwards."""
    first = next(iter((*model.parameters(), *model.buffers())))
    if first.is_meta:
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return first.device


def offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model lie elsewhere until a forward needs them."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return hooked and any(weight.is_meta for weight in model.parameters())


def stored(model: nn.Module) -> str:
    """How the weights of a model are stored that are no plain matrices here; empty if all are."""
    found = Counter(how for module in model.modules() if (how := packed(module)) is not None)
    parts = [f"{n} quantised ({how})" for how, n in found.items()]
    parts += ["offloaded"] if offloaded(model) else []
    return "; ".join(parts)


def adapters(model: nn.Module) -> Iterator[str]:
    """Which adapters a model has, as peft builds them: on, off or merged."""
    found: dict[str, None] = {}
    for module in model.modules():
        names: Any = getattr(module, "active_adapters", None) if "base_layer" in vars(module)["_modules"] else None
        if isinstance(names, list) and names:
            off = bool(getattr(module, "disable_adapters", False))
            how = "off" if off else "merged" if getattr(module, "merged", False) else "on"
            found.setdefault(f"adapter {', '.join(map(str, names))} {how}")
    yield from found


def state(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """The entries of the state of a model, in its order, with the module that holds each.

    `state_dict` itself is not asked: that of a 4-bit layer of bitsandbytes on a CPU packs its weights anew, otherwise.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        parts = vars(module)
        held = {name: t for name, t in parts["_buffers"].items() if name not in parts["_non_persistent_buffers_set"]}
        packed_by_ao: Any = getattr(module, "_weight_bias", None)
        if callable(packed_by_ao) and "_packed_params" in parts:
            held["_packed_params"] = packed_by_ao()
        for name, entry in (parts["_parameters"] | held).items():
            yield (f"{path}.{name}" if path else name), module, entry


def leaves(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a weight, or an entry of a state, is stored in."""
    if isinstance(value, tuple | list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        for name in names:
            yield from leaves(getattr(value, name))
        yield torch.frombuffer(bytearray(repr(context).encode()), dtype=torch.uint8)  # how it is used
    elif isinstance(value, Tensor) and value.is_quantized:
        yield value.int_repr()
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield from (value.q_per_channel_scales(), value.q_per_channel_zero_points())
        else:
            yield torch.tensor((value.q_scale(), value.q_zero_point()), dtype=torch.float64)
    elif isinstance(value, Tensor):
        yield value
        scales = (getattr(getattr(value, "quant_state", None), "absmax", None), getattr(value, "SCB", None))
        yield from (scale for scale in scales if isinstance(scale, Tensor))  # of bitsandbytes, beside its integers
