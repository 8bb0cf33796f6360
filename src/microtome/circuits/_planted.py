"""ACDC on models whose circuit is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.circuits._acdc import acdc
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.explain import graph
from microtome.metric import FunctionMetric
from microtome.planted import Planted, corruptions, receiver_of, sender_of, writes
from microtome.sweep import Circuits

if TYPE_CHECKING:
    import xarray as xr

TAUS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def acdc_recovery(it: Planted, *, pairs: int = 8, taus: Sequence[float] = TAUS) -> xr.Dataset:
    """How well ACDC finds the circuit of a compiled program.

    Formula:  cost = distance of all outputs from the clean ones, in the mean over inputs and over both corruptions,
              other tokens and shuffled positions; F1 = 2 true / (found + planted) edges.
    Source:   Conmy et al., 2023 (arXiv 2304.14997); Gupta et al., "InterpBench", 2024 (arXiv 2407.14494). Departs:
              positions are shuffled too, since only this reveals edges from the positional embedding, which is a sender
              of its own.
    Cost:     for each threshold a row an edge, input and corruption.
    Check:    F1 1 on every program; tests/planted/test_circuits.py.

    Args:
        it: a compiled program.
        pairs: random inputs.
        taus: thresholds.

    Returns:
        A dataset over `tau`: `f1`, `precision`, `recall`, `edges`; and `true` (sender, receiver).

    Raises:
        ArgumentError: there is no threshold.
        DataError: the truth names no edges, or there are no inputs.
    """
    import xarray as xr

    if not taus:
        raise error(ArgumentError, "there is no threshold", do="give taus=")
    engines, true, names = engines_of(it, pairs)
    found = [acdc(engines, float(tau)).kept.cpu() for tau in taus]
    hits = torch.tensor([int((kept & true).sum()) for kept in found], dtype=torch.float64)
    sizes, planted = torch.tensor([int(kept.sum()) for kept in found], dtype=torch.float64), float(true.sum())
    values = {
        "f1": 2 * hits / (sizes + planted), "precision": hits / sizes.clamp(min=1), "recall": hits / planted,
        "edges": sizes,
    }  # fmt: skip
    data = xr.Dataset({name: ("tau", x.numpy()) for name, x in values.items()}, coords={"tau": list(taus)})
    data["true"] = (("sender", "receiver"), true.numpy())
    data = data.assign_coords(sender=names, receiver=list(graph(it.model).receivers))
    return data.assign_attrs(it.provenance, inputs=pairs, seed=current().seed)


def engines_of(it: Planted, pairs: int) -> tuple[list[Circuits], Tensor, list[str]]:
    """Engines of both corruptions, the edges that are planted [sender, receiver], and the names of the senders."""
    c = corruptions(it, pairs, current().seed)
    parts = graph(it.model)
    names = ["embed", "pos_embed", *parts.senders[1:]]
    base = it.model.run(c.clean).logits[:, 1:].detach().double()

    def distance(logits: Tensor, prompts: Tensor) -> Tensor:
        return (logits.double() - base[prompts]).flatten(1).norm(dim=1)

    metric = FunctionMetric(distance, positions=tuple(range(1, c.clean.shape[1])))
    before, engines = writes(it.model, c.clean), list[Circuits]()
    for tokens, where in ((c.corrupt, None), (c.clean, c.positions)):
        after = writes(it.model, tokens, where)
        written = {node if node in names else sender_of(node): x.detach() for node, x in after.items()}
        other = torch.stack([written[name] for name in names], dim=1)
        more = torch.stack([after[name].detach() - before[name].detach() for name in names[:2]], dim=1)
        engines.append(Circuits(it.model, c.clean, other, metric, embeddings=more))
    true = torch.zeros(len(names), len(parts.receivers), dtype=torch.bool)
    for sender, receiver, slot in it.truth["edges"]:
        true[names.index(sender_of(sender)), parts.receivers.index(receiver_of(receiver, slot))] = True
    return engines, true, names
