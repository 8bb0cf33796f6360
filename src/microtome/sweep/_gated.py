"""Circuits whose edges are in by a share: what every receiver reads is differentiable in a gate for each edge.

Formula:  x_v = stream_v(clean) + sum over u of (other_u - write_u(clean)) + g_uv (write_u(row) - other_u),
          g_uv the gate of the edge u -> v; `other` is what the engine has, or a constant for each sender.
          At gates of 1 the slope of a metric is minus the first-order effect of taking each edge out.
Cost:     a forward takes about two of the model; all edges of a receiver are one product with what senders write.
Check:    gates of 0 and 1 are the rows of `Circuits`, and their slope is that of the estimates and of differences;
          tests/laws/test_gates.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.sweep._branches import Layer
from microtome.sweep._circuits import Circuits, of_heads

HELD = 6
"""Copies of what the inputs of heads read that a graph holds: the sum, its norm, and what that computes with."""


def gated(
    engine: Circuits,
    gates: Float[Tensor, "sender receiver"],
    prompts: Int[Tensor, " row"] | None = None,
    constants: Float[Tensor, "sender d_model"] | None = None,
) -> Shaped[Tensor, " row *of"]:
    """The metric of prompts whose edges are in by their gates, with its graph where gradients are on.

    Args:
        engine: the prompts.
        gates: 0 to 1 for every edge; others are not read.
        prompts: their numbers; all of them by default.
        constants: what edges that are out give at every position, in the place of the engine's `other`.
    """
    numbers = torch.arange(len(engine.tokens), device=engine.own.device) if prompts is None else prompts
    return _Gated(engine, gates, numbers, constants).run()


def bytes_of_gated(engine: Circuits) -> int:
    """What a prompt holds with its graph, about."""
    a, n, length = engine.model.anatomy, engine.numbering, int(engine.tokens.shape[1])
    layer = a.d_model * (HELD * (3 * a.n_heads + 1)) + 6 * a.d_mlp + 3 * a.n_heads * length
    return 4 * length * (n.n_layers * layer + 8 * n.senders * a.d_model)


class _Gated:
    """Rows under way through the layers."""

    def __init__(self, engine: Circuits, gates: Tensor, prompts: Tensor, constants: Tensor | None) -> None:
        self.engine, self.n, self.prompts = engine, engine.numbering, prompts
        self.gates = gates.to(engine.own) * engine.edges
        self.whole = len(prompts) == len(engine.tokens) and bool((prompts.diff() > 0).all())
        self.constants = None if constants is None else constants.to(engine.own)
        self.written: list[tuple[int, Tensor]] = []
        """(first sender, [row, sender, pos d_model] what they write more than edges that are out give)."""
        embeds = self.n.embeds
        self._wrote(0, self._of_rows(engine.own)[:, :embeds])

    def _of_rows(self, x: Float[Tensor, " prompt *of"]) -> Float[Tensor, " row *of"]:
        return x if self.whole else x[self.prompts]

    def run(self) -> Shaped[Tensor, " row *of"]:
        """The values."""
        e = self.engine
        read = e._read[self.prompts]  # pyright: ignore[reportPrivateUsage]
        over, ids = e._over, e._ids  # pyright: ignore[reportPrivateUsage]
        every = [True] * self.n.n_layers
        logits = e._branches.run(  # pyright: ignore[reportPrivateUsage]
            e.tokens[:1], every, self._layer, self._end, read, ids, grad=torch.is_grad_enabled()
        )
        return over.read(logits, self.prompts)

    def _layer(self, layer: Layer) -> None:
        """Heads and MLP of a layer."""
        i, e, n = layer.index, self.engine, self.n
        weights, dtype = e.model.layers[i], e.model.dtype
        x = self._read(range(n.inputs(i).start, n.inputs(i).stop)).unflatten(1, (3, n.n_heads)).to(dtype)
        x = x if weights.attn_norm is None else weights.attn_norm.module(x)
        z = at_least_float32(layer.heads(x, range(n.n_heads), own=e.own_weights))
        self._wrote(n.heads(i).start, of_heads(e.model, i, z))
        x = self._read([n.mlp_in(i)])[:, 0].to(dtype)
        x = x if weights.mlp_norm is None else weights.mlp_norm.module(x)
        self._wrote(n.mlp(i), at_least_float32(layer.mlp(x)).unsqueeze(1))

    def _wrote(self, first: int, new: Float[Tensor, "row sender pos d_model"]) -> None:
        """Keep what senders write; blocks of like size become one, so that few products read them all."""
        mine = slice(first, first + new.shape[1])
        out = self._of_rows(self.engine.other[:, mine]) if self.constants is None else self.constants[mine, None]
        self.written.append((first, (new - out).flatten(2)))
        while len(self.written) > 1 and self.written[-2][1].shape[1] <= self.written[-1][1].shape[1]:
            _, last = self.written.pop()
            start, before = self.written.pop()
            self.written.append((start, torch.cat([before, last], dim=1)))

    def _read(self, receivers: Sequence[int]) -> Float[Tensor, "row receiver pos d_model"]:
        """What receivers of one branch read."""
        before = self.n.before(receivers[0])
        gates = self.gates[:, receivers[0] : receivers[-1] + 1].T  # [receiver, sender]
        none = self._of_rows(self._of_none(receivers[0], before))
        x = none.flatten(1).unsqueeze(1)
        for first, more in self.written:
            by = gates[:, first : first + more.shape[1]].expand(len(x), -1, -1)
            x = torch.baddbmm(x, by, more)
        return x.unflatten(2, none.shape[1:])

    def _of_none(self, receiver: int, before: int) -> Float[Tensor, "prompt pos d_model"]:
        """What a receiver reads where all edges are out."""
        e = self.engine
        if self.constants is None:
            return e.stream(receiver) + e.away[:, :before].sum(1)
        return e.stream(receiver) - e.own[:, :before].sum(1) + self.constants[:before].sum(0)

    def _end(self) -> Float[Tensor, "row pos d_model"]:
        """What the logits read."""
        return self._read([self.n.receivers - 1])[:, 0].to(self.engine.model.dtype)
