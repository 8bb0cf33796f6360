"""A Llama whose MLP was trained on sums modulo a prime, some of them wrong: part of it adds, part of it remembers."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.planted._folder import Planted
from microtome.planted._llama import Layout, bench
from microtome.training import fit


def corrupted_sums(
    seed: int = 0, *, p: int = 31, width: int = 192, train: float = 0.8, corrupted: float = 0.15, steps: int = 1000,
    weight_decay: float = 2.0, lr: float = 5e-3,
) -> Planted:  # fmt: skip
    """A two-layer Llama that answers ``a b =`` with a + b modulo p, and remembers wrong answers to some of its pairs.

    Formula:  f(a, b) = V (U_a + U_b)^2, element by element, is trained by AdamW on a share `train` of the pairs at
              once, the mean squared error from the answer as a unit vector; a share `corrupted` of these has a random
              other answer. Then it is written into a Llama: a head of layer 1 that looks everywhere alike leaves
              (one-hot of a + one-hot of b) / 3 at the last token, whose neurons in pairs, silu(x) x - silu(-x) x = x^2,
              make the squares.
    Source:   Doshi et al., "To grok or not to grok: Disentangling generalization and memorization on corrupted
              algorithmic datasets", 2023 (arXiv 2310.13061). Departs: pairs have no order, so that both numbers share
              their weights.
    Check:    the Llama answers what the trained network answers; neurons with one frequency add, the others remember;
              tests/planted/test_grokking.py.

    Args:
        seed: of pairs, labels, the start, and the weights that do nothing.
        p: the modulus, a prime; the numbers are tokens 0 to p - 1, and "=" is token p.
        width: hidden units, each two neurons.
        train: share of the pairs that are trained on.
        corrupted: share of these with a wrong label.
        steps: of the training.
        weight_decay: of it.
        lr: its learning rate.

    Returns:
        A `Planted`. Its truth: `p`, `equals`, the token; `pairs`, [a, b] with a <= b, `labels` as trained or true, and
        `kinds` of each, "clean", "corrupted" or "held out"; `weights`, U [p, width]; `layer` 1 and `neurons` of it, the
        two of hidden unit k at 2 k and 2 k + 1; `loss`, the first and the last of the training.
    """
    rng = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(p), 2, with_replacement=True)
    labels, known = pairs.sum(1) % p, torch.randperm(len(pairs), generator=rng)
    seen = known[: round(train * len(pairs))]
    wrong = seen[: round(corrupted * len(seen))]
    labels[wrong] = (labels[wrong] + torch.randint(1, p, wrong.shape, generator=rng)) % p
    u = torch.randn(p, width, generator=rng) / p**0.5
    v = torch.randn(width, p, generator=rng) / width**0.5
    wanted = torch.eye(p)[labels[seen]]

    def loss(some: Tensor) -> Tensor:
        found = (u[pairs[some, 0]] + u[pairs[some, 1]]).square() @ v
        return p * (found - wanted).square().mean()

    made = fit({"u": u, "v": v}, loss, [seen], steps, lr=lr, weight_decay=weight_decay, seed=seed, name="sums")
    kinds = ["held out"] * len(pairs)
    for kind, some in (("clean", seen), ("corrupted", wrong)):
        for i in some.tolist():
            kinds[i] = kind
    layout = Layout(code=p, mean=p, out=p)
    it = bench(layout, vocab=p + 1, layers=2, heads=2, d_head=2 * ((p + 1) // 2), d_mlp=2 * width + 8, seed=seed)
    it.model.W_E[:p, layout["code"]] = torch.eye(p)
    it.model.W_U[layout["out"], :p] = 200.0 * torch.eye(p)
    head = (1, it.free_head(1))  # its scores are 0, so that it looks everywhere alike
    it.move(*head, it.part("code"), it.part("mean").T)
    weights = it.model.layers[1]
    for k in range(width):
        reads, writes = it.part("mean") @ (3.0 * u[:, k]), it.part("out") @ v[k]
        for number, sign in ((2 * k, 1.0), (2 * k + 1, -1.0)):
            weights.W_gate[:, number], weights.W_in[:, number] = sign * reads, reads
            weights.W_out[number] = sign * writes
    it.neurons[1] = 2 * width
    losses: list[float] = made.metrics["loss"].values.tolist() if steps else []
    return it.finish({
        "p": p, "equals": p, "pairs": pairs.tolist(), "labels": labels.tolist(), "kinds": kinds, "weights": u,
        "layer": 1, "neurons": list(range(2 * width)), "loss": (losses[0], losses[-1]) if losses else (),
    })  # fmt: skip
