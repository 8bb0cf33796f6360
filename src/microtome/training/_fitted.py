"""What a training gave, and its state on disk: one safetensors file, all but the tensors as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.edit import unshared
from microtome.errors import DataError, error
from microtome.files import atomic
from microtome.shown import shown

FORM = 1


@shown
@dataclass(frozen=True, eq=False)
class Fitted:
    """What a training gave.

    Attributes:
        values: the trained tensors by name; those that were given, trained in place.
        metrics: over `step`, the loss, the learning rate, and what else the loss function reported.
        step: how many steps were taken.
        attrs: how it was trained: optimizer, learning rate, schedule, seed, steps asked for, model, edits.
    """

    values: Mapping[str, Tensor]
    metrics: xr.Dataset
    step: int
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def _facts(self) -> dict[str, str]:
        losses: list[float] = self.metrics["loss"].values.tolist() if "loss" in self.metrics else []
        fell = f"{losses[0]:.4g} -> {losses[-1]:.4g}" if losses else ""
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in self.values.items())
        return {"values": shapes, "step": str(self.step), "loss": fell, "optimizer": str(self.attrs.get("optimizer"))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tensors, metrics and attributes to one safetensors file.

        Raises:
            OutputError: the file cannot be written.
        """
        write(path, {f"value.{name}": x for name, x in self.values.items()}, self._rest())

    def _rest(self) -> dict[str, Any]:
        rows = {str(name): self.metrics[name].values.tolist() for name in self.metrics.data_vars}
        return {"step": self.step, "attrs": dict(self.attrs), "metrics": rows}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fitted:
        """Read what `save` wrote, or the state of a training at its last checkpoint.

        Raises:
            DataError: the file is missing or damaged, or holds no training.
        """
        tensors, rest = read(path)
        values = {name.removeprefix("value."): x for name, x in tensors.items() if name.startswith("value.")}
        return cls(values, table(rest["metrics"]), rest["step"], rest["attrs"])


def table(rows: Mapping[str, list[float]]) -> xr.Dataset:
    """Metrics by name as a dataset over steps."""
    length = max((len(x) for x in rows.values()), default=0)
    values = {name: ("step", np.asarray(x, dtype=np.float64)) for name, x in rows.items()}
    return xr.Dataset(values, coords={"step": np.arange(length)})


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Write a training whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic(path, "a training to") as partial:
        save_file(unshared(tensors), partial, metadata={"training": json.dumps({"form": FORM, **rest})})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a training, and the rest.

    Raises:
        DataError: the file is missing or damaged, or holds no training.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            if "training" not in metadata:
                raise ValueError("a file without a training")
            rest: dict[str, Any] = json.loads(metadata["training"])
            if rest["form"] != FORM:
                raise ValueError(f"a training of form {rest['form']}, while this version reads form {FORM}")
            # In memory of their own: where a file's tensors begin, some libraries sum them in another order.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, rest  # noqa: SIM118 (no mapping)
    except OSError as problem:
        raise error(
            DataError, f"cannot read a training from {path}", got=str(problem), do="check the path"
        ) from problem
    except (SafetensorError, KeyError, ValueError, TypeError) as problem:
        do = "delete the file, or name another"
        raise error(DataError, f"cannot read a training from {path}", got=str(problem), do=do) from problem


def flattened(part: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """A nested state as JSON takes it: each tensor is moved to `tensors`, under the name that stands in its place."""
    if isinstance(part, Tensor):
        tensors[place] = part
        return {"tensor": place}
    if isinstance(part, Mapping):
        pairs = part.items()
        return {"pairs": [[k, flattened(v, tensors, f"{place}.{i}")] for i, (k, v) in enumerate(pairs)]}
    if isinstance(part, list | tuple):
        return {"items": [flattened(x, tensors, f"{place}.{i}") for i, x in enumerate(part)]}
    return part


def restored(part: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `flattened` took apart, with lists for tuples."""
    if isinstance(part, dict):
        if "tensor" in part:
            return tensors[part["tensor"]]
        if "pairs" in part:
            return {k: restored(v, tensors) for k, v in part["pairs"]}
        return [restored(x, tensors) for x in part["items"]]
    return part
