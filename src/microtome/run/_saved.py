"""A run on disk: one safetensors file, its tensors, and all else as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.anatomy import Address, Anatomy, from_plain, parse, to_plain
from microtome.edit import unshared
from microtome.errors import DataError, PromptError, SiteError, error
from microtome.files import atomic
from microtome.run._batch import Batch

FORM = 1


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What a file holds of a run: all but its gradients.

    Captured tensors have their addresses as names, and their axes stand in the metadata, for readers without Microtome.
    `words` are the texts of its tokens, by id; `axes` those of each captured tensor, by address.
    """

    anatomy: Anatomy
    batch: Batch
    logits: Tensor | None
    captured: Mapping[Address, Tensor]
    words: Mapping[int, str]
    provenance: Mapping[str, Any]
    axes: Mapping[str, list[str]]

    def write(self, path: str | os.PathLike[str]) -> None:
        """See `Run.save`."""
        tensors = {str(address): x for address, x in self.captured.items()} | {"tokens": self.batch.tokens}
        tensors |= {} if self.logits is None else {"logits": self.logits}
        rest = {
            "form": FORM,
            "captured": [str(address) for address in self.captured],
            "lengths": self.batch.lengths,
            "pads": self.batch.pads,
            "words": list(self.words.items()),
            "provenance": dict(self.provenance),
            "anatomy": to_plain(self.anatomy),
            "logits": self.logits is not None,
        }
        facts = {name: json.dumps(value) for name, value in {**self.provenance, "axes": self.axes}.items()}
        with atomic(path, "the run to") as partial:
            save_file(unshared(tensors), partial, metadata=facts | {"run": json.dumps(rest)})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SavedRun:
        """See `Run.load`."""
        try:
            with safe_open(os.fspath(path), "pt") as file:
                metadata = file.metadata() or {}
                if "run" not in metadata:
                    raise ValueError("a file without a run")
                rest: dict[str, Any] = json.loads(metadata["run"])
                if rest["form"] != FORM:
                    raise ValueError(f"a run of form {rest['form']}, while this version reads form {FORM}")
                batch = Batch(file.get_tensor("tokens"), tuple(rest["lengths"]), tuple(rest["pads"]))
                captured = {parse(name): file.get_tensor(name) for name in rest["captured"]}
                axes: dict[str, list[str]] = json.loads(metadata["axes"])
                logits = file.get_tensor("logits") if rest["logits"] else None
            words = {int(token): str(word) for token, word in rest["words"]}
            return cls(from_plain(rest["anatomy"]), batch, logits, captured, words, dict(rest["provenance"]), axes)
        except OSError as problem:
            raise error(DataError, f"cannot read a run from {path}", got=str(problem), do="check the path") from problem
        except (SafetensorError, SiteError, PromptError, KeyError, ValueError, TypeError) as problem:
            raise error(DataError, f"cannot read a run from {path}", got=str(problem), do="save it again") from problem
