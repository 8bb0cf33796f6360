"""Losses that are sums of parts, of which one graph is held at a time; and weights that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.model import Model

Part = Callable[[Sequence[Tensor]], Tensor]


def in_parts(tensors: Sequence[Tensor], parts: Iterable[Part]) -> Float[Tensor, ""]:
    """The sum of functions of tensors, whose gradient is known already: each part is drawn back before the next runs.

    Formula:  value + sum over tensors of (x - x'), slope), x' = x without its graph, slope the gradient of the sum.
    Check:    equal to the plain sum and its gradient; tests/laws/test_gates.py.
    """
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    wanted = [x for x in leaves if x.requires_grad]
    slopes, total = [torch.zeros_like(x) for x in wanted], 0.0
    for part in parts:
        with torch.enable_grad():
            value = part(leaves)
            found: Any = torch.autograd.grad(value, wanted, allow_unused=True) if wanted else ()
        slopes = [a if b is None else a + b for a, b in zip(slopes, found, strict=True)]
        total = total + value.detach()
    whole = torch.as_tensor(total)
    for x, slope in zip((x for x in tensors if x.requires_grad), slopes, strict=True):
        whole = whole + ((x - x.detach()) * slope).sum()
    return whole


@contextmanager
def frozen_weights(model: Model) -> Iterator[None]:
    """No weight of the model gets a gradient inside the block: a model from memory may want them."""
    wanting = [p for p in model.hf.parameters() if p.requires_grad]
    try:
        for p in wanting:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)
