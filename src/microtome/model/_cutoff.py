"""MLPs whose gate is cut off before its activation, so that most of their neurons are silent."""

from __future__ import annotations

from microtome.anatomy import at_least_float32
from microtome.model._identities import Prover
from microtome.model._sized import Sized, ratio
from microtome.run.hook import trace


def prove_cutoff(prover: Prover, i: int) -> None:
    """The gate and the neurons of a layer, where the activation reads max(gate - c, 0) with one c a position.

    Tried where the neurons are not those of the gate itself. The number c is taken from the largest gate of a position,
    and every other is held to it. How c comes from the gate, as its mean and some standard deviations in Gemma 3n, is
    not asked; `mlp.gate` is what W_gate gives, before the cut. Checked by tests/laws/test_lanes.py.
    """
    p, layer, post = prover, prover.parts.layers[i], f"{i}.mlp.post"
    failed = next((check for check in p.checks if check.where == post and check.status == "fails"), None)
    if failed is None or failed.identity != "7 weights" or layer.act is None or not p.has("mlp.gate", i):
        return
    call = trace(p.model.hf, p.run.tokens, [layer.act]).first(layer.act)
    gate = at_least_float32(p.at("mlp.gate", i))
    if call is None or call.read is None or call.wrote is None or call.read.value.shape != gate.shape:
        return
    read, up = at_least_float32(call.read.value), at_least_float32(p.at("mlp.up", i))
    c = gate.amax(-1, keepdim=True) - read.gather(-1, gate.argmax(-1, keepdim=True))
    largest = gate.abs().amax(-1, keepdim=True).expand_as(gate)  # whose rounding c has
    if ratio((read - (gate - c).clamp(min=0)).abs(), largest) > p.tolerance:
        return
    p.checks.remove(failed)
    value = at_least_float32(p.module(layer.act)(call.read.value))
    p.note = "the activation reads the gate less one number a position, where that is above nothing"
    p.same("7 weights", post, p.at("mlp.post", i), Sized(value * up, (read.abs() + value.abs()) * up.abs()))
