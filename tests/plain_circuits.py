"""A circuit run the slow way: plain hooks on a Llama in which every head has its own keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import LlamaForCausalLM

Out = Mapping[tuple[str, str], bool]


class PlainCircuit:
    """Runs a Llama while each receiver reads what edges that are out give instead of what their senders write.

    Edges are named as in `mt.explain.graph`: ("0.attn.z[2]", "1.attn.k[0]").
    """

    def __init__(self, hf: LlamaForCausalLM, names: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        self.hf, (self.senders, self.receivers) = hf, names
        self.writes: dict[str, Tensor] = {}
        self.other: Mapping[str, Tensor] = {}
        self.out: set[tuple[str, str]] = set()

    def _read(self, receiver: str, stream: Tensor) -> Tensor:
        for sender in self.senders:
            if (sender, receiver) in self.out:
                stream = stream + self.other[sender] - self.writes[sender]
        return stream

    def __call__(self, tokens: Tensor, out: set[tuple[str, str]], other: Mapping[str, Tensor]) -> Tensor:
        """Logits [batch, pos, vocab]; `writes` holds what each sender wrote."""
        self.out, self.other, self.writes = out, other, {}
        handles: list[Any] = []
        for i, block in enumerate(self.hf.model.layers):
            handles += self._layer(i, block)
        handles.append(self.hf.model.norm.register_forward_pre_hook(lambda m, a: (self._read("final", a[0]), *a[1:])))
        with torch.no_grad():
            logits = self.hf(input_ids=tokens).logits
        for handle in handles:
            handle.remove()
        return logits

    def _layer(self, i: int, block: Any) -> list[Any]:
        attention, width, stream = block.self_attn, block.self_attn.head_dim, list[Tensor]()
        heads = attention.q_proj.weight.shape[0] // width

        def enter(module: Any, args: Any) -> None:
            stream.append(args[0])
            if i == 0:
                self.writes["embed"] = args[0]

        def projected(slot: str) -> Any:
            def read(module: Any, args: Any, output: Tensor) -> Tensor:
                new = []
                for h in range(heads):
                    part = slice(h * width, (h + 1) * width)
                    bias = None if module.bias is None else module.bias[part]
                    x = block.input_layernorm(self._read(f"{i}.attn.{slot}[{h}]", stream[-1]))
                    new.append(linear(x, module.weight[part], bias))
                return torch.cat(new, dim=-1)

            return read

        def mixed(module: Any, args: Any) -> None:
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                self.writes[f"{i}.attn.z[{h}]"] = linear(args[0][..., part], module.weight[:, part])

        def wrote(module: Any, args: Any, output: Tensor) -> None:
            self.writes[f"{i}.mlp_out"] = output

        found = [block.register_forward_pre_hook(enter), attention.o_proj.register_forward_pre_hook(mixed)]
        found += [getattr(attention, f"{slot}_proj").register_forward_hook(projected(slot)) for slot in "qkv"]
        found.append(
            block.post_attention_layernorm.register_forward_pre_hook(lambda m, a: (self._read(f"{i}.mlp.in", a[0]),))
        )
        return [*found, block.mlp.register_forward_hook(wrote)]


def acdc(logits_of: Any, edges: list[tuple[str, str]], cost: Any, tau: float) -> tuple[set[tuple[str, str]], int]:
    """The literal algorithm: try each edge in order, and leave it out for good if that costs less than tau.

    Args:
        logits_of: logits when a set of edges is out.
        edges: in the order in which they are tried.
        cost: of logits.
        tau: what one edge may cost.

    Returns:
        The edges that are out, and how many forwards it took.
    """
    out: set[tuple[str, str]] = set()
    now = cost(logits_of(out))
    for edge in edges:
        new = cost(logits_of(out | {edge}))
        if new - now < tau:
            out, now = out | {edge}, new
    return out, 1 + len(edges)
