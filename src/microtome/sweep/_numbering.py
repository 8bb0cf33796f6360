"""Senders and receivers by number, and which of them a change reaches along the edges of a circuit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from microtome.anatomy import Anatomy

Kept = Bool[Tensor, "row sender receiver"]


@dataclass(frozen=True)
class Numbering:
    """Numbers of a graph.

    Senders are the parts of the embedding, then each layer's heads and MLP; receivers each layer's queries, keys,
    values and MLP, then the logits.

    Attributes:
        n_layers, n_heads: of the model.
        embeds: how many parts the embedding has.
        joined: layers whose heads are behind one norm, so that a change of one is one of all.
        parallel: an MLP does not read the heads of its layer.
    """

    n_layers: int
    n_heads: int
    embeds: int
    joined: tuple[bool, ...]
    parallel: bool

    @classmethod
    def of(cls, a: Anatomy, embeds: int) -> Numbering:
        """Those of a model."""
        joined = tuple(layer.attn_post_norm is not None for layer in a.parts.layers)
        return cls(a.n_layers, a.n_heads, embeds, joined, a.parts.form == "parallel")

    @property
    def senders(self) -> int:
        """How many there are."""
        return self.embeds + self.n_layers * (self.n_heads + 1)

    @property
    def receivers(self) -> int:
        """How many there are; the last is the logits."""
        return self.n_layers * (3 * self.n_heads + 1) + 1

    def heads(self, layer: int) -> slice:
        """The heads of a layer, as senders."""
        first = self.embeds + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp(self, layer: int) -> int:
        """The MLP of a layer, as a sender."""
        return self.heads(layer).stop

    def inputs(self, layer: int) -> slice:
        """Queries, keys and values of a layer, as receivers."""
        first = layer * (3 * self.n_heads + 1)
        return slice(first, first + 3 * self.n_heads)

    def mlp_in(self, layer: int) -> int:
        """The MLP of a layer, as a receiver."""
        return self.inputs(layer).stop

    def before(self, receiver: int) -> int:
        """How many senders come before a receiver."""
        if receiver == self.receivers - 1:
            return self.senders
        layer, place = divmod(receiver, 3 * self.n_heads + 1)
        mlp = place == 3 * self.n_heads and not self.parallel
        return self.heads(layer).stop if mlp else self.heads(layer).start

    @property
    def edges(self) -> Bool[Tensor, "sender receiver"]:
        """All pairs that are edges."""
        before = torch.tensor([self.before(v) for v in range(self.receivers)])
        return torch.arange(self.senders).unsqueeze(1) < before

    def needed(self, kept: Kept) -> Bool[Tensor, "row sender"]:
        """[row, sender] Whether there is a way from a sender to the logits along the edges that are kept."""
        n, h = len(kept), self.n_heads
        senders = torch.zeros(n, self.senders, dtype=torch.bool, device=kept.device)
        receivers = torch.zeros(n, self.receivers, dtype=torch.bool, device=kept.device)
        receivers[:, -1] = True
        for layer in reversed(range(self.n_layers)):
            mlp, after = self.mlp(layer), self.mlp_in(layer) + 1
            senders[:, mlp] = (kept[:, mlp, after:] & receivers[:, after:]).any(-1)
            receivers[:, after - 1] = senders[:, mlp]
            own = self.heads(layer)
            read = (kept[:, own, after - 1 :] & receivers[:, None, after - 1 :]).any(-1)
            senders[:, own] = read.any(-1, keepdim=True).expand(-1, h) if self.joined[layer] else read
            receivers[:, self.inputs(layer)] = senders[:, own].repeat(1, 3)
        first = kept[:, : self.embeds] & receivers[:, None]
        senders[:, : self.embeds] = first.any(-1)
        return senders

    def changed(
        self,
        kept: Kept,
        flipped: Bool[Tensor, "row receiver"],
        needed: Bool[Tensor, "row sender"],
        known: Bool[Tensor, " sender"],
    ) -> Bool[Tensor, "row sender"]:
        """[row, sender] Whether what a sender writes must be computed anew.

        Args:
            kept: the edges of each row.
            flipped: receivers of which an edge is kept that was not, or the reverse.
            needed: senders that reach the logits; others are left as they are.
            known: senders whose write in the run before is one of its circuit.
        """
        n, h = len(kept), self.n_heads
        found = torch.zeros(n, self.senders, dtype=torch.bool, device=kept.device)
        for layer in range(self.n_layers):
            own, into = self.heads(layer), self.inputs(layer)
            hit = flipped[:, into]
            if bool(found.any()):
                hit = hit | (kept[:, : own.start, into] & found[:, : own.start, None]).any(1)
            head = (hit.unflatten(1, (3, h)).any(1) | ~known[own]) & needed[:, own]
            found[:, own] = head.any(-1, keepdim=True).expand(-1, h) if self.joined[layer] else head
            mlp, read = self.mlp(layer), self.mlp_in(layer)
            hit = flipped[:, read] | (kept[:, : own.stop, read] & found[:, : own.stop]).any(1)
            found[:, mlp] = (hit | ~known[mlp]) & needed[:, mlp]
        return found
