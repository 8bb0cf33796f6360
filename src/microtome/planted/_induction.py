"""A Llama that continues what it has seen: a previous-token head, and an induction head that reads what it writes."""

from __future__ import annotations

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import SHARP, THETA, Bench, Layout, bench, codes

CODE = 38


def induction(seed: int = 0) -> Planted:
    """A two-layer Llama with one induction circuit, which predicts the token that followed this one last time.

    Formula:  layer 0, previous-token head: scores sum_j cos(w_j (q - k - 1)) over the fast rotary pairs, writes the
              code of the token before into `previous`; layer 1, induction head: queries are this token's code, keys are
              `previous`, values the code of the token there, which the unembedding reads.
    Source:   Olsson et al., "In-context Learning and Induction Heads", 2022 (arXiv 2209.11895). Departs: built by hand.
    Check:    the measure induction finds both heads above 0.9 and no other above 0.2; either head ablated, the repeat
              is no longer continued; tests/planted/test_handmade.py.

    Args:
        seed: of the codes, of which heads are used, and of the weights that do nothing.

    Returns:
        A `Planted` with 1000 tokens. Its truth: `previous_token_head` and `induction_head`, each (layer, head).
    """
    layout = Layout(code=CODE, previous=CODE, out=CODE)
    it = bench(layout, vocab=1000, layers=2, heads=4, d_head=64, d_mlp=32, seed=seed)
    words = codes(1000, CODE, it.rng)
    it.model.W_E[:, layout["code"]] = words
    it.model.W_U[layout["out"]] = 20.0 * words.T
    first, second = it.free_head(0), it.free_head(1)
    look_back(it, 0, first)
    it.move(0, first, it.part("code"), it.part("previous").T)
    it.match(1, second, it.part("code"), it.part("previous"), sharp=2 * SHARP)
    it.move(1, second, it.part("code"), it.part("out").T)
    return it.finish({"previous_token_head": (0, first), "induction_head": (1, second)})


def look_back(it: Bench, layer: int, head: int) -> None:
    """Let a head look at the token before, by the pairs that turn fast enough to tell it from its neighbours."""
    half = it.d_head // 2
    turn = THETA ** (-torch.arange(half) / half)
    weights, fast = it.model.layers[layer], [j for j in range(half) if float(turn[j]) > 0.05]
    for j in fast:
        weights.W_Q[head][it.at["one"], j] = 2 * SHARP * it.d_head**0.5 / it.one
        # A key that is one step behind the query has been turned by one step less: it begins one step ahead.
        weights.W_K[head][it.at["one"], j] = torch.cos(turn[j]) / it.one
        weights.W_K[head][it.at["one"], j + half] = torch.sin(turn[j]) / it.one
