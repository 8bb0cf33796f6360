"""Open a model: load it, map it, prove the map."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from microtome.anatomy import Anatomy, anatomy_of, load, refuse_unreadable
from microtome.context import current
from microtome.errors import MicrotomeError, ModelError, ModelUnsupported, error
from microtome.model._map import traced_anatomy
from microtome.model._model import Model
from microtome.model._proof import require_proven, require_stream


def open(
    name_or_path: Any = None,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    prove: bool = True,
    strict: bool = False,
) -> Model:
    """Open a language model and prove the map of its inside, site by site.

    A site whose identity fails on the probe is left out, with the reason (``model.anatomy.missing``), which whoever
    asks for it is told; a weight likewise (``model.anatomy.unproven``). `microtome check` shows the whole proof.

    Args:
        name_or_path: a hub id, a folder, a GGUF file, an already loaded `PreTrainedModel`, quantised, offloaded or with
            adapters of peft as it may be (which is left as it is,
            runs in evaluation mode whatever its own, and takes none of `dtype`, `device`,
            `revision` and `trust_remote_code`), or nothing for the
            default model (SmolLM2-135M-Instruct).
        tokenizer: for an already loaded model, which takes token ids without one; else instead of the model's own.
        dtype: of the weights of a model that is loaded here; float32 by default, so that identities are tight.
        device: where to put a model that is loaded here; that of the settings, or the accelerator if there is one.
        revision: of a hub model.
        trust_remote_code: whether code that comes with the model may run.
        prove: whether to check the map; without it, to look at why a proof fails: `model.prove()` gives all checks.
        strict: whether to refuse a model of which any identity fails.

    Returns:
        A `Model`, on whose map all identities hold (see ``model.proof``) of what is not missing.

    Raises:
        ModelError: it is not found, damaged, or not a language model; or it is already loaded and is asked to be
            another.
        ProofError: its residual stream is not proven, or, under `strict`, any other site or weight.
    """
    model = _load(name_or_path, tokenizer, dtype, device, revision, trust_remote_code)
    if prove or strict:
        checks = model.prove()
        require_stream(model, checks)
        if strict:
            require_proven(model, checks)
    return model


def _load(
    name_or_path: Any,
    tokenizer: Any,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Model:
    """A model that is loaded, unless it is already, and mapped."""
    if name_or_path is None or isinstance(name_or_path, str | Path):
        wanted = current().device if device is None else device
        target = _accelerator() if wanted is None else _usable(wanted)
        hf, tokenizer, name = load(
            name_or_path, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, tokenizer=tokenizer
        )
        hf = hf if target is None else hf.to(target)
        return Model(hf, tokenizer, _anatomy(hf, name))
    if not hasattr(name_or_path, "get_output_embeddings") or not hasattr(name_or_path, "config"):
        inside = isinstance(getattr(name_or_path, "module", None), torch.nn.Module)  # DataParallel and its like
        raise error(
            ModelUnsupported,
            "cannot open this object as a model",
            got=type(name_or_path).__name__,
            allowed="a name, a folder, a GGUF file, or a transformers PreTrainedModel",
            do="open its .module" if inside else "load it with transformers first",
        )
    asked = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code or None}
    ignored = [name for name, value in asked.items() if value is not None]
    if ignored:
        raise error(
            ModelError,
            "a model that is already loaded is left as it is",
            got=", ".join(f"{name}={asked[name]}" for name in ignored),
            do="leave these out and load or move it so with transformers, or give its name instead",
        )
    hf = _inner(name_or_path)
    name = Path(getattr(hf.config, "name_or_path", "") or type(hf).__name__).name
    return Model(hf, tokenizer, _anatomy(hf, name))


def _inner(given: Any) -> Any:
    """What a wrapper of torch.compile or of peft holds, which shares its weights.

    Raises:
        ModelUnsupported: peft puts tokens of its own before the prompt, which the model inside would be without.
    """
    if "_orig_mod" in vars(given).get("_modules", {}):
        what = "the model is compiled, and compiled code cannot be watched: opened what was given to torch.compile"
        warnings.warn(f"{what} (._orig_mod), which shares its weights", stacklevel=4)
        return _inner(given._orig_mod)
    if not callable(getattr(type(given), "get_base_model", None)):
        return given
    if getattr(given.active_peft_config, "is_prompt_learning", False):
        raise error(
            ModelUnsupported,
            "cannot open a model with a learned prompt",
            got=f"{getattr(given.active_peft_config.peft_type, 'value', 'peft')}, which adds positions of its own",
            allowed="adapters inside the model, such as LoRA",
            do="open the model that it adapts",
        )
    return given.get_base_model()


def _anatomy(hf: Any, name: str) -> Anatomy:
    """The map of a loaded model.

    Raises:
        ModelUnsupported: it has parts of no known form; or it is compiled in place, or without weights.
    """
    refuse_unreadable(hf, name)
    try:
        return anatomy_of(hf, name)
    except Exception:  # noqa: BLE001 (whatever parts of an unknown family make of being looked at)
        pass
    try:
        return traced_anatomy(hf, name)
    except MicrotomeError:
        raise
    except Exception as problem:  # the same
        raise error(
            ModelUnsupported,
            f"the parts of {name} ({type(hf).__name__}) have no known form, so it cannot be mapped",
            got=f"{type(problem).__name__}: {' '.join(str(problem).split())}",
            do="open a model of a family that is known",
        ) from problem


def _usable(device: str | torch.device) -> torch.device:
    """A device that a tensor can be made on.

    Raises:
        ModelError: the device does not exist.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        here = dict.fromkeys(str(d) for d in (_accelerator(), torch.get_default_device()) if d is not None)
        raise error(
            ModelError,
            "cannot put a model on this device",
            got=str(device),
            allowed=", ".join(here),
            do="name one of these",
        ) from problem


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
