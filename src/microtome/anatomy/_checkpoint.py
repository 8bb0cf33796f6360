"""What a folder of weights must not be: pickled, an adapter, or other weights than those of its configuration."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from pathlib import Path
from typing import Any

from microtome.errors import ModelBroken, ModelNotFound, ModelUnsupported, error

ADAPTER = "adapter_config.json"
# Tensors of files that take no part in predicting a token: buffers of older versions, and heads beside the language
# model's own (BERT's pooler and next-sentence head).
SPARE = (
    r"(^|\.)rotary(_emb)?\.((original_)?inv_freq|cos_cached|sin_cached)$", r"(^|\.)embed_positions(\.weights)?$",
    r"(^|\.)attn(\.attention)?\.(masked_bias|bias)$", r"(^|\.)attention\.(masked_bias|bias)$",
    r"(^|\.)attn\.causal_mask$", r"(^|\.)decoder\.version$", r"(^|\.)position_ids$",
    r"(^|\.)pooler\.", r"^cls\.seq_relationship\.",
)  # fmt: skip


def refuse_pickled(folder: Path, auto: str) -> None:
    """Refuse a folder whose weights are pickles, which may run code when they are read.

    Args:
        folder: of the model.
        auto: the class of `transformers` that reads it.

    Raises:
        ModelUnsupported: it holds no safetensors.
    """
    kinds = {"model": "pytorch_model*.bin"} | (
        {"adapter": "adapter_model*.bin"} if (folder / ADAPTER).is_file() else {}
    )
    for begins, pattern in kinds.items():
        found = sorted(p.name for p in folder.glob(pattern))
        if found and not any(folder.glob(f"{begins}*.safetensors")):
            raise pickled(str(folder), ", ".join(found[:2]), auto)


def pickled(source: str, got: str, auto: str) -> ModelUnsupported:
    """The error for weights in pickles; says how to make safetensors of them."""
    new = f"{source.rstrip('/')}-safetensors"
    code = f"from transformers import {auto} as M; M.from_pretrained({source!r}).save_pretrained({new!r})"
    return error(
        ModelUnsupported,
        f"the weights of {source} are pickles, which may run code when they are read",
        got=got,
        allowed="safetensors, GGUF",
        do=f'if you trust them, run `python -c "{code}"`, copy the tokenizer\'s files there, and open that folder',
    )


def refuse_adapter(folder: Path) -> None:
    """Refuse an adapter that would be left out: its base alone would open, or nothing.

    Raises:
        ModelNotFound: the folder holds an adapter without its base.
        ModelUnsupported: it lies beside its base, and peft is missing.
    """
    if not (folder / ADAPTER).is_file():
        return
    merge = "merge it into its base (merge_and_unload of peft), save that, and open its folder"
    if not (folder / "config.json").is_file():
        if base_of_adapter(folder) is not None and importlib.util.find_spec("peft") is not None:
            return
        what = f"the folder {folder} holds an adapter without the model that it adapts"
        raise error(ModelNotFound, what, got=ADAPTER, do=merge)
    if importlib.util.find_spec("peft") is None:
        what = f"the folder {folder} holds an adapter beside its base, which would be left out without peft"
        raise error(ModelUnsupported, what, got=ADAPTER, do=f"install peft, or {merge}")


def base_of_adapter(folder: Path) -> str | None:
    """The model that an adapter alone in a folder says it adapts: a folder, also relative to its own, or a hub id."""
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return None
    try:
        named: Any = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(named, str) or not named:
        return None
    beside = folder / named
    return str(beside) if not Path(named).is_dir() and (beside / "config.json").is_file() else named


def adapted(model: Any, folder: Path) -> Any:
    """A model with the adapter of a folder inside.

    Raises:
        ModelUnsupported: it learns a prompt.
        ModelBroken: the adapter is another model's: it has other modules or other shapes.
    """
    import peft  # pyright: ignore[reportMissingImports]

    given: Any = peft
    do = "name the model that it was trained on in its adapter_config.json"
    try:
        if given.PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
            what = f"the adapter {folder.name} learns a prompt, which adds positions of its own"
            raise error(ModelUnsupported, what, allowed="adapters inside the model, such as LoRA", do="open its base")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = given.PeftModel.from_pretrained(model, str(folder)).get_base_model()
    except (RuntimeError, ValueError, KeyError) as problem:
        lines = [line.strip() for line in str(problem).split("\n") if line.strip()]
        got = next((line for line in lines if "mismatch" in line), lines[0] if lines else type(problem).__name__)
        what = f"the adapter {folder.name} does not fit the model that it names"
        raise error(ModelBroken, what, got=got.rstrip("."), do=do) from problem
    lost = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if lost:
        got = " ".join(lost[0].split())[:150]
        raise error(ModelBroken, f"the adapter {folder.name} does not fit the model that it names", got=got, do=do)
    return made


def refuse_unlike(loading: dict[str, Any], short: str) -> None:
    """Refuse a model that is not what its files hold: random in part, or without a part of them.

    Args:
        loading: what `transformers` says of how it filled the model.
        short: the model's name.

    Raises:
        ModelBroken: the files lack weights, hold them in another shape, or hold some that the model has not.
    """
    do = "copy or download the model again"
    if loading["mismatched_keys"]:
        name, held, asked = sorted(loading["mismatched_keys"])[0]
        what = f"the weights of {short} are not those of its config.json"
        raise error(ModelBroken, what, got=f"{name} {list(held)}", allowed=f"{list(asked)}", do=do)
    if loading["missing_keys"]:
        what = f"the files of {short} lack weights"
        raise error(ModelBroken, what, got=_listed(loading["missing_keys"], "missing"), do=do)
    left = {name for name in loading["unexpected_keys"] if not any(re.search(spare, name) for spare in SPARE)}
    if left:
        raise error(
            ModelBroken,
            f"the files of {short} hold weights that have no place in the model of its config.json",
            got=_listed(left, "left over"),
            do="mend config.json, or load the model with transformers and open what it gives",
        )


def _listed(names: Any, kind: str) -> str:
    names = sorted(names)
    return f"{len(names)} {kind}: " + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
