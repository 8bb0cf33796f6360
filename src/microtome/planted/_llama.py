"""A blank Llama to write circuits into, and the conventions that all of the hand-built models share.

The stream is cut into named parts (`Layout`). One direction, `one`, holds a constant so large that the root mean square
of the stream is about 1 wherever a few unit vectors are added to it: the norms then change nothing but in the third
digit, and weights mean what they say.

Rotary positions turn pair j of a head's dimensions by position * theta^(-2j/d_head). With theta = 1e8 the later pairs
stand still over any context here and carry content; the first ones turn fast and tell neighbours apart.

What a circuit does not use is filled with random weights that write into the part `spare`, which nobody reads, so that
a method has something to be wrong about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from microtome.model import Model
from microtome.model import open as open_model
from microtome.planted._folder import Planted

THETA = 1e8
SHARP = 60.0
"""Attention score of what a planted head looks at, above all else."""


class Layout:
    """Names for the parts of the stream: ``Layout(code=40, out=40)["code"]`` is the slice of the first 40.

    The part `one` follows, and `spare`: 8 directions, and what is missing to a multiple of 16.
    """

    def __init__(self, **sizes: int) -> None:
        self._slices: dict[str, slice] = {}
        at = 0
        together = sum(sizes.values()) + 9
        for name, size in (sizes | {"one": 1, "spare": 8 + -together % 16}).items():
            self._slices[name] = slice(at, at + size)
            at += size
        self.size = at

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]


@dataclass
class Bench:
    """A blank Llama under construction: which heads and neurons are taken, and where the parts of the stream are."""

    model: Model
    at: Layout
    rng: torch.Generator
    taken: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    neurons: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.model.anatomy.d_head

    def still(self, n: int) -> list[int]:
        """n dimensions of a head that no position turns."""
        half = self.d_head // 2
        slow = [j for j in range(half) if THETA ** (-j / half) < 1e-3]
        chosen = [*slow, *(j + half for j in slow)]
        assert n <= len(chosen), (n, len(chosen))
        return chosen[:n]

    def free_head(self, layer: int) -> int:
        """A head of a layer, drawn from those that are not taken."""
        free = [h for h in range(self.model.anatomy.n_heads) if (layer, h) not in self.taken]
        head = free[int(torch.randint(len(free), (), generator=self.rng))]
        self.taken.add((layer, head))
        return head

    def match(self, layer: int, head: int, q: Tensor, k: Tensor, sharp: float = SHARP) -> None:
        """Let a head score ``sharp * (x_q @ q) . (x_k @ k)``, for q and k [d_model, n]."""
        weights, dims = self.model.layers[layer], self.still(q.shape[1])
        weights.W_Q[head][:, dims] = q * sharp * self.d_head**0.5
        weights.W_K[head][:, dims] = k

    def move(self, layer: int, head: int, read: Tensor, write: Tensor) -> None:
        """Let a head move ``x @ read`` of where it looks to ``@ write``: [d_model, n] and [n, d_model]."""
        weights, n = self.model.layers[layer], read.shape[1]
        weights.W_V[head][:, :n] = read
        weights.W_O[head][:n] = write

    def neuron(self, layer: int, reads: Tensor, writes: Tensor, sharp: float = 40.0) -> int:
        """A neuron that adds `writes` where ``x @ reads`` is above 0, in full where it is 0.5. Returns its number."""
        number = self.neurons.get(layer, 0)
        self.neurons[layer] = number + 1
        weights = self.model.layers[layer]
        weights.W_gate[:, number] = reads * sharp
        weights.W_in[self.at["one"], number] = 1.0 / self.one
        weights.W_out[number] = writes / (sharp * 0.5)
        return number

    @property
    def one(self) -> float:
        """The constant in the direction `one`: it makes the mean square of a bare stream 1."""
        return float(self.at.size) ** 0.5

    def part(self, name: str) -> Tensor:
        """[d_model, n] that reads a part of the stream; its transpose writes it."""
        return torch.eye(self.at.size, dtype=self.model.dtype)[:, self.at[name]]

    def finish(self, truth: dict[str, Any]) -> Planted:
        """Fill what is left with distractors, prove the map, and hand over."""
        spare = self.at["spare"]
        for i, weights in enumerate(self.model.layers):
            free = [h for h in range(self.model.anatomy.n_heads) if (i, h) not in self.taken]
            for h in free:
                for matrix in (weights.W_Q, weights.W_K, weights.W_V):
                    matrix[h] = 0.1 * torch.randn(matrix[h].shape, generator=self.rng)
                write = weights.W_O[h][:, spare]
                weights.W_O[h][:, spare] = 0.03 * torch.randn(write.shape, generator=self.rng)
            rest = slice(self.neurons.get(i, 0), None)
            for matrix in (weights.W_gate, weights.W_in):
                matrix[:, rest] = 0.1 * torch.randn(matrix[:, rest].shape, generator=self.rng)
            write = weights.W_out[rest, spare]
            weights.W_out[rest, spare] = 0.03 * torch.randn(write.shape, generator=self.rng)
        return Planted(open_model(self.model.hf), truth)


def bench(layout: Layout, *, vocab: int, layers: int, heads: int, d_head: int, d_mlp: int, seed: int) -> Bench:
    """A Llama of zeros, but for the norms, whose gains are one, and the embedding's `one`."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=layout.size, num_hidden_layers=layers, num_attention_heads=heads,
        head_dim=d_head, intermediate_size=d_mlp, max_position_embeddings=256, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, bos_token_id=0, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        hf: Any = LlamaForCausalLM(config)
    hf.requires_grad_(False)
    for name, parameter in hf.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    made = Bench(open_model(hf, prove=False), layout, torch.Generator().manual_seed(seed))
    made.model.W_E[:, layout["one"]] = made.one
    return made


def codes(n: int, width: int, rng: torch.Generator) -> Tensor:
    """n random unit vectors of signs [n, width], all different."""
    signs = torch.randint(2, (4 * n, width), generator=rng) * 2.0 - 1.0
    kept = torch.unique(signs, dim=0)
    order = torch.randperm(len(kept), generator=rng)[:n]
    return kept[order] / width**0.5
