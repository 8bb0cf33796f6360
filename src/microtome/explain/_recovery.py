"""How well a method finds a circuit that is known.

Formula:  an edge's score is the largest |change of any output| over pairs and over both corruptions, other tokens and
          shuffled positions; AUC is the share of (edge of the circuit, edge outside) of which the first has the higher
          score, a tie counting half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from microtome.explain._edges import WRITTEN, edge_effects
from microtome.explain._graph import graph
from microtome.planted import Corruptions, Planted, corruptions, receiver_of, run_at, sender_of, writes
from microtome.run import Model, Reading, Run

if TYPE_CHECKING:
    import xarray as xr

Corruption = Literal["tokens", "positions"]


def circuit_recovery(
    it: Planted, *, pairs: int = 16, seed: int = 0, corrupt: tuple[Corruption, ...] = ("tokens", "positions")
) -> xr.Dataset:
    """Score every edge of a planted model exactly, and say how well the scores tell its circuit from the rest.

    Formula:  see the head of this file.
    Source:   compiled circuits as ground truth, as in Gupta et al., "InterpBench", 2024 (arXiv 2407.14494). Departs:
              positions are shuffled too, since an edge from the positional embedding shows under nothing else.
    Cost:     `edge_effects` for every pair and corruption.
    Check:    AUC 1 on every compiled program, and below where positions are not shuffled; tests/planted.

    Args:
        it: a planted model with its truth.
        pairs: how many inputs.
        seed: of the inputs and their corruptions.
        corrupt: which corruptions to use.

    Returns:
        Dataset over (sender, receiver), `pos_embed` a sender of its own: `score` in units of the outputs, and `true`;
        NaN and False where there is no edge; attribute `auc`.
    """
    c = corruptions(it, pairs, seed)
    scores: list[Tensor] = []
    for number, kind in ((n, k) for n in range(pairs) for k in corrupt):
        clean, base, source, parts = _case(it.model, c, number, kind)

        def change(logits: Tensor, prompts: Tensor, base: Tensor = base) -> Tensor:
            return (logits - base).abs().amax((1, 2))

        metric = Reading(change, positions=tuple(range(1, clean.shape[1])))
        data = edge_effects(it.model, clean, source, metric=metric, embeddings=parts)
        scores.append(torch.from_numpy(data["effect"].values))
    score = torch.stack(scores).amax(0)
    return _dataset(it, score, seed, corrupt)


def _case(model: Model, c: Corruptions, number: int, kind: Corruption) -> tuple[Tensor, Tensor, Run, dict[str, Tensor]]:
    """One clean input [1, pos], its outputs, a run of its corruption, and what the two embeddings change."""
    row = slice(number, number + 1)
    clean = c.clean[row]
    tokens, places = (c.corrupt[row], None) if kind == "tokens" else (clean, c.positions[row])
    source = run_at(model, tokens, places, capture=WRITTEN)
    now, then = writes(model, tokens, places), writes(model, clean)
    parts = {name: (now[name] - then[name])[0].detach() for name in ("embed", "pos_embed")}
    return clean, model.run(clean).logits[:, 1:].detach(), source, parts


def _dataset(it: Planted, score: Tensor, seed: int, corrupt: tuple[Corruption, ...]) -> xr.Dataset:
    import xarray as xr

    parts = graph(it.model)
    senders = ["embed", "pos_embed", *parts.senders[1:]]
    true = torch.zeros(len(senders), len(parts.receivers), dtype=torch.bool)
    for sender, receiver, slot in it.truth["edges"]:
        true[senders.index(sender_of(sender)), parts.receivers.index(receiver_of(receiver, slot))] = True
    edges = score.isfinite()
    data = xr.Dataset(
        {"score": (("sender", "receiver"), score.numpy()), "true": (("sender", "receiver"), true.numpy())},
        coords={"sender": senders, "receiver": list(parts.receivers)},
    )
    found = auc(score[edges & true], score[edges & ~true])
    attributes = {"method": "circuit recovery", "auc": found, "seed": seed, "corrupt": ", ".join(corrupt)}
    return data.assign_attrs(it.model.provenance | attributes)


def auc(higher: Tensor, lower: Tensor) -> float:
    """The share of pairs [higher] x [lower] of which the first is greater; a tie counts half."""
    wins = (higher.unsqueeze(1) > lower).double() + 0.5 * (higher.unsqueeze(1) == lower).double()
    return float(wins.mean())
