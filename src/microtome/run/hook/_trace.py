"""What one forward passes between all modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microtome.anatomy import Call, Flow, Seen, tensors
from microtome.run.hook._hooks import HookSet


def trace(model: nn.Module, tokens: Tensor, paths: Iterable[str] | None = None) -> Flow:
    """Run a model once and note what every module, or each of those at some paths, reads and writes."""
    flow = Flow()

    def noting(path: str) -> Callable[[tuple[Any, ...], dict[str, Any], Any], None]:
        def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            own = {name: x for name, x in kwargs.items() if name not in ("position_embeddings", "attention_mask")}
            reads = list(tensors((list(args), [own.pop("hidden_states", None), *own.values()]), 2))
            given = list(output.values()) if isinstance(output, Mapping) else output
            writes = list(tensors(given))
            flow.alive.append((reads, writes))
            flow.calls.append(Call(path, tuple(map(Seen.of, reads)), tuple(map(Seen.of, writes))))

        return after

    hooks = HookSet(model, "interface", 1)
    for path in (path for path, _ in model.named_modules()) if paths is None else paths:
        hooks.after(path, noting(path))
    with torch.no_grad(), hooks:
        model(input_ids=tokens)
    return flow
