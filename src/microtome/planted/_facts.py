"""A Llama that knows facts: an MLP that looks subjects up, and heads that fetch the attribute that is asked for."""

from __future__ import annotations

import torch

from microtome.planted._folder import Planted
from microtome.planted._llama import SHARP, Layout, bench, codes

CODE = 12


def fact_memory(
    seed: int = 0, *, subjects: int = 32, relations: int = 4, objects: int = 24, fillers: int = 8
) -> Planted:
    """A two-layer Llama whose first MLP is a key-value memory of facts, read at the end of the prompt.

    Formula:  layer 0: neuron s fires at the subject s and writes code(object of (s, r)) into slot r, for every relation
              r; layer 1: head r, where the token is relation r, looks at the subject and moves slot r to the output;
              elsewhere it looks at BOS, where the slot is empty.
    Source:   the picture of Geva et al., "Dissecting Recall of Factual Associations in Auto-Regressive Language
              Models", 2023 (arXiv 2304.14767), and of Meng et al., "Locating and Editing Factual Associations in GPT",
              2022 (arXiv 2202.05262). Departs: built by hand.
    Check:    all facts are known; zeroing a subject's neuron loses its facts and no others; another subject's MLP
              output brings that one's facts; tests/planted/test_handmade.py.

    Args:
        seed: of facts, codes, heads and the weights that do nothing.
        subjects: how many subjects there are, a token each.
        relations: how many relations there are, a token and a head each.
        objects: how many objects there are, a token each.
        fillers: how many tokens mean nothing.

    Returns:
        A `Planted`. A prompt is BOS, fillers, one subject, fillers, one relation; the next token is the object. Its
        truth: `bos` and the tokens of `subjects`, `relations`, `objects`, `fillers`; `facts` [subject, relation], the
        token of each object; `layer` and `neurons`, one a subject; `heads`, (layer, head), one a relation.
    """
    layout = Layout(
        subject=subjects, relation=relations, is_subject=1, is_bos=1, slots=relations * CODE, out=CODE
    )  # fmt: skip
    vocab = 1 + subjects + relations + objects + fillers
    heads_a_layer = 2 ** (relations + 1).bit_length()  # a power of two, which leaves some for distraction
    it = bench(layout, vocab=vocab, layers=2, heads=heads_a_layer, d_head=32, d_mlp=subjects + 16, seed=seed)
    bos, s, r, o, f = torch.arange(vocab).split([1, subjects, relations, objects, fillers])
    it.model.W_E[s, layout["subject"]] = torch.eye(subjects)
    it.model.W_E[r, layout["relation"]] = torch.eye(relations)
    it.model.W_E[s, layout["is_subject"]] = 1.0
    it.model.W_E[bos, layout["is_bos"]] = 1.0
    words = codes(objects, CODE, it.rng)
    it.model.W_U[layout["out"], o] = 20.0 * words.T
    known = torch.randint(objects, (subjects, relations), generator=it.rng)
    subject, slots, one = it.part("subject"), it.part("slots"), it.part("one")[:, 0]
    neurons = [
        it.neuron(0, subject[:, i] - 0.5 * one / it.one, slots @ words[known[i]].flatten()) for i in range(subjects)
    ]
    relation, keys = it.part("relation"), torch.cat([it.part("is_subject"), it.part("is_bos")], dim=1)
    heads: list[int] = []
    for i in range(relations):
        heads.append(it.free_head(1))
        it.match(1, heads[-1], torch.stack([2 * relation[:, i], one / it.one], dim=1), keys, sharp=SHARP)
        it.move(1, heads[-1], slots[:, i * CODE : (i + 1) * CODE], it.part("out").T)
    return it.finish({
        "bos": 0, "subjects": s.tolist(), "relations": r.tolist(), "objects": o.tolist(), "fillers": f.tolist(),
        "facts": o[known].tolist(), "layer": 0, "neurons": neurons, "heads": [(1, h) for h in heads],
    })  # fmt: skip
