"""What a loaded model must be, so that its inside can be read: whole, in plain numbers, and not compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from microtome.errors import ModelUnsupported, error

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKED = ("qweight", "W_q", "qzeros")
"""Names under which quantised projections of other packages keep their numbers instead of in `weight`."""


def refuse_unreadable(model: Any, name: str) -> None:
    """Refuse a loaded model whose weights or activations cannot be read.

    Raises:
        ModelUnsupported: it is compiled, has no weights in memory, or its weights are quantised.
    """
    _refuse_compiled(model, name)
    offloaded, empty = False, ""
    for path, weight in model.named_parameters():
        if weight.is_meta:
            empty = empty or path
    if empty:
        offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
        offloaded = offloaded or bool(getattr(model, "hf_device_map", None))
    if offloaded:
        raise error(
            ModelUnsupported,
            f"weights of {name} are offloaded, so that they are not there to be read",
            got=f"{empty} is on no device",
            do="load it without device_map, offload_folder and cpu_offload, on one device that holds all of it",
        )
    if empty:
        do = "load it with from_pretrained on a device"
        raise error(ModelUnsupported, f"{name} has no weights", got=f"{empty} is on the device meta", do=do)
    _refuse_quantised(model, name)


def _refuse_compiled(model: Any, name: str) -> None:
    wrapped = [path or "the model" for path, module in model.named_modules() if _compiled(module)]
    if hasattr(model, "_orig_mod") or wrapped:
        whole = hasattr(model, "_orig_mod")
        raise error(
            ModelUnsupported,
            f"{name} is compiled, and what a compiled forward computes inside cannot be watched",
            got="the model" if whole else ", ".join(wrapped[:3]),
            do="open what was given to torch.compile (._orig_mod)" if whole else "load it again, and do not compile it",
        )


def _compiled(module: Any) -> bool:
    own = vars(module).get("forward")
    called = getattr(module, "_compiled_call_impl", None)
    return called is not None or hasattr(own, "_torchdynamo_orig_callable") or "_orig_mod" in vars(module)["_modules"]


def _refuse_quantised(model: Any, name: str) -> None:
    got = ""
    for path, weight in model.named_parameters():
        if weight.dtype not in PLAIN:
            got = f"{path} in {str(weight.dtype).removeprefix('torch.')}"
        elif is_traceable_wrapper_subclass(weight):
            got = f"{path} is a {type(weight).__name__}"
    for path, module in model.named_modules():
        packed = [p for p in PACKED if p in vars(module)["_buffers"] or p in vars(module)["_parameters"]]
        if packed or callable(getattr(module, "weight", None)):
            got = f"{path} is a {type(module).__name__}"
    if got:
        raise error(
            ModelUnsupported,
            f"weights of {name} are quantised, and cannot be read as plain matrices",
            got=got,
            allowed="float32, bfloat16, float16, float64",
            do="load the model without quantization_config or load_in_8bit, or call its dequantize() first",
        )


def refuse_quantised_files(config: Any, short: str, problem: Exception) -> None:
    """Refuse files of quantised weights that could not be loaded: to install what reads them would not help.

    Raises:
        ModelUnsupported: the configuration says that they are quantised.
    """
    said: Any = getattr(config, "quantization_config", None)
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    reason = " ".join(str(problem).split()).rstrip(".")
    raise error(
        ModelUnsupported,
        f"the weights of {short} are quantised ({getattr(method, 'value', method)}), and cannot be read as matrices",
        got=reason if len(reason) < 200 else reason[:197] + "...",
        do="open the model that it was made from, or one that was dequantised and saved again",
    ) from problem
