"""A run on disk: one safetensors file, its tensors, and all else as JSON in its metadata."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.anatomy import from_plain, parse, to_plain
from microtome.edit import unshared
from microtome.errors import DataError, SiteError, error
from microtome.files import atomic
from microtome.run._batch import Batch
from microtome.run._core import LoadedModel
from microtome.run._result import Run, Words

FORM = 1
CAPTURED = "captured "
"""What the name of a captured tensor begins with, before its address."""


def save_run(run: Run, path: str | os.PathLike[str]) -> None:
    """See `Run.save`."""
    held = run.__getstate__()
    tensors: dict[str, Tensor] = {"tokens": run.tokens}
    tensors |= {f"{CAPTURED}{address}": x for address, x in held["captured"].items()}
    if held["_logits"] is not None:
        tensors["logits"] = held["_logits"]
    rest = {
        "form": FORM,
        "captured": [str(address) for address in run.captured],
        "lengths": run.batch.lengths,
        "pads": run.batch.pads,
        "words": [[token, word] for token, word in held["_to_words"].known.items()],
        "provenance": run.provenance,
        "anatomy": to_plain(run.anatomy),
    }
    with atomic(path, "the run to") as partial:
        save_file(unshared(tensors), partial, metadata={"run": json.dumps(rest)})


def load_run(path: str | os.PathLike[str], model: LoadedModel | None = None) -> Run:
    """See `Run.load`."""
    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            if "run" not in metadata:
                raise ValueError("a file without a run")
            rest: dict[str, Any] = json.loads(metadata["run"])
            if rest["form"] != FORM:
                raise ValueError(f"a run of form {rest['form']}, while this version reads form {FORM}")
            names = set(file.keys())
            tokens = file.get_tensor("tokens")
            captured = {parse(name): file.get_tensor(CAPTURED + name) for name in rest["captured"]}
            logits = file.get_tensor("logits") if "logits" in names else None
        batch = Batch(tokens, tuple(rest["lengths"]), tuple(rest["pads"]))
        words = Words({int(token): str(word) for token, word in rest["words"]})
        anatomy, provenance = from_plain(rest["anatomy"]), dict(rest["provenance"])
    except (OSError, SafetensorError, SiteError, KeyError, ValueError, TypeError) as problem:
        raise error(DataError, f"cannot read a run from {path}", got=str(problem), do="save it again") from problem
    if model is None:
        return Run(anatomy, batch, logits, captured, {}, words, provenance)
    if provenance["fingerprint"] != model.provenance["fingerprint"]:
        raise error(
            DataError,
            f"the run in {path} is of another model",
            got=f"{provenance['model']} ({provenance['fingerprint']})",
            allowed=f"{model.anatomy.name} ({model.provenance['fingerprint']})",
            do="open its model, or load it without model=",
        )
    at = model.device
    batch = Batch(tokens.to(at), batch.lengths, batch.pads)
    held = {address: x.to(at) for address, x in captured.items()}
    return Run(model.anatomy, batch, None if logits is None else logits.to(at), held, {}, model.to_words, provenance)
