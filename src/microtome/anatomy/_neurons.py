"""The parts of an MLP by what passed between its modules in one forward, where their names do not say which is which.

`down` wrote what the MLP writes, or what a gate on that multiplies; what it read is the neurons; and the projections
as wide as these, or twice as wide, are `up` and `gate`. What is found here is a guess: the proof checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from microtome.anatomy._discover import LayerParts
from microtome.anatomy._flow import Call, Flow, multiples
from microtome.anatomy._stored import sizes

FUNCTIONS = (
    "linear", "sigmoid", "silu", "relu", "relu2", "gelu", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "tanh",
)  # fmt: skip
"""Activations that are tried, by the names that `transformers` gives them."""


def activation_of(y: Tensor, x: Tensor, times: Tensor | None = None) -> str | None:
    """The name of the activation f of `FUNCTIONS` with y = f(x), or f(x) * times; None where there is none."""
    if x.shape != y.shape or (times is not None and times.shape != y.shape):
        return None
    made = ((name, ACT2FN[name](x)) for name in FUNCTIONS)
    return next((n for n, f in made if multiples(y, f if times is None else f * times) == [1.0]), None)


def with_neurons(model: nn.Module, layer: LayerParts, flow: Flow) -> LayerParts:
    """A layer with the parts of its MLP, where its names gave none."""
    whole, inside = flow.first(layer.mlp), [] if layer.mlp is None else flow.inside(layer.mlp)
    if layer.down is not None or layer.experts is not None or whole is None or whole.wrote is None:
        return layer
    linear = [call for call in inside if _projects(model, call)]
    for down in reversed(linear):
        if down.wrote is not None and down.wrote.key == whole.wrote.key:
            return replace(layer, down=down.path, **_read_by(inside, linear, down, None))
        for gate in linear:
            by = activation_of(whole.wrote.value, _wrote(gate), _wrote(down)) if gate is not down else None
            if by is not None:
                found = _read_by(inside, linear, down, gate)
                return replace(layer, down=down.path, write_gate=(gate.path, by), **found)
    return layer


def _wrote(call: Call) -> Tensor:
    assert call.wrote is not None
    return call.wrote.value


def _projects(model: nn.Module, call: Call) -> bool:
    """Whether a call is one of a matrix on the last axis of what it read."""
    if call.read is None or call.wrote is None:
        return False
    try:
        shape = sizes(model.get_submodule(call.path))
    except TypeError:
        return False
    return shape == (call.wrote.value.shape[-1], call.read.value.shape[-1])


def _read_by(inside: Sequence[Call], linear: Sequence[Call], down: Call, by: Call | None) -> dict[str, Any]:
    """Of which projections, through which activation, the product is what `down` reads."""
    assert down.read is not None
    post = down.read.value
    rest = [call for call in linear if call is not down and call is not by]
    wide = [call for call in rest if _wrote(call).shape == post.shape]
    acts = [c for c in inside if c not in linear and c.read is not None and c.read.value.shape == post.shape]
    act = next((c for c in acts if not wide or any(c.read.key == w.wrote.key for w in wide)), None)  # pyright: ignore[reportOptionalMemberAccess]
    found: dict[str, Any] = {"act": None if act is None else act.path}
    if not wide:
        both = [call for call in rest if _wrote(call).shape[-1] == 2 * post.shape[-1]]
        return found | {"gate_up": both[0].path} if len(both) == 1 else {}
    if len(wide) == 1:
        return found | {"up": wide[0].path}
    for gate, up in (wide[:2], wide[1::-1]):
        if activation_of(post, _wrote(gate), _wrote(up)) is not None:
            return found | {"gate": gate.path, "up": up.path}
    return {}
