"""Edits on disk: one safetensors file, the tensors, and a JSON listing in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.edit._blocks import Repeat, ScaleBlock, Skip
from microtome.edit._edits import Add, Apply, Clamp, Edit, Mean, Project, Rotate, Scale, Set, Zero
from microtome.edit._freeze import Freeze
from microtome.edit._knockout import KnockOut
from microtome.edit._noise import Noise
from microtome.edit._patch import Patch
from microtome.errors import DataError, EditError, error
from microtome.files import atomic

KINDS: dict[str, type[Edit]] = {
    kind.__name__: kind
    for kind in (Set, Add, Scale, Zero, Mean, Project, Rotate, Clamp, Noise, KnockOut, Skip, Repeat, ScaleBlock, Freeze)
}


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a safetensors file takes them: on the CPU, in one piece, and no two in the same memory."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        x = tensor.detach().cpu().contiguous()
        storage = x.untyped_storage().data_ptr()
        found[name] = x.clone() if storage in seen else x
        seen.add(storage)
    return found


def save_edits(path: str | Path, edits: list[Edit]) -> None:
    """Write edits to one safetensors file.

    Raises:
        EditError: an `Apply`, whose function cannot be saved, or a `Patch`, which holds a run: use `Set`.
        OutputError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    listing: list[dict[str, Any]] = []
    for i, edit in enumerate(edits):
        if isinstance(edit, Apply | Patch):
            why = "it holds a function" if isinstance(edit, Apply) else "it holds a run"
            raise error(EditError, f"{edit!r} cannot be saved: {why}", do="use Set with the values instead")
        entry: dict[str, Any] = {"kind": type(edit).__name__}
        for f in fields(edit):
            value = getattr(edit, f.name)
            if isinstance(value, Tensor):
                tensors[f"{i}.{f.name}"] = value
            else:
                entry[f.name] = value
        listing.append(entry)
    with atomic(path, "edits to") as partial:
        save_file(unshared(tensors), partial, metadata={"edits": json.dumps(listing)})


def load_edits(path: str | Path) -> list[Edit]:
    """Read edits that `save_edits` wrote.

    Raises:
        DataError: the file is missing, damaged, or holds no edits.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if "edits" not in metadata:
                raise ValueError("a file without edits")
            listing: list[dict[str, Any]] = json.loads(metadata["edits"])
            edits: list[Edit] = []
            names = list(file.keys())
            for i, entry in enumerate(listing):
                held = {n.split(".", 1)[1]: file.get_tensor(n) for n in names if n.startswith(f"{i}.")}
                kind = KINDS[entry.pop("kind")]
                if isinstance(entry.get("rows"), list):
                    entry["rows"] = tuple(entry["rows"])
                edits.append(kind(**entry, **held))
            return edits
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise error(DataError, f"cannot read edits from {path}", got=str(problem), do="save them again") from problem
