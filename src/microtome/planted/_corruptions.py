"""Pairs of inputs for planted circuits: other tokens, and the same tokens with their positions shuffled.

An edge from the positional embedding carries nothing that depends on the tokens, so that swapping tokens never shows
it. Shuffled positions do.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from microtome.edit import Set
from microtome.errors import DataError, error
from microtome.model import Model
from microtome.model import open as open_model
from microtome.planted._folder import Planted
from microtome.planted._programs import PROGRAMS
from microtome.planted._truth import head_of, mlp_of, nodes
from microtome.shown import shown


@shown
@dataclass(frozen=True)
class Corruptions:
    """Inputs of one length with two corruptions each. BOS, where there is one, stays at position 0.

    Attributes:
        clean: [pair, pos] tokens.
        corrupt: [pair, pos] other tokens.
        positions: [pair, pos] the positions, shuffled; to be used with the clean tokens.
    """

    clean: Tensor
    corrupt: Tensor
    positions: Tensor


def corruptions(it: Planted, n: int, seed: int, *, length: int | None = None) -> Corruptions:
    """Draw inputs with token and position corruptions.

    Half of the corrupt inputs are drawn anew and half differ in one token; half of the shuffles are of all positions
    and half swap two, since some programs answer the same to almost everything.

    Args:
        it: a planted model; if its truth names a program, inputs are drawn as that program's are.
        n: how many pairs.
        seed: of everything drawn.
        length: tokens of each, BOS included; the whole context by default.

    Returns:
        `Corruptions`: clean tokens, corrupt tokens, and shuffled positions.

    Raises:
        DataError: there are no pairs, or the length is not one that the model takes, or too short to be shuffled.
    """
    a, truth = it.model.anatomy, it.truth
    length = a.n_ctx if length is None else length
    if n < 1:
        raise error(DataError, "there are no inputs to corrupt", got=n, allowed="1 or more", do="ask for more")
    bos: int | None = truth.get("bos")
    start = 0 if bos is None else 1
    if not start + 2 <= length <= a.n_ctx:
        raise error(DataError, "no corruptions of this length", got=length, allowed=f"{start + 2} to {a.n_ctx}")
    rng = Random(seed)
    program = PROGRAMS.get(str(truth.get("program")))
    free = [t for t in range(a.d_vocab) if t != bos]

    def draw() -> list[int]:
        if program is not None:
            return program.encode(program.sample(program, rng, length - 1))
        return ([] if bos is None else [bos]) + rng.choices(free, k=length - start)

    clean = [draw() for _ in range(n)]
    corrupt: list[list[int]] = []
    places: list[list[int]] = []
    for i, row in enumerate(clean):
        at, other = rng.sample(range(start, length), 2)
        new = [*row]
        new[at] = rng.choice([t for t in free if t != row[at]])
        corrupt.append(draw() if i % 2 else new)
        order = [*range(length)]
        order[at], order[other] = other, at
        places.append([*range(start), *rng.sample(range(start, length), length - start)] if i % 2 else order)
    return Corruptions(*(torch.tensor(rows, device=it.model.device) for rows in (clean, corrupt, places)))


def placed(model: Model, tokens: Tensor, positions: Tensor) -> Set:
    """The edit that puts tokens at positions of your choice, each [batch, pos].

    >>> model.run(c.clean, edits=[planted.placed(model, c.clean, c.positions)])
    """
    trunk = model.hf.model
    return Set("embed", trunk.embed_tokens(tokens) + trunk.embed_positions(positions))


def by_place(model: Model) -> Model:
    """The same planted model, whose token ids also say where a token stands, so that shuffled positions are a prompt.

    Formula:  embedding of id t + p * d_vocab = W_E[t] + W_pos[p]; there is no positional embedding besides.
    Check:    equal to the model with `placed`; tests/planted/test_recovery.py.

    Returns:
        A model that shares no weights with the given one; `place_ids` makes its ids.
    """
    old: Any = model.hf
    trunk, config = old.model, deepcopy(old.config)
    where: Tensor = trunk.embed_positions.weight.detach()
    both = (trunk.embed_tokens.weight.detach() + where.unsqueeze(1)).flatten(0, 1)
    config.vocab_size = len(both)
    with torch.random.fork_rng(devices=[]):
        made: Any = type(old)(config)
    weights = dict(old.state_dict())
    weights |= {"model.embed_tokens.weight": both, "model.embed_positions.weight": torch.zeros_like(where)}
    made.load_state_dict(weights)
    made.requires_grad_(False)
    return open_model(made.to(device=model.device, dtype=model.dtype), prove=False)


def place_ids(
    model: Model, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
) -> Int[Tensor, "batch pos"]:
    """Token ids of `by_place` for tokens of the model at their own positions, or at those that are given."""
    places = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
    return tokens + model.anatomy.d_vocab * places


def writes(model: Model, tokens: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
    """What each node but the output adds to the residual stream [batch, pos, d_model], without the biases of W_O.

    Args:
        model: a planted model.
        tokens: [batch, pos] token ids.
        positions: [batch, pos] the position id of each token; its own position by default.

    Returns:
        By node, as `nodes` names them.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if positions is None else positions
    run = model.run(tokens, capture=["*.attn.result", "*.mlp_out"], edits=[placed(model, tokens, places)])
    trunk = model.hf.model
    found = {"embed": trunk.embed_tokens(tokens), "pos_embed": trunk.embed_positions(places)}
    for node in nodes(model):
        head, layer = head_of(node), mlp_of(node)
        if head is not None:
            found[node] = run[f"{head[0]}.attn.result"][:, :, head[1]]
        elif layer is not None:
            found[node] = run[f"{layer}.mlp_out"]
    return found
