"""A Llama that adds numbers modulo a prime with waves, whose spectrum is known because it was written in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import Layout, bench


def modular(seed: int = 0, *, p: int = 23, frequencies: Sequence[int] = (2, 5, 9)) -> Planted:
    """A two-layer Llama that answers ``a b =`` with a + b modulo p, by multiplying waves.

    Formula:  with w = 2 pi k / p for each frequency k: the embedding of n holds cos wn and sin wn; a head of layer 1
              that looks everywhere alike leaves C = (cos wa + cos wb) / 3 and S = (sin wa + sin wb) / 3 at the last
              token; its neurons in pairs, silu(x) y - silu(-x) y = x y, make
                  C^2 - S^2 = 2 (1 + cos w(a - b)) cos w(a + b) / 9   and   2 C S, the same with the sine;
              the logit of c is the sum over k of a factor >= 0 times cos w(a + b - c), largest at c = a + b.
    Source:   Nanda et al., "Progress measures for grokking via mechanistic interpretability", 2023 (arXiv 2301.05217);
              Zhong et al., "The Clock and the Pizza: Two Stories in Mechanistic Explanation of Neural Networks", 2023
              (arXiv 2306.17844), whose pizza this is. Departs: built by hand, so that nothing else is in it.
    Check:    every sum is right; the logits have the frequencies written in and no others; tests/planted/test_waves.py.

    Args:
        seed: of the head, and of the weights that do nothing.
        p: the modulus, a prime; the numbers are tokens 0 to p - 1, and "=" is token p.
        frequencies: of the waves, from 1 to (p - 1) / 2.

    Returns:
        A `Planted`. Its truth: `p`, `equals`, the token; `frequencies`; `head`, (layer, head); `neurons` of layer 1.
    """
    waves = [2 * math.pi * k / p for k in frequencies]
    size = 2 * len(waves)
    layout = Layout(wave=size, mean=size, out=size)
    it = bench(layout, vocab=p + 1, layers=2, heads=4, d_head=32, d_mlp=6 * len(waves) + 8, seed=seed)
    table = torch.tensor([[f(w * n) for w in waves for f in (math.cos, math.sin)] for n in range(p)])
    it.model.W_E[:p, layout["wave"]] = table
    it.model.W_U[layout["out"], :p] = 200.0 * table.T
    head = (1, it.free_head(1))  # its scores are 0, so that it looks everywhere alike
    it.move(*head, it.part("wave"), it.part("mean").T)
    weights = it.model.layers[1]
    read, write = it.part("mean"), it.part("out")
    for k in range(len(waves)):
        cosine, sine = read[:, 2 * k], read[:, 2 * k + 1]
        products = (
            (cosine, cosine, write[:, 2 * k]),
            (sine, sine, -write[:, 2 * k]),
            (cosine, sine, 2 * write[:, 2 * k + 1]),
        )
        for x, y, out in products:
            for sign in (1.0, -1.0):
                number = it.neurons.get(1, 0)
                it.neurons[1] = number + 1
                weights.W_gate[:, number], weights.W_in[:, number], weights.W_out[number] = sign * x, y, sign * out
    return it.finish({
        "p": p, "equals": p, "frequencies": sorted(frequencies), "head": head,
        "neurons": list(range(it.neurons[1])),
    })  # fmt: skip
