"""The graph of a model: what can send along the residual stream, what reads it, and which pairs are edges.

A sender writes to the stream: the embedding, a head, an MLP. A receiver reads it: the query, key or value input of one
query head, an MLP, or the logits. Everything read was written before, so a pair is an edge where the sender comes
earlier. Keys and values count once per query head even where heads share them, since each head reads them separately.

Formula:  with L layers of H heads, one after the other:  sum_l (1 + (H+1) l) 3H + sum_l (1 + (H+1) l + H) + 1 + L (H+1)
          edges. In a parallel block an MLP does not see its own layer's heads, which removes H edges per layer.
Check:    the count that is published for GPT-2 small, 32,491; tests/laws/test_graph.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from microtome.model import Model
from microtome.shown import shown
from microtome.sweep import require_edges

INPUTS = ("attn.q", "attn.k", "attn.v")


@shown
@dataclass(frozen=True, eq=False)
class Graph:
    """Senders, receivers and edges, each by name.

    Attributes:
        senders: `embed`, then layer by layer every head ``"3.attn.z[5]"`` and the MLP ``"3.mlp_out"``.
        receivers: layer by layer all queries ``"9.attn.q[2]"``, all keys, all values and ``"9.mlp.in"``; then `final`.
        mask: [sender, receiver] True where there is an edge.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    mask: Bool[Tensor, "sender receiver"]

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.mask.sum())


def graph(model: Model) -> Graph:
    """List what writes to the residual stream, what reads it, and which pairs are edges.

    Raises:
        SiteError: the stream is not a sum over its parts, as norms stand on it.
    """
    a = model.anatomy
    require_edges(a)
    return graph_of_size(a.n_layers, a.n_heads, parallel=a.parts.form == "parallel")


def graph_of_size(n_layers: int, n_heads: int, *, parallel: bool) -> Graph:
    """List the same for any model of this size; parallel: an MLP does not read the heads of its own layer."""
    layers, heads = range(n_layers), range(n_heads)
    senders, receivers = ["embed"], []
    for layer in layers:
        senders += [f"{layer}.attn.z[{h}]" for h in heads] + [f"{layer}.mlp_out"]
        receivers += [f"{layer}.{name}[{h}]" for name in INPUTS for h in heads] + [f"{layer}.mlp.in"]
    receivers.append("final")
    # How many of the senders stand before each receiver: they are listed in the order in which they write.
    before: list[int] = []
    for layer in layers:
        earlier = 1 + (n_heads + 1) * layer
        before += [earlier] * 3 * n_heads + [earlier + (0 if parallel else n_heads)]
    before.append(len(senders))
    mask = torch.arange(len(senders)).unsqueeze(1) < torch.tensor(before).unsqueeze(0)
    return Graph(tuple(senders), tuple(receivers), mask)
