"""Pairs under gates: their mean metric for a gate on each edge, and what follows from its slope.

Formula:  eap(u -> v) = -d m / d g_uv at gates of 1 = (other_u - write_u) . d m / d x_v, summed over positions, for
          whatever edges that are out give.
Check:    equal to the estimate of a run where edges are resampled, and to differences; tests/laws/test_gates.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.sweep import Circuits, bytes_of_gated, gated
from microtome.training import in_parts

Engines = Sequence[tuple[list[int], Circuits]]


def chunks(engines: Engines, numbers: Sequence[int] | None = None) -> Iterator[tuple[Circuits, Tensor]]:
    """Engines, and as many of their prompts as fit together with their graph; of some pairs, or of all."""
    wanted = None if numbers is None else set(numbers)
    for own, engine in engines:
        mine = torch.tensor([i for i, pair in enumerate(own) if wanted is None or pair in wanted], dtype=torch.long)
        rows = max(1, engine.room() // bytes_of_gated(engine))
        for some in mine.to(engine.own.device).split(rows):
            if len(some):
                yield engine, some


def soft_mean(
    engines: Engines,
    gates: Float[Tensor, "sender receiver"],
    constants: Tensor | None = None,
    numbers: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """The mean metric of pairs whose edges are in by their gates, with its gradient."""
    count = len(numbers) if numbers is not None else sum(len(own) for own, _ in engines)
    given = [gates, *([] if constants is None else [constants])]

    def part(engine: Circuits, some: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda x: gated(engine, x[0], some, *x[1:]).sum() / count

    return in_parts(given, (part(engine, some) for engine, some in chunks(engines, numbers)))


def first_order(engines: Engines) -> Float[Tensor, "sender receiver"]:
    """What taking each edge out does to the mean metric, to first order, whatever edges that are out give."""
    edges = engines[0][1].edges
    gates = torch.ones(edges.shape, device=edges.device, requires_grad=True)
    with torch.enable_grad():
        slope = torch.autograd.grad(soft_mean(engines, gates), gates)[0]
    return -slope.double().masked_fill(~edges, torch.nan).cpu()
