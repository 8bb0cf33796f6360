"""Trees in which a path is to be found, and a small causal transformer that learns to find it.

A prompt names the edges of a tree in random order, one token each, then a node and a goal below it; the answer is the
node's child on the way to the goal. Whoever goes back from the goal, parent by parent, reads one edge after the other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from microtome.context import current, seed_of
from microtome.errors import ArgumentError, error
from microtome.model import open as open_model
from microtome.planted._folder import Planted
from microtome.planted._network import PlantedConfig, PlantedForCausalLM
from microtome.planted._train import check_sizes
from microtome.shown import shown
from microtome.training import fit

FARTHEST = 4
"""Edges between a node and its goal, at most."""


@shown
@dataclass(frozen=True, eq=False)
class Paths:
    """Prompts of trees.

    Attributes:
        tokens: [prompt, pos] the edges, then the node, then the goal. Of `n` nodes, the edge from a to b is the token
            n + n a + b, and the node a the token a.
        answers: [prompt] the child of the node on the way to the goal.
        distance: [prompt] edges from the node to the goal.
        chain: [prompt, step] the goal, its parent, and so on as far as the root, which is repeated.
        read: [prompt, edge] the position of the edge from the parent of chain[edge] to chain[edge]; -1 behind the root.
        branches: [prompt] children of the node: with one, the answer is known without the goal.
    """

    tokens: Int[Tensor, "prompt pos"]
    answers: Int[Tensor, " prompt"]
    distance: Int[Tensor, " prompt"]
    chain: Int[Tensor, "prompt step"]
    read: Int[Tensor, "prompt edge"]
    branches: Int[Tensor, " prompt"]


def paths(n: int, seed: int, nodes: int = 8) -> Paths:
    """Draw random trees of at most two children a node, and what is asked of them, as far as four edges apart.

    Args:
        n: how many prompts.
        seed: of trees, goals and nodes.
        nodes: of each tree.

    Returns:
        `Paths`.

    Raises:
        ArgumentError: there are no prompts, or too few nodes for a path of four edges.
    """
    for name, x, least in (("n", n, 1), ("nodes", nodes, FARTHEST + 1)):
        if x < least:
            raise error(ArgumentError, f"{name} of the trees", got=x, allowed=f"{least} or more")
    rng = torch.Generator().manual_seed(seed)
    every = torch.arange(n)
    order = torch.rand(n, nodes, generator=rng).argsort(1)  # labels, from the root on
    above, children = torch.full((n, nodes), -1), torch.zeros(n, nodes, dtype=torch.long)
    depth = torch.zeros(n, nodes, dtype=torch.long)
    for i in range(1, nodes):
        free = (children[:, :i] < 2).double() * 2.0 ** torch.arange(i)  # late nodes first, which makes trees deep
        parent = torch.multinomial(free, 1, generator=rng)[:, 0]
        above[:, i] = parent
        children[every, parent] += 1
        depth[:, i] = depth[every, parent] + 1
    goal = torch.multinomial(depth.clamp(max=FARTHEST).double(), 1, generator=rng)[:, 0]
    furthest = depth[every, goal].clamp(max=FARTHEST)
    distance = 1 + (torch.rand(n, generator=rng) * furthest).long()
    steps = [goal]
    for _ in range(nodes):
        parent = above[every, steps[-1]]
        steps.append(torch.where(parent < 0, steps[-1], parent))
    chain = torch.stack(steps, dim=1)
    start = chain[every, distance]
    shuffled = torch.rand(n, nodes - 1, generator=rng).argsort(1) + 1  # children, in the order of their edges
    ends = order.gather(1, above.gather(1, shuffled)), order.gather(1, shuffled)
    tokens = torch.cat([nodes + nodes * ends[0] + ends[1], order[every, start, None], order[every, goal, None]], dim=1)
    where = torch.full((n, nodes), -1).scatter(1, shuffled, torch.arange(nodes - 1).expand(n, -1))
    return Paths(
        tokens, order[every, chain[every, distance - 1]], distance, order.gather(1, chain[:, : FARTHEST + 1]),
        where.gather(1, chain[:, :FARTHEST]), children[every, start],
    )  # fmt: skip


def train_paths(
    *, nodes: int = 8, layers: int = 4, heads: int = 2, d_head: int = 32, d_mlp: int = 128, steps: int = 6000,
    batch: int = 256, lr: float = 2e-3, seed: int | None = None, checkpoint: str | os.PathLike[str] | None = None,
) -> Planted:  # fmt: skip
    """Train a small causal transformer to find paths in trees: what it learns is not planted, but can be recovered.

    Formula:  loss = cross-entropy of the answer at the last position, in nats, over fresh trees in every step.
    Source:   Brinkmann et al., "A Mechanistic Analysis of a Transformer Trained on a Symbolic Multi-Step Reasoning
              Task", 2024 (arXiv 2402.11917), backward chaining. Departs: an edge is one token; trees have 8 nodes, not
              16; the next node of the path is asked for, not all of it.
    Cost:     a forward and a backward of `batch` prompts of `nodes` + 1 tokens a step.
    Check:    tests/planted/test_paths.py.

    Args:
        nodes: of each tree.
        layers: of the network.
        heads: of each layer.
        d_head: width of each; the stream is as wide as all of a layer.
        d_mlp: neurons of each layer.
        steps: updates.
        batch: prompts of each.
        lr: the learning rate after 200 steps; it falls to 0 as a cosine.
        seed: of weights and trees; that of the settings by default.
        checkpoint: a file of the state; if it holds this training, that goes on where it stood.

    Returns:
        A `Planted`. Its truth: `nodes_of_tree`, and `accuracy` by distance, on 4,096 trees that it was not trained on.

    Raises:
        ArgumentError: a size is outside what is allowed.
        FitError: the loss is not finite.

    >>> it = planted.train_paths(steps=2000, seed=0)
    >>> it.truth["accuracy"]
    """
    check_sizes(layers=layers, heads=heads, d_head=d_head, d_mlp=d_mlp, steps=steps, batch=batch)
    paths(1, 0, nodes)
    seed = seed_of(current().seed if seed is None else seed)
    config = PlantedConfig(
        vocab_size=nodes * (nodes + 1), output_size=nodes, hidden_size=heads * d_head, num_hidden_layers=layers,
        num_attention_heads=heads, head_dim=d_head, intermediate_size=d_mlp, max_position_embeddings=nodes + 1,
        hidden_act="gelu", normalization="layer", attention_direction="causal", attention_scale=d_head**-0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf: Any = PlantedForCausalLM(config)
    hf.requires_grad_(False)
    hf.config.name_or_path = "paths"
    model = open_model(hf, prove=False)

    def loss(given: Paths) -> Tensor:
        logits = hf(given.tokens, logits_to_keep=1).logits[:, -1]
        return nn.functional.cross_entropy(logits, given.answers)

    fit(
        hf, loss, lambda step: paths(batch, seed * 10**6 + step + 1, nodes), steps, lr=lr, schedule="cosine",
        warmup=min(200, steps // 10), clip=1.0, weight_decay=1e-2, seed=seed, model=model, checkpoint=checkpoint,
        every=500, name="training to find paths",
    )  # fmt: skip
    model = open_model(hf)
    held = paths(4096, seed * 10**6 + 999_999_999, nodes)
    right = model.run(held.tokens).logits[:, -1].argmax(-1) == held.answers
    accuracy = [round(float(right[held.distance == d].double().mean()), 4) for d in range(1, FARTHEST + 1)]
    return Planted(model, {"nodes_of_tree": nodes, "accuracy": accuracy, "steps": steps, "seed": seed})
