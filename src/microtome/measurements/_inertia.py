"""Whether tokens of a large stream turn less from layer to layer.

Formula:  turn = 1 - cos(resid_pre, resid_post) of a token in a layer;
          turn_first, turn_other = its mean over the first token of each row, and over all others;
          inertia = correlation, over all tokens but the first of each row, of turn with log |resid_pre|; inertia is
          below 0 where larger tokens turn less;
          control: the same with the norm of the token half the row away, round its end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.measurements._stream import half_a_row
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Covariance, ExampleMeans

CHART = "How far the stream turns"


@measure(
    "inertia",
    of="layer",
    on=Text(sequences=16, width=128),
    sites=("resid_pre", "resid_post"),
    title="inertia of the stream",
    question="Do tokens with a large residual stream turn less in a layer?",
    columns=(
        Column(
            "inertia", "correlation", "of how far a token turns in the layer with the logarithm of its norm before it, "
            "each row's first token left out", "inertia_elsewhere", (-1, 1), interval=False,
        ),
        Column(
            "inertia_elsewhere", "correlation", "the same with the norm of the token half the row away",
            range=(-1, 1), interval=False,
        ),
        Column(
            "turn_first", "1", "1 - cosine between input and output of the layer at each row's first token",
            "turn_other", (0, 2), title="first token", chart=CHART,
        ),
        Column("turn_other", "1", "the same over all other tokens", range=(0, 2), title="other tokens", chart=CHART),
    ),
    source=Source(
        "Li et al.", "The Unseen Bias: How Norm Discrepancy in Pre-Norm MLLMs Leads to Visual Information Loss", 2025,
        "2512.08374",
        where="update rate and norm",
        departs="tokens of a text in place of two modalities; a correlation over tokens, the classes are the first "
        "token of a row and the others",
    ),
    cost="three products of the stream with itself per layer",
    check="tests/laws/test_sinks.py",
)  # fmt: skip
class Inertia(Statistic):
    """The correlation of how far tokens turn in a layer with their norms, and how far first tokens and others turn."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """The covariance of turn, norm and another token's norm; means of both classes."""
        return {"together": Covariance(3), "turn_first": ExampleMeans(1), "turn_other": ExampleMeans(1)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch."""
        pre, post = (at_least_float32(seen[name]).double() for name in ("resid_pre", "resid_post"))
        turn = (1 - torch.cosine_similarity(pre, post, dim=-1)).clamp(0, 2)
        size = pre.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny).log()
        away = half_a_row(pre.shape[1]).to(pre.device)
        later = seen.later
        kept["together"].update(torch.stack([turn, size, size[:, away]], -1), later)
        first = torch.zeros_like(later)
        first[:, 0] = later.any(1)
        for name, mask in (("turn_first", first), ("turn_other", later)):
            kept[name].update(turn.unsqueeze(-1), seen.examples, mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The correlations, NaN where all tokens turn alike or are alike in norm, and the means."""
        correlation = kept["together"].result().correlation[0].clamp(-1, 1)
        means = {name: kept[name].mean[0] for name in ("turn_first", "turn_other")}
        return {"inertia": correlation[1], "inertia_elsewhere": correlation[2], **means}
