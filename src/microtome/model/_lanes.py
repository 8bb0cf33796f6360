"""What branches hand to a stream of several lanes, as hyper-connections and AltUp make it.

No branch of such a block adds what it writes to a stream of its width: the block mixes the lanes and what was written.
Between two points of the stream, at every position and for every lane j,

    after[j] = sum_k a[j, k] before[k] + sum_t b[j, t] written[t]

with `before` and `after` [lane, d_model], and numbers a and b. `written` is what the branches hand over, and what else
parts of the block give that no part of it reads, so that it can only be mixed in. The numbers are fitted in float64 at
every position and for every lane by itself: d_model equations for as many of them as there are lanes and terms. The
identity holds where nothing is left over; and a branch is proven where ten times as much is left over without it.

It says that a branch enters the stream in a straight line, and between which points. It does not say where the
numbers come from: they may depend on the stream and on the branch, and so change under an edit. Nor does it tell a
branch from a multiple of it, or make the stream a sum: `Anatomy.why_no_sum` goes on saying that it is none.

Source: Zhu et al. 2024, Hyper-Connections; Baykal et al. 2023, Alternating Updates (AltUp). Cost: one forward that
notes what every module reads and writes, and two small least squares a branch. Check: tests/laws/test_lanes.py, with
models that are rewired for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from microtome.anatomy import Flow, Norm, NormWeights, Site, at_least_float32, multiples
from microtome.model._identities import BRANCHES, Prover, named
from microtome.model._sized import Sized, ratio
from microtome.run.hook import trace

SHARE = 0.1
"""What may be left over with a branch, as a share of what is left without it."""


@dataclass(frozen=True)
class Stretch:
    """From one point of the stream to the next within a block.

    Attributes:
        first, end: the children of the block whose calls lie between them: from `first` up to `end`.
        before, after: the lanes at the points, [batch, pos, lane, d_model].
    """

    first: int
    end: int
    before: Tensor
    after: Tensor


class Lanes:
    """Proves, in one more forward, what the branches of a model hand to a stream of lanes."""

    def __init__(self, prover: Prover) -> None:
        self.prover, self.a = prover, prover.a
        points = (self.a.hook_points.get(Site("resid_pre", i)) for i in range(self.a.n_layers))
        self.point = next((point for point in points if point is not None), None)
        self.width = 0 if self.point is None else dict(self.point.sizes).get("d_model", self.a.d_model)

    def __bool__(self) -> bool:
        """Whether the stream has lanes."""
        return self.width > self.a.d_model and self.width % self.a.d_model == 0

    @cached_property
    def flow(self) -> Flow:
        """What blocks, the modules in them and the norms read and write."""
        hf, parts = self.prover.model.hf, self.prover.parts
        norms = [parts.final_norm, *(norm for layer in parts.layers for norm in (layer.attn_norm, layer.mlp_norm))]
        paths = [norm.path for norm in norms if norm is not None]
        for layer in parts.layers:
            inside = hf.get_submodule(layer.block).named_children()
            paths += [layer.block, *(f"{layer.block}.{name}" for name, _ in inside)]
        return trace(hf, self.prover.run.tokens, dict.fromkeys(paths))

    def read_by(self, norm: Norm | None) -> Tensor | None:
        """What a norm reads."""
        call = None if norm is None else self.flow.first(norm.path)
        return None if call is None or call.read is None else call.read.value

    def reads(self, i: int) -> None:
        """What a branch reads is the norm of what was mixed from the lanes."""
        layer = self.prover.parts.layers[i]
        for name, norm in (("attn", layer.attn_norm), ("mlp", layer.mlp_norm)):
            x = self.read_by(norm)
            if norm is None or x is None or not self.prover.has(f"{name}.in", i):
                continue
            weights = NormWeights(self.prover.module(norm.path), norm)
            seen = self.prover.at(f"{name}.in", i)
            self.prover.same("7 weights", f"{i}.{name}.in", seen, self.prover.read(weights, x))

    def residual(self, i: int) -> None:
        """Every stretch of a block mixes the lanes and what was written there, each branch among it."""
        p, block = self.prover, self.prover.parts.layers[i].block
        children = self.flow.children(block)

        def number(name: str) -> int:
            module = self.a.hook_points[Site(name, i)].module
            return next(n for n, call in enumerate(children) if f"{module}.".startswith(f"{call.path}."))

        p.skip("2 residual", f"{i}.sum", f"a stream of {self.width} is not the sum of branches of {self.a.d_model}")
        branches = {name: number(name) for name in BRANCHES if p.has(name, i)}
        for stretch in self._stretches(block):
            own = [name for name, n in branches.items() if stretch.first <= n < stretch.end]
            if own:
                gap, shares = self._left(i, own, stretch)
                p.conclude("2 residual", f"{i}.resid_post", gap, p.tolerance, named(i, *own))
                for name, share in shares.items():
                    p.note = "what is left over with it, as a share of that without it"
                    p.conclude("2 residual", f"{i}.{name}", share, SHARE)
            if p.has("resid_mid", i) and stretch.first <= (n := number("resid_mid")) <= stretch.end:
                self._between(i, [name for name in own if branches[name] < n], replace(stretch, end=n))

    def _between(self, i: int, own: Sequence[str], stretch: Stretch) -> None:
        """The stream between the branches is a point of it, or where it is of one lane, mixed like the others."""
        p, mid = self.prover, self.prover.at("resid_mid", i)
        if mid.shape[-1] == self.width:
            if own:  # it ends here
                p.same("2 residual", f"{i}.resid_mid", mid.unflatten(-1, (-1, self.a.d_model)), Sized.of(stretch.after))
            return
        gap, shares = self._left(i, own, replace(stretch, after=mid.unsqueeze(-2)))
        p.conclude("2 residual", f"{i}.resid_mid", gap, p.tolerance)
        p.conclude("2 residual", f"{i}.resid_mid", max(shares.values(), default=1.0), SHARE)

    def _stretches(self, block: str) -> list[Stretch]:
        """The stretches between what enters a block, what its code made like that, and what leaves it."""
        whole, count = self.flow.first(block), len(self.flow.children(block))
        assert whole is not None
        assert whole.read is not None
        assert whole.wrote is not None
        points = {0: whole.read} | self.flow.made(block) | {count: whole.wrote}
        lanes = [(n, self._lanes(seen.value)) for n, seen in points.items()]
        return [Stretch(n, end, before, after) for (n, before), (end, after) in pairwise(lanes)]

    def _lanes(self, x: Tensor) -> Tensor:
        """A stream as [batch, pos, lane, d_model]."""
        if self.point is not None and self.point.lanes is not None:
            return x.movedim(self.point.lanes, -2)
        return x.unflatten(-1, (-1, self.a.d_model))

    def _left(self, i: int, own: Sequence[str], stretch: Stretch) -> tuple[float, dict[str, float]]:
        """What is left over of a stretch, and of each branch that as a share of what is left over without it."""
        children = self.flow.children(self.prover.parts.layers[i].block)
        branches = {name: at_least_float32(self.prover.at(name, i)) for name in own}
        shape, others = next(iter(branches.values())).shape, list[Tensor]()
        for n in range(stretch.first, stretch.end):
            seen = children[n].wrote
            read = seen is not None and any(seen.key == x.key for later in children[n + 1 :] for x in later.reads)
            if seen is None or seen.value.shape != shape or read:
                continue
            if all(multiples(seen.value, branch) is None for branch in branches.values()):
                others.append(seen.value)
        known = [*stretch.before.unbind(-2), *others]
        gap = left_over(stretch.after, [*known, *branches.values()])
        without = {n: left_over(stretch.after, [*known, *(x for m, x in branches.items() if m != n)]) for n in own}
        least = max(gap, torch.finfo(stretch.after.dtype).eps)
        return gap, {name: least / max(rest, least) for name, rest in without.items()}


def left_over(after: Tensor, terms: Sequence[Tensor]) -> float:
    """What no sum of multiples of some terms [batch, pos, d_model] explains of a lane of `after`, as a share of it.

    Of the lane [batch, pos, lane, d_model] and the position where that is largest. From as many terms as half the
    equations nothing can be concluded: then everything is left over.
    """
    goal = after.detach().cpu().double().transpose(-1, -2)  # some devices have no float64
    columns = torch.stack([x.detach().cpu().double() for x in terms], dim=-1)
    if 2 * columns.shape[-1] > columns.shape[-2]:
        return 1.0
    found = torch.linalg.lstsq(columns, goal, driver="gelsd").solution
    return ratio((goal - columns @ found).norm(dim=-2), goal.norm(dim=-2))
