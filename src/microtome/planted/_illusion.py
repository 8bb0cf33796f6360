"""A Llama with the smallest case in which patching a direction shows what no part of the direction does."""

from __future__ import annotations

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import Layout, bench, codes

CODE, D_MLP = 8, 16


def illusion(seed: int = 0, *, words: int = 8) -> Planted:
    """A one-layer Llama that tells two kinds of words apart by one neuron, beside one unread and one dormant neuron.

    Formula:  the neuron `carrier` fires at words of the first kind and writes b; the neuron `unread` fires there too
              and writes nothing; the neuron `dormant` never fires and would write 2 a. Both a and b speak for the
              answer `yes`, a constant for `no`. Along v = (unread + dormant) / sqrt(2), a patch between the kinds moves
              the dormant neuron by half of what the unread one differs by, so that the answer changes in full.
    Source:   the toy case of Makelov, Lange and Nanda, "Is This the Subspace You Are Looking for? An Interpretability
              Illusion for Subspace Activation Patching", 2023 (arXiv 2311.17030). Departs: in a Llama; the dormant
              neuron writes another direction than the carrier, so that the row space of the reader holds the two apart.
    Check:    the whole direction swaps every answer, its part in the reader's row space and its part in the null space
              none; tests/planted/test_subspaces.py.

    Args:
        seed: of codes, and of the weights that do nothing.
        words: of each kind, a token each.

    Returns:
        A `Planted`. A prompt is BOS and one word. Its truth: `bos`; `first` and `second`, the tokens of the two kinds;
        `yes` and `no`, the answers to them; `site`; `neurons`, by the names above; `direction` [d_mlp].
    """
    layout = Layout(code=CODE, sign=1, a=1, b=1)
    vocab = 1 + 2 * words + 2
    it = bench(layout, vocab=vocab, layers=1, heads=4, d_head=32, d_mlp=D_MLP, seed=seed)
    _, first, second, answers = torch.arange(vocab).split([1, words, words, 2])
    yes, no = answers.tolist()
    it.model.W_E[1 : 1 + 2 * words, layout["code"]] = codes(2 * words, CODE, it.rng)
    it.model.W_E[first, layout["sign"].start] = 1.0
    it.model.W_U[[layout["a"].start, layout["b"].start], yes] = 20.0
    it.model.W_U[layout["one"].start, no] = 10.0 / it.one
    sign, one = it.part("sign")[:, 0], it.part("one")[:, 0] / it.one
    a, b = it.part("a")[:, 0], it.part("b")[:, 0]
    fires = sign - 0.5 * one
    neurons = {
        "unread": it.neuron(0, fires, torch.zeros_like(a)), "dormant": it.neuron(0, -0.5 * one, 2 * a),
        "carrier": it.neuron(0, fires, b),
    }  # fmt: skip
    direction = torch.zeros(D_MLP, dtype=torch.float64)
    direction[[neurons["unread"], neurons["dormant"]]] = 0.5**0.5
    return it.finish({
        "bos": 0, "first": first.tolist(), "second": second.tolist(), "yes": yes, "no": no, "site": "0.mlp.post",
        "neurons": neurons, "direction": direction,
    })  # fmt: skip
