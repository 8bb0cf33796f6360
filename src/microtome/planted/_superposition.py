"""A Llama whose stream holds more features than it has dimensions, all of them known."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.planted._folder import Planted
from microtome.planted._llama import Layout, bench


def superposition(
    seed: int = 0, *, features: int = 64, dimensions: int = 24, tokens: int = 300, active: int = 3
) -> Planted:
    """A one-layer Llama in whose stream every token is a sparse sum of known directions, more than dimensions.

    Formula:  embedding of t = sum_f activations[t, f] directions[f], `active` of them not 0, drawn from 0.5 to 1.5;
              the logit of a token is 10 times the product of the stream with its embedding, so that a feature
              speaks for the tokens that have it.
    Source:   Elhage et al., "Toy Models of Superposition", 2022 (arXiv 2209.10652). Departs: not trained; directions
              are pushed apart until they overlap little.
    Check:    the stream is that sum at every layer; adding a direction raises the logits of the tokens that have the
              feature above all others' on average; tests/planted/test_handmade.py.

    Args:
        seed: of directions, activations and the weights that do nothing.
        features: how many features there are.
        dimensions: of the subspace that they share.
        tokens: how many tokens there are.
        active: how many features each token has.

    Returns:
        A `Planted`. Its truth: `directions` [feature, d_model], of length 1; `activations` [token, feature]; `site`,
        where they are first found; `rest` [d_model], what the stream holds beside them for every token, distractors
        apart.
    """
    layout = Layout(features=dimensions)
    it = bench(layout, vocab=tokens, layers=1, heads=4, d_head=16, d_mlp=32, seed=seed)
    rows = unshared(torch.randn(features, dimensions, generator=it.rng))
    activations = torch.zeros(tokens, features)
    for t in range(tokens):
        which = torch.randperm(features, generator=it.rng)[:active]
        activations[t, which] = 0.5 + torch.rand(active, generator=it.rng)
    it.model.W_E[:, layout["features"]] = activations @ rows
    it.model.W_U[layout["features"]] = 10.0 * (activations @ rows).T
    directions = torch.zeros(features, layout.size)
    directions[:, layout["features"]] = rows
    rest = it.one * it.part("one")[:, 0]
    return it.finish({"directions": directions, "activations": activations, "site": "embed", "rest": rest})


def unshared(rows: Tensor, steps: int = 300) -> Tensor:
    """Unit vectors [n, width], moved until no two of them overlap much: each step pushes away along cubed overlaps."""
    for _ in range(steps):
        rows = rows / rows.norm(dim=1, keepdim=True)
        overlap = rows @ rows.T
        overlap.fill_diagonal_(0.0)
        rows = rows - 0.3 * overlap.pow(3) @ rows
    return rows / rows.norm(dim=1, keepdim=True)
