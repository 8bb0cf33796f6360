"""A Llama that knows attributes of entities, each in a subspace of its own that no coordinate is aligned with."""

from __future__ import annotations

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import SHARP, Layout, bench, codes

CODE = 6


def attributes(
    seed: int = 0, *, entities: int = 48, kinds: int = 3, values: int = 4, fillers: int = 4, rotated: bool = True
) -> Planted:
    """A two-layer Llama whose entities have attributes, in subspaces of the stream that are orthogonal to one another.

    Formula:  the embedding of entity e holds sum_a R_a code(value of attribute a of e), with R = (R_1 .. R_kinds) a
              random rotation; layer 1: head a, where the token is the question a, looks at the entity and moves R_aᵀ x
              to the output; elsewhere it looks at BOS, which has no attributes.
    Source:   the setting of Huang et al., "RAVEL: Evaluating Interpretability Methods on Disentangling Language Model
              Representations", 2024 (arXiv 2402.17700). Departs: built by hand.
    Check:    all attributes are known; the planted basis of each has Cause and Isolate 1, and no set of coordinates
              has; tests/planted/test_subspaces.py.

    Args:
        seed: of attributes, codes, rotation, heads and the weights that do nothing.
        entities: how many there are, a token each.
        kinds: attributes, a token and a head each.
        values: of each attribute, a token each.
        fillers: how many tokens mean nothing.
        rotated: whether the subspaces are rotated; else each is made of coordinates of its own.

    Returns:
        A `Planted`. A prompt is BOS, fillers, one entity, fillers, one question; the next token is the value. Its
        truth: `bos` and the tokens of `entities`, `questions`, `fillers`; `values` [kind, value], tokens; `known`
        [entity, kind], the token of each; `site`, where the attributes are; `basis`, by kind [CODE, d_model];
        `heads`, (layer, head), one a kind.
    """
    layout = Layout(question=kinds, is_entity=1, is_bos=1, slots=kinds * CODE, out=CODE)
    vocab = 1 + entities + kinds + kinds * values + fillers
    heads_a_layer = 2 ** (kinds + 1).bit_length()
    it = bench(layout, vocab=vocab, layers=2, heads=heads_a_layer, d_head=32, d_mlp=32, seed=seed)
    bos, e, q, v, f = torch.arange(vocab).split([1, entities, kinds, kinds * values, fillers])
    words = codes(kinds * values, CODE, it.rng)
    drawn = torch.randint(values, (entities, kinds), generator=it.rng)
    known = v.reshape(kinds, values)[torch.arange(kinds), drawn]
    width = kinds * CODE
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=it.rng)).Q
    slots = it.part("slots") @ (turn if rotated else torch.eye(width)).to(it.model.dtype)
    it.model.W_E[e] += words[known - int(v[0])].flatten(1) @ slots.T
    it.model.W_E[e, layout["is_entity"].start] = 1.0
    it.model.W_E[q, layout["question"]] = torch.eye(kinds)
    it.model.W_E[bos, layout["is_bos"]] = 1.0
    it.model.W_U[layout["out"], v] = 20.0 * words.T
    one, question = it.part("one")[:, 0], it.part("question")
    keys = torch.cat([it.part("is_entity"), it.part("is_bos")], dim=1)
    heads: list[int] = []
    for a in range(kinds):
        heads.append(it.free_head(1))
        it.match(1, heads[-1], torch.stack([2 * question[:, a], one / it.one], dim=1), keys, sharp=SHARP)
        it.move(1, heads[-1], slots[:, a * CODE : (a + 1) * CODE], it.part("out").T)
    return it.finish({
        "bos": 0, "entities": e.tolist(), "questions": q.tolist(), "fillers": f.tolist(), "known": known.tolist(),
        "values": v.reshape(kinds, values).tolist(), "site": "0.resid_post", "heads": [(1, h) for h in heads],
        "basis": {str(a): slots[:, a * CODE : (a + 1) * CODE].T for a in range(kinds)},
    })  # fmt: skip
