"""A Llama with an attention sink: heads that wait at BOS, held there by one huge activation."""

from __future__ import annotations

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import Layout, bench

MASSIVE = 400.0


def sink(seed: int = 0, *, fillers: int = 64) -> Planted:
    """A three-layer Llama whose heads of layers 1 and 2 look at BOS until their trigger has been seen.

    Formula:  layer 0: one neuron fires at BOS and writes 400 into one direction of the stream, beside which the norm
              leaves nothing else of BOS; layers 1 and 2: each sink head scores 60 for what has that direction and 120
              for its own trigger token, whose code it moves to the output. BOS has no such code: at the sink a head
              writes nothing.
    Source:   Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023 (arXiv 2309.17453); Sun et
              al., "Massive Activations in Large Language Models", 2024 (arXiv 2402.17762). Departs: built by hand.
    Check:    sink heads give BOS over 0.99 until their trigger, and less than 0.01 after; without the neuron the sink
              is gone; tests/planted/test_handmade.py.

    Args:
        seed: of heads, the direction, and the weights that do nothing.
        fillers: how many tokens mean nothing.

    Returns:
        A `Planted`. A prompt is BOS and any other tokens. Its truth: `bos`; `heads`, (layer, head); `triggers` and
        `alarms`, for each head the token it waits for and the token it then predicts; `fillers`; `layer`, `neuron`,
        `dimension` and `value` of the massive activation.
    """
    n = 4
    layout = Layout(is_bos=1, massive=8, trigger=n, out=n)
    vocab = 1 + 2 * n + fillers
    it = bench(layout, vocab=vocab, layers=3, heads=4, d_head=32, d_mlp=16, seed=seed)
    triggers, alarms = torch.arange(1, 1 + n), torch.arange(1 + n, 1 + 2 * n)
    it.model.W_E[0, layout["is_bos"]] = 1.0
    it.model.W_E[triggers, layout["trigger"]] = torch.eye(n)
    it.model.W_U[layout["out"], alarms] = 20.0 * torch.eye(n)
    one = it.part("one")[:, 0] / it.one
    dimension = int(torch.randint(layout["massive"].start, layout["massive"].stop, (), generator=it.rng))
    huge = torch.eye(layout.size)[dimension]
    # In full at 0.5, which is what the flag leaves above its threshold, but for what the flag adds to the norm.
    neuron = it.neuron(0, it.part("is_bos")[:, 0] - 0.5 * one, MASSIVE * huge)
    heads: list[tuple[int, int]] = []
    for i in range(n):
        layer = 1 + i % 2
        heads.append((layer, it.free_head(layer)))
        wanted = it.part("trigger")[:, i]
        keys = torch.stack([huge / it.one, wanted], dim=1)
        it.match(*heads[-1], torch.stack([one, 2 * one], dim=1), keys)
        it.move(*heads[-1], wanted.unsqueeze(1), it.part("out")[:, i].unsqueeze(0))
    return it.finish({
        "bos": 0, "heads": heads, "triggers": triggers.tolist(), "alarms": alarms.tolist(),
        "fillers": list(range(1 + 2 * n, vocab)), "layer": 0, "neuron": neuron, "dimension": dimension,
        "value": MASSIVE,
    })  # fmt: skip
