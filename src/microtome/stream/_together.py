"""Many accumulators in one file, with one checksum.

Check: tests/laws/test_accumulators.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from microtome.errors import DataError, error
from microtome.files import atomic
from microtome.stream._accumulator import KINDS, Accumulator, digest

FORMAT = "microtome-accumulators-1"


def save_accumulators(held: Mapping[str, Accumulator], path: str | os.PathLike[str]) -> Path:
    """Write accumulators by name into one safetensors file: to a temporary name in the same folder, then renamed.

    Args:
        held: the accumulators.
        path: the file to write; an existing file is replaced, and stays whole if the writing fails.

    Returns:
        The path written.

    Raises:
        OutputError: when the file cannot be written.
    """
    path, kinds = Path(path), [(name, one.kind) for name, one in held.items()]
    state = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, one in enumerate(held.values())
        for name, tensor in one.state().items()
    }
    described = json.dumps(kinds)
    metadata = {"format": FORMAT, "kinds": described, "sha256": digest(described, state)}
    with atomic(path) as partial:
        partial.write_bytes(save(state, metadata))
    return path


def load_accumulators(path: str | os.PathLike[str]) -> dict[str, Accumulator]:
    """Read what `save_accumulators` wrote.

    Args:
        path: the file.

    Returns:
        The accumulators by name, in their order.

    Raises:
        DataError: when the file is missing, damaged, or holds something else.
    """
    try:
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            metadata: dict[str, str] = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        kinds: list[tuple[str, str]] = [(name, kind) for name, kind in json.loads(metadata["kinds"])]
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as cause:
        raise error(DataError, f'"{path}" is damaged ({cause})', do="delete it and compute it again") from cause
    if metadata.get("format") != FORMAT or metadata.get("sha256") != digest(metadata["kinds"], state):
        raise error(DataError, f'"{path}" is damaged: its checksum differs', do="delete it and compute it again")
    parts: list[dict[str, Tensor]] = [{} for _ in kinds]
    for name, tensor in state.items():
        number, _, part = name.partition(".")
        parts[int(number)][part] = tensor
    return {name: KINDS[kind].from_state(part) for (name, kind), part in zip(kinds, parts, strict=True)}
