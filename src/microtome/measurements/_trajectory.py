"""The stream as a path through the layers: how sharply it turns, and whether it comes back when it is pushed.

Formula:  x_l the stream after layer l of a token, s_l = x_l - x_(l-1) (x_-1 the embedding), over tokens but first ones;
          acceleration = mean of |s_l - s_(l-1)| / (|s_l| + |s_(l-1)|): 0 of equal steps, 1 of steps that undo each
          other; there is none in layer 0;  its control is what steps of these lengths at right angles have,
          sqrt(|s_l|^2 + |s_(l-1)|^2) / (|s_l| + |s_(l-1)|);
          pushed[l, k], k > l: all tokens but first ones are moved, after layer l, by `push` |x_l| in a direction drawn
          at random; x' is the stream then;  pushed = mean of (|x'_k - x_k| / |x_k|) / (|x'_l - x_l| / |x_l|), 1 at
          k = l and nothing before;  its control, |x_l| / |x_k|, is what it is where later layers add the same whatever
          they read: below it the stream comes back, above it goes astray.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import ExampleMeans

PUSH = 0.1
LEAST = 1e-30


@measure(
    "trajectory",
    of="layer",
    on=Text(sequences=8, width=128, rows=8),
    atlas=False,
    title="path of the stream",
    question="How sharply does the stream turn from layer to layer, and does it come back when it is pushed?",
    columns=(
        Column("acceleration", "ratio", "size of the difference of two successive steps, over the sum of their sizes",
               "acceleration_square", (0, 1)),
        Column("acceleration_square", "ratio", "the same of steps of these sizes at right angles", range=(0, 1)),
        Column("pushed", "ratio", "relative distance, after each later layer, of the stream that was pushed after this "
               "one, over its relative distance here", "pushed_inert", (0, None), extra=("later",)),
        Column("pushed_inert", "ratio", "the same if later layers added the same to both", range=(0, None),
               extra=("later",), drawn=False),
    ),
    source=Source(
        "Fernando and Guitchounts", "Transformer Dynamics: A neuroscientific approach to interpretability of large "
        "language models", 2025, "2502.12131", "acceleration, and return after perturbation",
        departs="all tokens but first ones are pushed at once, in random directions and not towards other "
        "trajectories; distances are relative to norms, which grow; the push of 0.1 is ours",
    ),
    cost="L forwards over the first sequences of the text, each from its own layer on: about L / 2 full ones",
    check="tests/laws/test_trajectory.py",
)  # fmt: skip
class Trajectory(Statistic):
    """Acceleration of the stream, and how far it is from where it was after it was pushed, layer by layer."""

    def __init__(
        self,
        push: Annotated[float, Argument("size of the push, over the norm of the stream", "ratio", 1e-4, 10)] = PUSH,
    ) -> None:
        """Push so far."""
        self.push = push

    def start(self, model: Model, layer: int | None) -> Kept:
        """Means by row, of every layer, and of every pair of layers."""
        n = model.anatomy.n_layers
        kept: Kept = {name: ExampleMeans(n) for name in ("acceleration", "acceleration_square")}
        return kept | {name: ExampleMeans((n, n)) for name in ("pushed", "pushed_inert")}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch, run from every layer on, without logits."""
        model, n, later = seen.model, seen.model.anatomy.n_layers, seen.later
        if not bool(later.any()):
            return
        base = model.run(seen.tokens, capture=["*.resid_pre", "*.resid_post"], logits=False)
        after = [at_least_float32(base[f"{i}.resid_post"]) for i in range(n)]
        turns = accelerations([at_least_float32(base["0.resid_pre"]), *after])
        first = torch.arange(n) == 0
        for name, x in zip(("acceleration", "acceleration_square"), turns, strict=True):
            kept[name].update(x, seen.examples, later, first)
        size = torch.stack([x.norm(dim=-1) for x in after], dim=-1).double().clamp(min=LEAST)  # [row, pos, layer]
        found = size.new_zeros(*size.shape, n)
        for i in range(n - 1):
            x = base[f"{i + 1}.resid_pre"]
            push = self.push * noise(x, seen.examples) * x.norm(dim=-1, keepdim=True)
            push = torch.where(later.to(x.device).reshape(*later.shape, *[1] * (x.dim() - 2)), push, 0.0)
            pushed = x + push
            moved = (pushed - x).double().norm(dim=-1) / x.double().norm(dim=-1).clamp(min=LEAST)  # as it was rounded
            moved = moved.clamp(min=LEAST)

            def see(site: Site, y: Tensor, i: int = i, moved: Tensor = moved) -> None:
                k = site.layer
                assert k is not None
                apart = (at_least_float32(y) - after[k]).double().norm(dim=-1)
                found[..., i, k] = apart / size[..., k] / moved

            sites = f"{','.join(map(str, range(i + 1, n)))}.resid_post"
            model.run(seen.tokens, start_at=i + 1, given=pushed, observe={sites: see}, logits=False)
            current().report("pushing the stream", i + 1, n - 1)
        found.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        before = torch.ones(n, n, dtype=torch.bool).tril(-1)
        kept["pushed"].update(found, seen.examples, later, before)
        kept["pushed_inert"].update(size.unsqueeze(-1) / size.unsqueeze(-2), seen.examples, later, before)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The means."""
        return {name: held.mean for name, held in kept.items()}


def accelerations(
    stream: list[Float[Tensor, "row pos d"]],
) -> tuple[Float[Tensor, "row pos layer"], Float[Tensor, "row pos layer"]]:
    """Acceleration and its control [row, pos, layer] of the stream before and after each layer; 0 in the first."""
    steps = [(b - a).double() for a, b in pairwise(stream)]
    sizes = [step.norm(dim=-1) for step in steps]
    turns, square = [torch.zeros_like(sizes[0])], [torch.zeros_like(sizes[0])]
    for a, b, m, n in zip(steps[:-1], steps[1:], sizes[:-1], sizes[1:], strict=True):
        whole = (m + n).clamp(min=LEAST)
        turns.append(((b - a).norm(dim=-1) / whole).clamp(max=1))
        square.append((m.square() + n.square()).sqrt() / whole)
    return torch.stack(turns, dim=-1), torch.stack(square, dim=-1)


def noise(x: Float[Tensor, "row ..."], examples: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
    """Unit vectors along the last axis like x, drawn by the seed of the settings and the name of each row alone."""
    drawn: list[Tensor] = []
    for example in examples.tolist():
        generator = torch.Generator().manual_seed(current().seed * 1_000_003 + example)
        drawn.append(torch.randn(x.shape[1:], generator=generator, dtype=torch.float64))
    return torch.nn.functional.normalize(torch.stack(drawn), dim=-1).to(x)
