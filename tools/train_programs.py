"""Train transformers with ordinary weights whose circuit is that of a compiled program, and write them.

    python tools/train_programs.py            all of them, or those that are named; minutes each on two cores

Each node of the compiled program is given a place in a larger network: a head a head, an MLP an MLP. Strict interchange
intervention training (Gupta et al., "InterpBench", 2024, arXiv 2407.14494; after Geiger et al., "Inducing Causal
Structure for Interpretable Neural Networks", 2022, arXiv 2112.00826) then asks, of pairs of a base and a source input:

    behaviour     the network says what the program says
    interchange   with a node's activations from the source, it says what the program says with that node's from there
    strictness    with the activations of a place that was given to no node from the source, it says what it said

Departs: the compiled transformer itself is the program that is intervened on; activations are exchanged at all
positions at once; steps, rate and the weight of the strictness loss are ours.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import microtome as mt
from microtome import planted

HERE = Path(__file__).resolve().parents[1] / "src" / "microtome" / "planted" / "trained"
PROGRAMS = {"repeats": 1000, "histogram": 4000, "previous_token": 1000}
BATCH, RATE, STRICT, SEED = 64, 4e-3, 1.0, 0
IDLE = 3  # places without a node that are disturbed in each step, one at a time


def network(high: mt.Model, seed: int) -> mt.Model:
    """A network of one layer more than the program, with four heads, GELU and layer norms."""
    a = high.anatomy
    config = planted.PlantedConfig(
        vocab_size=a.d_vocab, output_size=a.size(mt.anatomy.Site("logits"), "vocab"), hidden_size=40,
        num_hidden_layers=a.n_layers + 1, num_attention_heads=4, head_dim=10, intermediate_size=64,
        max_position_embeddings=a.n_ctx, hidden_act="gelu", normalization="layer", attention_scale=10**-0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    hf: Any = planted.PlantedForCausalLM(config)
    for module in hf.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.7)
    return mt.open(hf)


def places(high: planted.Planted, low: mt.Model, seed: int) -> dict[str, str]:
    """For each head and MLP of the program's circuit, a place in the network: of the same layer and kind."""
    rng, found = Random(seed), {}
    for layer in range(high.model.anatomy.n_layers):
        free = list(range(low.anatomy.n_heads))
        for node in high.truth["nodes"]:
            head = planted.head_of(node)
            if head is not None and head[0] == layer:
                found[node] = f"L{layer}.head.{free.pop(rng.randrange(len(free)))}"
            elif planted.mlp_of(node) == layer:
                found[node] = node
    return found


CAPTURE = ["*.attn.z", "*.mlp_out"]


def said(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the program says at every position but BOS [batch, pos], and where it says anything."""
    return logits[:, 1:].argmax(-1), logits[:, 1:].amax(-1) > 0.5


def loss(logits: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy where the program says something, in nats."""
    return nn.functional.cross_entropy(logits[:, 1:][wanted[1]], wanted[0][wanted[1]])


class Repeated:
    """A run whose rows are there several times, for batches in which each condition has rows of its own."""

    def __init__(self, run: mt.Run, times: int) -> None:
        self.run, self.times = run, times

    def whole(self, site: mt.anatomy.Site) -> Tensor:
        """All of a site, repeated along the batch."""
        x = self.run.whole(site)
        return x.repeat(self.times, *[1] * (x.dim() - 1))


def exchange(node: str, source: mt.Run, block: int, blocks: int) -> mt.edit.Patch:
    """The activations of a node from the source, in one block of the rows."""
    rows = tuple(range(block * BATCH, (block + 1) * BATCH))
    return mt.edit.Patch(planted.sender_of(node), Repeated(source, blocks), rows=rows)


def train(name: str, steps: int) -> None:
    high = planted.program(name)
    low = network(high.model, SEED)
    at = places(high, low, SEED)
    outside = [n for n in planted.nodes(low)[2:-1] if n not in at.values()]
    low.hf.requires_grad_(True)
    optimiser = torch.optim.AdamW(low.hf.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    rng, started = Random(SEED), time.time()
    nodes = list(at)
    for step in range(steps):
        length = rng.randrange(4, high.model.anatomy.n_ctx + 1)
        c = planted.corruptions(high, BATCH, seed=step, length=length)
        node, idle = nodes[step % len(nodes)], rng.sample(outside, IDLE)
        source_high = high.model.run(c.corrupt, capture=CAPTURE)
        edits = [exchange(node, source_high, 1, 2)]
        wanted, changed = map(said, high.model.run(c.clean.repeat(2, 1), edits=edits).logits.chunk(2))
        source = low.run(c.corrupt, capture=CAPTURE, grad=True)
        edits = [exchange(n, source, block, IDLE + 2) for block, n in enumerate([at[node], *idle], start=1)]
        logits = low.run(c.clean.repeat(IDLE + 2, 1), edits=edits, grad=True).logits
        plain, inside, *beside = logits.chunk(IDLE + 2)
        behaviour, inter = loss(plain, wanted), loss(inside, changed)
        strict = torch.stack([loss(x, wanted) for x in beside]).mean()
        optimiser.zero_grad()
        (behaviour + inter + STRICT * strict).backward()
        nn.utils.clip_grad_norm_(low.hf.parameters(), 1.0)
        optimiser.step()
        rate.step()
        if step % 250 == 0 or step == steps - 1:
            parts = " ".join(f"{float(x.detach()):.4f}" for x in (behaviour, inter, strict))
            print(f"{name} {step:5} behaviour, interchange, strictness {parts} nats, {time.time() - started:.0f} s")
    low.hf.requires_grad_(False)
    write(name, high, low, at)


def write(name: str, high: planted.Planted, low: mt.Model, at: dict[str, str]) -> None:
    inside = ["embed", *(["pos_embed"] if "pos_embed" in high.truth["nodes"] else []), *at.values(), "output"]
    truth = {
        **{k: high.truth[k] for k in ("program", "vocabulary", "bos", "outputs")},
        "nodes": [n for n in planted.nodes(low) if n in inside],
        "places": at,
        "source": "trained by tools/train_programs.py",
        "seed": SEED,
    }
    shutil.rmtree(HERE / name, ignore_errors=True)
    planted.save(low, HERE / name, truth=truth)
    accuracy = planted.interchange_accuracy(planted.load(HERE / name), 256, seed=10**6)
    print(name, {k: f"{v:.4f}" for k, v in accuracy.items()})


if __name__ == "__main__":
    for program in sys.argv[1:] or PROGRAMS:
        train(program, PROGRAMS[program])
