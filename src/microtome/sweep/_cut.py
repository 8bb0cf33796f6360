"""Whether a forward can be cut at a position and go on from the keys and values before it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from microtome.anatomy import at_least_float32
from microtome.run import LoadedModel
from microtome.sweep._pass import BatchedPass, Row, base_of

CLOSE = 1e-3
"""How far the logits of a forward that was cut may lie from whole ones, relative to the largest: beyond rounding."""
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def cuts(model: LoadedModel) -> bool:
    """Whether what a model makes of later tokens follows from these, and the keys and values of earlier ones, alone.

    Of a causal model of nothing but attention it is tried, once, on eight tokens: others keep states of another kind.
    """
    a = model.anatomy
    if not a.causal or any(layer.attn is None or layer.mixer is not None for layer in a.parts.layers):
        return False
    if model.hf not in _KNOWN:
        _KNOWN[model.hf] = _tried(model)
    return _KNOWN[model.hf]


def _tried(model: LoadedModel) -> bool:
    """Run the second half of eight tokens on the first half's keys and values, and compare."""
    n_vocab, length = model.anatomy.d_vocab, min(8, model.anatomy.n_ctx)
    tokens = (torch.arange(length) * 7919 % n_vocab).unsqueeze(0).to(model.device)
    read = torch.arange(length, device=model.device).unsqueeze(0)
    try:
        base = base_of(model, model.to_batch(tokens), [0], read, None, [], True, None)
        whole = base.logits
        cut = BatchedPass(model, base, [Row(0, 0, (), 0, length // 2)], length // 2).run()
    except Exception:  # noqa: BLE001 (whatever a cache of another kind makes of it)
        return False
    half = slice(length // 2, None)
    gap = at_least_float32(cut[:, half] - whole[:, half]).abs().max()
    return bool(gap <= CLOSE * at_least_float32(whole).abs().max())
