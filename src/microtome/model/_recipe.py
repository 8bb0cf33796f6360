"""How other processes open the model of this one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from microtome.anatomy import DEFAULT_NAME
from microtome.errors import ModelError, error
from microtome.model._model import Model
from microtome.model._open import open


@dataclass(frozen=True)
class Recipe:
    """How a model that was opened by name is opened again, by a worker on another machine.

    Attributes:
        name: a hub id or a folder, which every machine can reach; None for the default model.
        revision: of a hub model.
        dtype: of its weights.
        fingerprint: what it must have.
        threads: that it may use.
        trust: whether code that comes with the model may run.
    """

    name: str | None
    revision: str | None
    dtype: torch.dtype
    fingerprint: str
    threads: int
    trust: bool

    @classmethod
    def of(cls, model: Model, threads: int) -> Recipe:
        """How to open a model again that was opened by name.

        Raises:
            ModelError: it was made in memory.
        """
        config = model.hf.config
        name = str(getattr(config, "name_or_path", "") or "")
        if model.anatomy.name == DEFAULT_NAME:
            return cls(None, None, model.dtype, model.fingerprint, threads, False)
        if not name:
            do = "save it to a folder that every machine reaches, and open that"
            raise error(
                ModelError, "workers cannot open a model that was made in memory", got=model.anatomy.name, do=do
            )
        name = str(Path(name).resolve()) if Path(name).exists() else name
        trust = bool(getattr(config, "auto_map", None)) and not type(model.hf).__module__.startswith("transformers.")
        return cls(name, getattr(config, "_commit_hash", None), model.dtype, model.fingerprint, threads, trust)

    def open(self) -> Model:
        """The model.

        Raises:
            ModelError: it is not there, or is another one here.
        """
        torch.set_num_threads(self.threads)
        model = open(self.name, dtype=self.dtype, revision=self.revision, trust_remote_code=self.trust, prove=False)
        if model.fingerprint != self.fingerprint:
            what, do = f"a worker opened another model as {self.name}", "give every machine the same files"
            raise error(ModelError, what, got=model.fingerprint, allowed=self.fingerprint, do=do)
        return model
