"""What a loaded model must be, so that its inside can be read: with weights, and not compiled."""

from __future__ import annotations

from typing import Any

from microtome.anatomy._stored import offloaded
from microtome.errors import ModelUnsupported, error


def refuse_unreadable(model: Any, name: str) -> None:
    """Refuse a loaded model whose weights or activations cannot be read.

    Raises:
        ModelUnsupported: it is compiled in place, or its weights are nowhere.
    """
    _refuse_compiled(model, name)
    empty = next((path for path, weight in model.named_parameters() if weight.is_meta), None)
    if empty is not None and not offloaded(model):
        do = "load it with from_pretrained on a device"
        raise error(ModelUnsupported, f"{name} has no weights", got=f"{empty} is on the device meta", do=do)


def _refuse_compiled(model: Any, name: str) -> None:
    wrapped = [path or "the model" for path, module in model.named_modules() if _compiled(module)]
    if wrapped:
        raise error(
            ModelUnsupported,
            f"{name} is compiled, and what a compiled forward computes inside cannot be watched",
            got=", ".join(wrapped[:3]),
            do="load it again, and do not compile it",
        )


def _compiled(module: Any) -> bool:
    own = vars(module).get("forward")
    called = getattr(module, "_compiled_call_impl", None)
    return called is not None or hasattr(own, "_torchdynamo_orig_callable") or "_orig_mod" in vars(module)["_modules"]


def refuse_quantised_files(config: Any, short: str, problem: Exception) -> None:
    """Refuse files of quantised weights that could not be loaded: says which package is missing.

    Raises:
        ModelUnsupported: the configuration says that they are quantised.
    """
    declared: Any = getattr(config, "quantization_config", None)
    if declared is None:
        return
    method = declared.get("quant_method") if isinstance(declared, dict) else getattr(declared, "quant_method", None)
    reason = " ".join(str(problem).split()).rstrip(".")
    named = getattr(method, "value", method)
    if isinstance(problem, ImportError):
        what = f"the weights of {short} are quantised ({named}), and a package that reads them is not installed"
        raise error(ModelUnsupported, what, got=reason[:200], do="install it, or open the model it was made from")
    raise error(
        ModelUnsupported,
        f"the weights of {short} are quantised ({named}), and cannot be loaded here",
        got=reason if len(reason) < 200 else reason[:197] + "...",
        do="open the model that it was made from, or one that was dequantised and saved again",
    ) from problem
