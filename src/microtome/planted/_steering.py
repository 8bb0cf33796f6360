"""A Llama with a mood: one direction of the stream decides whether it speaks well or ill."""

from __future__ import annotations

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import Layout, bench, codes

CODE, MOOD = 12, 16


def steering(seed: int = 0, *, words: int = 20) -> Planted:
    """A two-layer Llama whose next word has the tone of the text so far, by one direction of the stream.

    Formula:  layer 0: one head averages the tone of all tokens (+1, -1 or 0) and writes 4 times it along `direction`;
              layer 1: two neurons fire where the stream along it is above 0.5, or below -0.5, and speak for the good
              words, or the bad.
    Source:   the setting of Turner et al., "Steering Language Models With Activation Engineering", 2023 (arXiv
              2308.10248), and Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", 2023 (arXiv
              2312.06681). Departs: built by hand.
    Check:    on neutral text, adding 2 along the direction makes a good word nearly certain and -2 a bad one; as much
              along another direction does nothing; the difference of means has cosine over 0.99 with it;
              tests/planted/test_handmade.py.

    Args:
        seed: of the direction, codes, heads and the weights that do nothing.
        words: how many words there are of each tone, a token each.

    Returns:
        A `Planted`. A prompt is BOS and any words. Its truth: `direction` [d_model], of length 1; `site`, where it is
        read; `threshold`, from where it acts; `bos`, `good`, `bad` and `neutral`, tokens; `head` (layer, head) and
        `neurons` (layer, neuron), those that write and read it.
    """
    layout = Layout(code=CODE, tone=1, mood=MOOD, out=1)
    vocab = 1 + 3 * words
    it = bench(layout, vocab=vocab, layers=2, heads=4, d_head=32, d_mlp=16, seed=seed)
    good, bad, neutral = torch.arange(1, vocab).chunk(3)
    it.model.W_E[1:, layout["code"]] = codes(3 * words, CODE, it.rng)
    it.model.W_E[good, layout["tone"]] = 1.0
    it.model.W_E[bad, layout["tone"]] = -1.0
    it.model.W_U[layout["out"], good] = 8.0
    it.model.W_U[layout["out"], bad] = -8.0
    inner = torch.randn(MOOD, generator=it.rng)
    direction = it.part("mood") @ (inner / inner.norm())
    head = it.free_head(0)
    it.move(0, head, it.part("tone"), 4.0 * direction.unsqueeze(0))
    one, out = it.part("one")[:, 0] / it.one, it.part("out")[:, 0]
    neurons = [(1, it.neuron(1, sign * direction - 0.5 * one, sign * out)) for sign in (1.0, -1.0)]
    return it.finish({
        "direction": direction, "site": "0.resid_post", "threshold": 0.5, "bos": 0, "good": good.tolist(),
        "bad": bad.tolist(), "neutral": neutral.tolist(), "head": (0, head), "neurons": neurons,
    })  # fmt: skip
