"""The identity of a mixture: its layer gives what it does without its experts, and what the slots add.

The experts are silenced by intervention, so that nothing needs to be known of shared experts, of gates on them, or of
what else the layer does. Slots may be added times one number, as where they are averaged with a shared expert: it is
measured, and must be the same for all tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import Anatomy, Experts, HookPoint, Site, at_least_float32
from microtome.model._identities import Prover
from microtome.model._sized import Sized
from microtome.run.hook import HookSet, input_of, output_of


def silenced(prover: Prover) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, what its mixture gives in one more forward, and what it gives where its experts give nothing.

    A mixture that ends in a norm is seen before that.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = HookSet(prover.model.hf, prover.a.attention, prover.a.n_heads)
    silent: list[int] = []
    last: list[tuple[Tensor, Tensor]] = []  # what the latest part of a mixture read and wrote

    def given(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        last.clear()
        output = forward(*args, **kwargs)
        whole = output_of(output)
        ends = bool(last) and last[0][1] is whole and last[0][0].shape == whole.shape
        return output, at_least_float32(last[0][0] if ends else whole)

    def both(i: int) -> Any:
        def around(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output, whole = given(forward, args, kwargs)
            silent.append(i)
            try:
                found[i] = whole, given(forward, args, kwargs)[1]
            finally:
                silent.pop()
            return output

        return around

    def note(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        last[:] = [(input_of(args, kwargs), output_of(output))]

    def nothing(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return torch.zeros_like(output) if silent else None

    def own(i: int) -> Any:
        def after(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found[i] = at_least_float32(output), at_least_float32(torch.zeros_like(output))

        return after

    for i, layer in enumerate(prover.parts.layers):
        if layer.experts is None or layer.mlp is None or not prover.has("mlp.experts", i):
            continue
        if not layer.experts.startswith(layer.mlp + "."):  # beside the MLP: they are all that their own module gives
            hooks.after(layer.experts, own(i))
        else:
            hooks.around(layer.mlp, both(i))
            hooks.after(layer.experts, nothing)
            for name, part in prover.module(layer.mlp).named_children():
                if next(part.children(), None) is None and all(p.dim() < 2 for p in part.parameters()):
                    hooks.after(f"{layer.mlp}.{name}", note)
    with torch.no_grad(), hooks:
        prover.model.hf(input_ids=prover.run.tokens)
    return found


class Mixtures:
    """Checks the mixtures of one model.

    Attributes:
        factors: by layer, what the slots are added times.
    """

    def __init__(self, prover: Prover) -> None:
        self.prover = prover
        self.factors: dict[int, float] = {}

    @cached_property
    def silenced(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, what a mixture gives with its experts, and without."""
        return silenced(self.prover)

    def prove(self, i: int) -> None:
        """Check the slots of a layer against what the layer gives without them, and its neurons against both."""
        prover, (whole, without) = self.prover, self.silenced[i]
        slots = at_least_float32(prover.at("mlp.experts", i)).flatten(0, 1).cpu().double()
        whole, without = (x.reshape(slots.shape[0], -1).cpu().double() for x in (whole, without))
        total, added = slots.sum(1), whole - without
        power = total.square().sum()
        factor = float((added * total).sum() / power) if power > 0 else 1.0
        # Averages of a few are taken for what they are, beyond what the rounding of a type can show.
        part = 1 / max(round(1 / factor), 1) if factor > 0 else factor
        factor = part if abs(factor - part) < prover.product * part else factor
        # What an expert summed is not seen: the size of its output is the largest value at a position.
        size = slots.abs().amax(-1, keepdim=True).expand_as(slots).sum(1) * abs(factor)
        rounding = torch.finfo(prover.model.dtype).eps * (whole.abs() + without.abs())
        gaps = ((added - total * factor).abs() - rounding).clamp(min=0)
        prover.judge("4 neurons", f"{i}.mlp.experts", gaps, size, prover.product)
        if prover.checks[-1].status == "holds":
            self.factors[i] = factor
        if prover.has("mlp.experts.post", i):
            prover.attempt("4 neurons", f"{i}.mlp.experts.post", lambda: _neurons(prover, i, total))


def _neurons(prover: Prover, i: int, total: Tensor) -> None:
    """Neurons through W_out, by the weights of the router, sum to what the slots do."""
    of = Experts(prover.module(prover.parts.layers[i].experts or ""))
    post, weights = prover.at("mlp.experts.post", i).flatten(0, 1), prover.at("mlp.router", i).flatten(0, 1)
    if "stacked" in dict(prover.a.hook_points[Site("mlp.experts", i)].sizes):
        weights = (weights != 0).to(weights.dtype)  # the tokens themselves are weighted
    value = at_least_float32(torch.zeros_like(total, dtype=post.dtype, device=post.device))
    size = torch.zeros_like(value)
    W_out = of.W_out
    assert W_out is not None
    for expert in range(post.shape[1]):
        at = torch.where(weights[:, expert] != 0)[0]
        by, x = at_least_float32(weights[at, expert]).unsqueeze(-1), post[at, expert]
        value[at] += at_least_float32(of.writes(x, expert)) * by
        size[at] += (at_least_float32(x).abs() @ at_least_float32(W_out[expert]).abs()) * by.abs()
    bias = of.bias("b_out")
    size = size if bias is None else size + at_least_float32(bias).abs().max()
    # Routers may choose what computes nothing, or passes the token on: tokens that saw one are not compared.
    seen = (at_least_float32(weights[:, : post.shape[1]]) != 0).any(-1) & (weights[:, post.shape[1] :] == 0).all(-1)
    expected = Sized(value, size)[seen]
    prover.multiplies("4 neurons", f"{i}.mlp.experts.post", total.to(value)[seen], expected)


def with_factors(anatomy: Anatomy, factors: dict[int, float]) -> Anatomy:
    """The map with the slots of mixtures times the numbers by which they are added."""
    points: dict[Site, HookPoint] = dict(anatomy.hook_points)
    for i, factor in factors.items():
        site = Site("mlp.experts", i)
        if factor != 1.0 and site in points:
            points[site] = replace(points[site], scale=factor)
    return replace(anatomy, hook_points=points)
