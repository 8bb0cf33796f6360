"""The loss as more and more heads are left out: by rising importance, or in an order of your own, and at random.

Formula:  R_0 = {}; with n heads left out, I_h = E_e |dL_e / dxi_h| under z = 0 of R_n, over its L2 norm by layer
          (see _head_importance.py); R_{n+k} = R_n and the k heads of the smallest I_h outside of it. loss(n) = the mean
          loss without R_n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Edit, Zero
from microtome.errors import ArgumentError, DataError, error
from microtome.measurements._head_importance import gate_gradients, layers_with_heads
from microtome.metric import token_loss
from microtome.model import Model

Heads = Sequence[tuple[int, int]]
"""(layer, head), each once."""


def pruning_curve(
    model: Model,
    tokens: Tensor,
    order: Heads | None = None,
    *,
    steps: int = 8,
    draws: int = 3,
) -> xr.Dataset:
    """The loss as more and more heads are left out: by rising importance, or in a given order, and in random ones.

    Formula:  see this file's head; loss with z = 0 of the first n heads of the order, n in equal steps from 0 to all.
    Source:   Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019 (1905.10650), section 4.
              Departs: the importance is measured again after each step, on the model as it is then.
    Cost:     (1 + draws) (steps + 1) forwards, and without an order a forward and a backward a step.
    Check:    with none left out it is the loss of the whole model, and heads that write nothing go first;
              tests/laws/test_head_importance.py.

    Args:
        model: an open model.
        tokens: [row, pos] token ids.
        order: (layer, head), the first to be left out first; by default the least important, step by step.
        steps: into how many parts the order is cut.
        draws: how many random orders.

    Returns:
        A dataset of `loss` [removed] and `loss_random` [draw, removed], nats, and of `layer` and `head` [place], the
        order.

    Raises:
        ArgumentError: `steps` or `draws` is no positive number.
        DataError: the order is empty, or names a head twice or one that does not exist.
        ModelUnsupported: the model is not causal.
        SiteError: without an order: no layer has heads.

    >>> pruning_curve(model, tokens)
    """
    model.require_next_token()
    if steps < 1 or draws < 1:
        raise error(
            ArgumentError, "a curve needs steps and draws", got=f"steps={steps}, draws={draws}", do="give 1 or more"
        )
    if order is not None and (not order or len(set(order)) < len(order)):
        raise error(DataError, "the order must name each head once", got=f"{len(order)} heads", do="list (layer, head)")
    for layer, head in order or ():
        site = Site("attn.z", layer)
        if site not in model.anatomy.hook_points or not 0 <= head < model.anatomy.size(site, "head"):
            what = "the order names a head that the model has not"
            raise error(DataError, what, got=f"({layer}, {head})", do="list (layer, head), counting from 0")
    chosen = list(order) if order is not None else None
    layers = layers_with_heads(model) if chosen is None else []
    every = [(i, h) for i in layers for h in range(model.anatomy.n_heads)] if chosen is None else chosen
    counts = sorted({round(i * len(every) / steps) for i in range(steps + 1)})
    chosen = _greedy(model, tokens, every, layers, counts) if chosen is None else chosen
    rng = torch.Generator().manual_seed(current().seed)
    shuffled = [[chosen[i] for i in torch.randperm(len(chosen), generator=rng).tolist()] for _ in range(draws)]
    curves: list[list[float]] = []
    for heads in (chosen, *shuffled):
        curves.append([_loss_with(model, tokens, heads[:count]) for count in counts])
        current().report("leaving heads out", len(curves), 1 + draws)
    variables: dict[str, Any] = {
        "loss": ("removed", curves[0], {"unit": "nats"}),
        "loss_random": (("draw", "removed"), curves[1:], {"unit": "nats"}),
        "layer": ("place", [i for i, _ in chosen]), "head": ("place", [h for _, h in chosen]),
    }  # fmt: skip
    return xr.Dataset(variables, coords={"removed": counts}, attrs=dict(model.provenance) | {"seed": current().seed})


def _greedy(
    model: Model, tokens: Tensor, every: Heads, layers: Sequence[int], counts: Sequence[int]
) -> list[tuple[int, int]]:
    """All heads, the least important first, measured again at each count on the model without those before."""
    found: list[tuple[int, int]] = []
    for at, count in enumerate(counts[1:]):
        slopes = gate_gradients(model, tokens, layers, without(found)).abs().mean(0)
        left = importance(slopes)
        ranked = sorted(set(every) - set(found), key=lambda head: (float(left[layers.index(head[0]), head[1]]), head))
        found += ranked[: count - len(found)]
        current().report("ranking heads", at + 1, len(counts) - 1)
    return found


def importance(slopes: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
    """Mean sizes of gradients over their L2 norm by layer; 0 in a layer without any."""
    return slopes / slopes.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(slopes.dtype).tiny)


def without(heads: Heads) -> list[Edit]:
    """Edits that leave heads out."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return [Zero(f"{i}.attn.z[{','.join(map(str, sorted(h)))}]") for i, h in sorted(by_layer.items())]


def _loss_with(model: Model, tokens: Tensor, heads: Heads) -> float:
    """The mean loss with some heads left out."""
    return float(token_loss(model.run(tokens, edits=without(heads)).logits, tokens).double().mean())
