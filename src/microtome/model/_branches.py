"""The identities of branches: what they read of the stream, and that what a block adds to it is what they write.

A branch is added to the stream, to the stream times a factor, or to what a norm makes of the stream; with it a constant
may be added, and more behind it: what was seen says which. Where the stream is not the plain sum of its branches, the
map says what else there is, so that methods which take such sums apart refuse it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from microtome.anatomy import NormWeights, at_least_float32, factors_of
from microtome.model._identities import BRANCHES, IdentityCheck, Prover, named
from microtome.model._sized import Sized, ratio
from microtome.run.hook import trace


class Branches:
    """Checks the branches of one model."""

    def __init__(self, prover: Prover) -> None:
        self.prover = prover

    def add(self, i: int) -> None:
        """What a block adds is what its branches write; what fails names the branch, where it can be told."""
        prover, where, layer = self.prover, f"{i}.resid_post", self.prover.parts.layers[i]
        pre, post = prover.at("resid_pre", i), prover.at("resid_post", i)
        mid = prover.at("resid_mid", i) if prover.has("resid_mid", i) else None
        names = [name for name in BRANCHES if prover.has(name, i)]
        branches = [prover.at(name, i) for name in names]
        if any(branch.shape != pre.shape for branch in branches) or post.shape != pre.shape:
            note = f"a stream of {pre.shape[-1]} is not the sum of branches of {prover.a.d_model}"
            fall = named(i, *names, "sum")
            found = IdentityCheck("2 residual", where, "fails", float("inf"), prover.tolerance, note, fall)
            prover.checks.append(found)
            return
        if prover.parts.form == "post_norm" and mid is not None:
            first, second = (Sized.of(x) + Sized.of(y) for x, y in zip((pre, mid), branches, strict=True))
            prover.same("2 residual", f"{i}.resid_mid", mid, prover.behind(layer.attn_post_norm, first))
            prover.same("2 residual", where, post, prover.behind(layer.mlp_post_norm, second))
            return
        end = self.inputs.get(layer.until or "", post)
        if layer.until is not None:
            prover.skip("2 residual", f"{i}.sum", "more is added behind its branches")
        if mid is not None and len(branches) < 2:
            prover.fail(
                "2 residual", f"{i}.resid_mid", prover.tolerance, "what is added before or behind it is not seen"
            )
        if mid is None or len(branches) < 2:
            start = self._base(i, layer.post_base, pre)
            self._sums(where, (end, start, *branches), named(i, *names, "sum"))
            return
        start, then = self._base(i, layer.mid_base, pre), self._base(i, layer.post_base, mid)
        fall_first, fall_second = (*names[:-1], "sum"), (names[-1], "sum")
        gaps = prover.added(mid, start, *branches[:-1]), prover.added(end, then, branches[-1])
        if min(gaps) > prover.tolerance:
            whole = prover.added(end, pre, *branches)
            fall_first = fall_second = ("resid_mid",) if whole <= prover.tolerance else ("resid_mid", *names, "sum")
        self._sums(f"{i}.resid_mid", (mid, start, *branches[:-1]), named(i, *fall_first))
        self._sums(where, (end, then, branches[-1]), named(i, *fall_second))

    def _base(self, i: int, norm: str | None, x: Tensor) -> Tensor:
        """What branches are added to: the stream x, or what a norm makes of it."""
        if norm is None:
            return x
        self.prover.skip("2 residual", f"{i}.sum", "the stream itself is normed")
        with torch.no_grad():
            return self.prover.module(norm)(x)

    def _sums(self, where: str, terms: tuple[Tensor, ...], fall: tuple[str, ...]) -> None:
        """Conclude that the first of some terms is the sum of the others, or what it is besides."""
        prover, layer = self.prover, where.partition(".")[0]
        gap = prover.added(*terms)
        for note, others in self._besides(terms) if gap > prover.tolerance else ():
            again = prover.added(*others)
            if again <= prover.tolerance:
                prover.skip("2 residual", f"{layer}.sum", note)
                gap = again
                break
        prover.conclude("2 residual", where, gap, prover.tolerance, fall)

    def _besides(self, terms: tuple[Tensor, ...]) -> list[tuple[str, tuple[Tensor, ...]]]:
        """Ways in which a stream is more than the sum of itself and its branches, with the terms in each."""
        after, before, *branches = (at_least_float32(x) for x in terms)
        found: list[tuple[str, tuple[Tensor, ...]]] = []
        factor = factors_of(after, before, branches[0]) if len(branches) == 1 else None
        if factor is not None and float(factor.abs().max()) > self.prover.tolerance:  # else the branch is the stream
            note = f"the stream itself is scaled, by {float(factor.mean()):.3g} in the mean"
            found.append((note, (after, before * factor.to(before.dtype), *branches)))
        if branches:
            constant = (after - before - torch.stack(branches).sum(0)).flatten(0, -2).mean(0)
            found.append(("a constant is added with its branches", (after, before + constant, *branches)))
        return found

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What some modules read, by their paths, in one more forward: norms of wide attention, what ends a branch."""
        prover, layers = self.prover, self.prover.parts.layers
        norms = [
            layer.attn_norm.path for i, layer in enumerate(layers) if layer.attn_norm is not None and self._wide(i)
        ]
        paths = dict.fromkeys([*norms, *(layer.until for layer in layers if layer.until is not None)])
        if not paths:
            return {}
        flow = trace(prover.model.hf, prover.run.tokens, paths)
        calls = {path: flow.first(path) for path in paths}  # it may be called again, on something else
        return {path: call.read.value for path, call in calls.items() if call is not None and call.read is not None}

    def _wide(self, i: int) -> bool:
        """Whether attention reads another width than the stream's."""
        prover = self.prover
        return prover.has("attn.in", i) and prover.at("attn.in", i).shape[-1] != prover.at("resid_pre", i).shape[-1]

    def read(self, i: int) -> None:
        """What a branch reads is the norm of the stream before it; attention may read more, side by side with that."""
        prover, weights, layer = self.prover, self.prover.model.layers[i], self.prover.parts.layers[i]
        pre = read = prover.at("resid_pre", i)
        if self._wide(i):
            read = self.inputs.get("" if layer.attn_norm is None else layer.attn_norm.path, pre)
            width = pre.shape[-1]
            read = read if any(torch.equal(x, pre) for x in (read[..., :width], read[..., -width:])) else pre
        if layer.attn is not None:
            self._norm(i, "attn", weights.attn_norm, read)
        if prover.has("mlp.in", i):
            between = prover.parts.form != "parallel" and prover.has("resid_mid", i)
            self._norm(i, "mlp", weights.mlp_norm, prover.at("resid_mid", i) if between else pre)

    def _norm(self, i: int, branch: str, norm: NormWeights | None, x: Tensor) -> None:
        """What a branch reads is the norm of the stream x, or what a gate around that norm makes of it."""
        prover, where = self.prover, f"{i}.{branch}.in"
        seen = prover.at(f"{branch}.in", i)
        if seen.shape != x.shape:
            why = f"a stream of {x.shape[-1]} is read otherwise than through a norm"
            prover.skip("7 weights", where, why)
            return
        prover.same("7 weights", where, seen, prover.read(norm, x))
        around = "" if norm is None else norm.norm.path.rpartition(".")[0]
        gated = around.startswith(prover.parts.layers[i].block + ".")
        if norm is None or prover.checks[-1].status == "holds" or not gated:
            return
        with torch.no_grad():
            given, whole = norm.module(x), at_least_float32(prover.module(around)(x))
        if ratio((at_least_float32(seen) - whole).abs(), whole.abs()) <= prover.tolerance:
            prover.checks.pop()
            prover.same("7 weights", where, given, prover.read(norm, x))
            why = "what the norm gives is multiplied by a gate before it is read"
            prover.skip("7 weights", f"{i}.{branch}_norm", why)
