"""The identities of an MLP: what its projections and its activation make of what it reads, and W_out of its neurons."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from microtome.anatomy import Site, activation_of, at_least_float32
from microtome.model._identities import Prover
from microtome.model._sized import Sized, product
from microtome.run.hook import trace

VIEWS = {"mlp.gate": ("W_gate", "b_gate"), "mlp.up": ("W_in", "b_in"), "mlp.pre": ("W_in", "b_in")}


class Neurons:
    """Checks the MLPs of one model."""

    def __init__(self, prover: Prover) -> None:
        self.prover = prover

    def write(self, i: int) -> None:
        """Neurons, through W_out and what gates that, sum to what the MLP writes."""
        prover = self.prover
        layer, weights = prover.parts.layers[i], prover.model.layers[i]
        if not prover.has("mlp.post", i):
            prover.skip("4 neurons", f"{i}.mlp", prover.a.missing.get(Site("mlp.post", i), "neurons are not seen"))
            return
        x, W_out = prover.at("mlp.post", i), weights.W_out
        total = product(x, W_out, weights.b_out)
        total = prover.acted(layer.down, total, x, W_out, prover.held_to(layer.mlp_post_norm))
        if layer.write_gate is not None:
            gate = at_least_float32(ACT2FN[layer.write_gate[1]](self.gates[i]))
            total = Sized(total.value * gate, total.size * gate.abs())
            prover.skip("2 residual", f"{i}.sum", "what its neurons write is multiplied by a gate")
        prover.written("4 neurons", f"{i}.mlp.post", i, "mlp_out", total, layer.mlp_post_norm)

    @cached_property
    def gates(self) -> dict[int, Tensor]:
        """[batch, pos, d_model] by layer: of what the gate on what neurons write is made, in one more forward."""
        layers = enumerate(self.prover.parts.layers)
        paths = {i: layer.write_gate[0] for i, layer in layers if layer.write_gate is not None}
        flow = trace(self.prover.model.hf, self.prover.run.tokens, paths.values())
        calls = {i: flow.first(path) for i, path in paths.items()}
        return {i: call.wrote.value for i, call in calls.items() if call is not None and call.wrote is not None}

    def read(self, i: int) -> None:
        """Weight views map what the MLP reads to its neurons before the non-linearity, and that gives the neurons."""
        prover, where = self.prover, f"{i}.mlp"
        layer, weights = prover.parts.layers[i], prover.model.layers[i]
        if layer.experts is not None:
            prover.skip("7 weights", where, "the layer is a mixture: experts are checked by identity 4")
            return
        if not prover.has("mlp.post", i):
            prover.skip("7 weights", where, prover.a.missing.get(Site("mlp.post", i), "neurons are not seen"))
            return
        x, before = prover.at("mlp.in", i), len(prover.checks)
        for name, (matrix, offset) in VIEWS.items():
            if prover.has(name, i):
                view = getattr(weights, matrix)
                path = layer.gate_up or (layer.gate if matrix == "W_gate" else layer.up)
                expected = prover.acted(path, product(x, view, getattr(weights, offset)), x, view)
                prover.multiplies("7 weights", f"{i}.{matrix}", prover.at(name, i), expected)
        seen = prover.at("mlp.gate" if prover.has("mlp.gate", i) else "mlp.pre", i)
        up, post = prover.at("mlp.up", i) if prover.has("mlp.gate", i) else None, prover.at("mlp.post", i)
        name = None if layer.act is not None else activation_of(post, seen, up)
        if layer.act is None and name is None:
            if all(check.status == "holds" for check in prover.checks[before:]):
                prover.skip("7 weights", where, "the activation is not a module of its own")
            else:
                prover.fail("7 weights", where, prover.tolerance, "the activation has no known form")
            return
        act: Any = ACT2FN[name] if layer.act is None else prover.module(layer.act)
        prover.same("7 weights", f"{i}.mlp.post", post, self._activated(i, act, seen, up))
        if prover.checks[-1].status == "fails":
            direct, by = prover.checks.pop(), _factor(act, seen, up, post)
            prover.note = f"the activation is of {by:.6g} times what it is seen to read"
            prover.same("7 weights", f"{i}.mlp.post", post, self._activated(i, act, seen * by, up))
            if prover.checks[-1].status == "fails":
                prover.checks[-1] = direct

    def _activated(self, i: int, act: Any, seen: Tensor, up: Tensor | None) -> Sized:
        """What the activation of an MLP makes of what enters it, times the branch that it gates."""
        value, size = at_least_float32(act(seen)), at_least_float32(seen).abs()
        # Smooth activations are differences of about the size of what they read.
        made = Sized(value, size + value.abs())
        if up is not None:
            up = at_least_float32(up)
            made = Sized(made.value * up, made.size * up.abs())
        return self._through(i, made)

    def _through(self, i: int, made: Sized) -> Sized:
        """What a norm of the MLP makes of its neurons before W_out, where it has one."""
        prover, path = self.prover, self.prover.parts.layers[i].mlp
        inside = [] if path is None else [(f"{path}.{name}", m) for name, m in prover.module(path).named_children()]
        norms = [name for name, m in inside if "Norm" in type(m).__name__ and next(m.parameters()).numel() > 0]
        return prover.behind(norms[0], made) if len(norms) == 1 else made


def _factor(act: Any, seen: Tensor, up: Tensor | None, post: Tensor) -> float:
    """The number by which what enters an activation is multiplied before: that which fits the neurons best."""
    from scipy.optimize import least_squares

    times = torch.ones_like(seen) if up is None else up

    def off(by: Any) -> Any:
        made = act(seen * float(by[0])) * times
        return (at_least_float32(made) - at_least_float32(post)).flatten().double().cpu().numpy()

    with torch.no_grad():
        return float(least_squares(off, [1.0], diff_step=1e-3, xtol=1e-12, ftol=1e-14).x[0])
