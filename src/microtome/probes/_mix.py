"""One probe of all layers: a mixture of them with learned weights, and what the weights are worth.

Formula:  s = sum_l softmax(a)_l (x_l - m_l), z = W s / c + b, of the layers of one width, with m_l their means and c
          one number, the standard deviation of all layers together; a, W, b trained together.
          similarities: one number a layer, the largest inner product of a row's state with those of examples of a
          concept, none of them of its group; a small network on these numbers reads the concept.
Law:      scaling the states of one layer moves its weight, though it holds what it held: a weight says how much of a
          sum a layer is, not how much it knows.
Source:   Peters et al., "Deep contextualized word representations", 2018 (arXiv 1802.05365), for the mixture; that it
          misleads: Fayyaz et al., "Not All Models Localize Linguistic Knowledge in the Same Place", 2021 (arXiv
          2109.05958). Departs: centred, one scale for all. Similarities: Liu et al., "Efficient Detection of Toxic
          Prompts in Large Language Models", 2024 (arXiv 2408.11727). Departs: the concept's examples are those of the
          folds that are fitted on.
Check:    tests/laws/test_probes.py.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.training import fit

STEPS = 300


def mixed(
    x: Float[Tensor, "layer row width"], y: np.ndarray, n: int, l2: float, seed: int
) -> tuple[Float[Tensor, " layer"], Float[Tensor, "class width"], Float[Tensor, " class"]]:
    """Weights of the layers, which sum to 1, and `weight`, `bias` of the probe on their mixture, in its units."""
    means = x.mean(1)
    inner, labels = (x - means.unsqueeze(1)).float(), torch.from_numpy(y)
    scale = float(inner.double().square().mean().sqrt().clamp(min=1e-12))
    inner = inner / scale
    held = {"a": torch.zeros(len(x)), "w": torch.zeros(n, x.shape[2]), "b": torch.zeros(n)}

    def loss(_: int) -> Tensor:
        mixture = torch.einsum("l,lrw->rw", held["a"].softmax(0), inner)
        logits = mixture @ held["w"].T + held["b"]
        penalty = l2 / (2 * len(labels)) * held["w"].square().sum()
        return torch.nn.functional.cross_entropy(logits, labels) + penalty

    fit(held, loss, lambda step: step, steps=STEPS, lr=3e-2, seed=seed, name="mixing layers")
    share = held["a"].detach().double().softmax(0)
    weight = held["w"].detach().double() / scale
    return share, weight, held["b"].detach().double() - weight @ (share @ means)


def similarities(
    x: Float[Tensor, "layer row width"], groups: np.ndarray, concept: np.ndarray
) -> Float[Tensor, "row layer"]:
    """The largest inner product of each row's state with those of the concept's rows of other groups, layer by layer.

    Args:
        x: states of the layers.
        groups: [row] numbers of groups.
        concept: numbers of the rows that stand for the concept; of two groups or more.
    """
    own = torch.from_numpy(groups[:, None] == groups[concept][None, :])
    found = [(layer @ layer[torch.from_numpy(concept)].T).masked_fill(own, -torch.inf).amax(1) for layer in x]
    return torch.stack(found, 1).nan_to_num(neginf=0.0)  # where the concept is of its own group alone
