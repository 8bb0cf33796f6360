"""Exchanges between two inputs of a planted network: the activations of a node, or what one node writes for another.

Formula:  node  its activations, at all positions, are those that it has in the other input;
          edge  input x of the receiver is computed of the stream r + (u' - u), r as in the base run, u and u' what the
                sender writes there and in the other input; all else reads what it read.
          From `pos_embed` an edge carries shuffled positions, from all others what other tokens give.
Check:    equal to a sweep's own edges; tests/planted/test_train.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.edit import Patch
from microtome.model import Model
from microtome.planted._corruptions import Corruptions
from microtome.planted._truth import EdgeName, head_of, mlp_of, receiver_of, sender_of
from microtome.run import Run

WRITTEN = ("*.attn.z", "*.mlp_out")


@dataclass(frozen=True, eq=False)
class Exchange:
    """Runs of base and source inputs, from which exchanges are made.

    Attributes:
        model: a planted network.
        inputs: clean is the base, corrupt the source; positions are those that `pos_embed` exchanges.
        base, source: runs of both, with their graphs where weights are trained.
    """

    model: Model
    inputs: Corruptions
    base: Run
    source: Run

    @classmethod
    def of(cls, model: Model, inputs: Corruptions, *, grad: bool = False) -> Exchange:
        """Run base and source."""
        last = f"{model.anatomy.n_layers - 1}.resid_post"
        streams = ["*.resid_pre", "*.resid_mid", last]
        base = model.run(inputs.clean, capture=[*WRITTEN, *streams], grad=grad)
        return cls(model, inputs, base, model.run(inputs.corrupt, capture=WRITTEN, grad=grad))

    def node(self, name: str, block: int = 0, blocks: int = 1) -> Patch:
        """The edit that gives a node its activations of the source, in one of some blocks of as many rows as inputs."""
        address = sender_of(name)
        site = address.partition("[")[0]
        return self._put(address, site, self.source[site], block, blocks)

    def edge(self, name: EdgeName, block: int = 0, blocks: int = 1) -> Patch:
        """The edit that gives the input of a node what the sender writes in the source, in one of some blocks."""
        sender, receiver, slot = name
        change = self._written(sender, other=True) - self._written(sender, other=False)
        address, trunk = receiver_of(receiver, slot), self.model.hf.model
        head, layer = head_of(receiver), mlp_of(receiver)
        if head is not None:
            part = trunk.layers[head[0]]
            read = part.input_layernorm(self.base[f"{head[0]}.resid_pre"] + change)
            value = getattr(part.self_attn, f"{slot}_proj")(read).unflatten(-1, (self.model.anatomy.n_heads, -1))
        elif layer is not None:
            value = trunk.layers[layer].post_attention_layernorm(self.base[f"{layer}.resid_mid"] + change)
        else:
            value = trunk.norm(self.base[f"{self.model.anatomy.n_layers - 1}.resid_post"] + change)
        return self._put(address, address.partition("[")[0], value, block, blocks)

    def _written(self, node: str, *, other: bool) -> Float[Tensor, "batch pos d_model"]:
        """What a node writes in the base, or in the source."""
        run, trunk = self.source if other else self.base, self.model.hf.model
        if node == "embed":
            return trunk.embed_tokens(self.inputs.corrupt if other else self.inputs.clean)
        if node == "pos_embed":
            return trunk.embed_positions(self.inputs.positions if other else _own(self.inputs.clean))
        head = head_of(node)
        if head is None:
            return run[sender_of(node)]
        z: Tensor = run[f"{head[0]}.attn.z"][:, :, head[1]]
        width = z.shape[-1]
        weight: Tensor = trunk.layers[head[0]].self_attn.o_proj.weight
        return z @ weight[:, head[1] * width : (head[1] + 1) * width].T

    def _put(self, address: str, site: str, value: Tensor, block: int, blocks: int) -> Patch:
        n = len(value)
        whole: Any = value.repeat(blocks, *[1] * (value.dim() - 1)) if blocks > 1 else value
        rows = tuple(range(block * n, (block + 1) * n)) if blocks > 1 else None
        return Patch(address, {site: whole}, rows=rows)


def _own(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
