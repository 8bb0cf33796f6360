"""The end of the stream, learned from one forward: through which norm the head reads it, and what follows.

What reads what the last block wrote is found by where it lies in memory, and what the unembedding reads is tried on
the values: the norm's output times a number, or else what a transform of the head's own made of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from microtome.anatomy._discover import LayerParts, Norm, Parts, norm_of
from microtome.anatomy._flow import Call, Flow, Seen, multiples, same, writer

EXACT = 1e-5
"""How well logits must be a multiple of the unembedding's output: a wide soft cap is nearly one."""
UNKNOWN = "there is no norm of a known form"
NO_NORM = "no norm stands between the stream and the head"
MIXED = "there is no norm behind what mixes the lanes of the stream to what is read"
ELSEWHERE = "the norm before the unembedding reads something else than what the last block writes"


@dataclass(frozen=True)
class End:
    """What follows the last block.

    Attributes:
        norm: the norm through which the head reads the stream.
        own_transform: whether the head makes something else of what that norm gives before the unembedding.
        why: why there is no norm, where there is none.
        scale: by what the unembedding's output is multiplied; None where that is not known.
        cap: by what logits are softly capped.
    """

    norm: Norm | None
    own_transform: bool = False
    why: str = UNKNOWN
    scale: float | None = None
    cap: float | None = None


def end_of(model: Any, parts: Parts, flow: Flow) -> End:
    """What one forward shows of the end of the stream."""
    last, head, whole = flow.first(parts.layers[-1].block), flow.first(parts.unembedding), flow.first("")
    scale, cap = _of_logits(model, head, whole)
    end = End(None, scale=scale, cap=cap)
    if head is None or head.read is None or last is None or last.wrote is None:
        return end
    before = writer(flow.calls, head.read)
    if before is not None and before.read is not None and _has_lanes(parts.layers[-1], last.wrote, flow):
        norm = norm_at(model, before.path, int(before.read.value.shape[-1]))  # which reads the lanes, mixed to one
        return replace(end, norm=norm, why=UNKNOWN if called_norm(model, before) else MIXED)
    after = [c for c in flow.calls[flow.calls.index(last) + 1 :] if c.read is not None and same(c.read, last.wrote)]
    readers = [c for c in after if next(model.get_submodule(c.path).children(), None) is None]
    for call in readers:
        norm = norm_at(model, call.path, int(last.wrote.value.shape[-1]))
        if norm is None or call.wrote is None:
            continue
        by = multiples(head.read.value, call.wrote.value)
        if by is not None or len(readers) == 1:
            found = replace(norm, times=1.0 if by is None else by[0], call=flow.which(call))
            return replace(end, norm=found, own_transform=by is None)
    if readers and all(_doubles(model, call) for call in readers):
        return replace(end, why=NO_NORM)
    other = before is not None and norm_at(model, before.path, int(head.read.value.shape[-1])) is not None
    return replace(end, why=ELSEWHERE) if other else end


def norm_at(model: nn.Module, path: str, width: int) -> Norm | None:
    """A module as a norm; None where it is none."""
    module = model.get_submodule(path)
    return norm_of(module, path, width) if next(module.children(), None) is None else None


def _has_lanes(layer: LayerParts, stream: Seen, flow: Flow) -> bool:
    """Whether every branch of a block reads less than the stream is wide."""
    calls = (flow.first(path) for path in (layer.attn, layer.mixer, layer.mlp) if path is not None)
    sizes = [call.read.value.numel() for call in calls if call is not None and call.read is not None]
    return bool(sizes) and max(sizes) < stream.value.numel()


def called_norm(model: nn.Module, call: Call) -> bool:
    """Whether a module is a norm by its name, of whatever form."""
    return "norm" in type(model.get_submodule(call.path)).__name__.lower()


def _doubles(model: nn.Module, call: Call) -> bool:
    """Whether twice what a module read would make it write twice as much, but for its bias: then it is no norm."""
    assert call.read is not None
    module, x = model.get_submodule(call.path), call.read.value
    with torch.no_grad():
        zero, one, two = (module(x * factor) for factor in (0.0, 1.0, 2.0))
    by = multiples(two - zero, one - zero)
    return by is not None and abs(by[0] - 2.0) < EXACT


def _of_logits(model: Any, head: Call | None, whole: Call | None) -> tuple[float | None, float | None]:
    """By what the output of the unembedding is multiplied, or softly capped; None where it is neither."""
    if head is None or head.wrote is None or whole is None or whole.wrote is None:
        return None, None
    raw, logits = head.wrote.value, whole.wrote.value
    if torch.equal(logits, raw):
        return 1.0, None
    entries = model.config.get_text_config().to_dict().items()
    caps = (float(x) for name, x in entries if "cap" in name and isinstance(x, float | int) and x > 0)
    cap = next((c for c in caps if multiples(logits, (raw / c).tanh() * c, fits=EXACT) == [1.0]), None)
    by = multiples(logits, raw, fits=EXACT) if cap is None else None
    return None if by is None else by[0], cap
