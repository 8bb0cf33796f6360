"""A Llama with one neuron of each kind that a text can show: dead, of a token, of a bigram, of a place, and so on."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.planted._folder import Planted
from microtome.planted._induction import look_back
from microtome.planted._llama import Bench, Layout, bench, codes

CODE = 16
EARLY = 6
"""The positional neuron fires at so many first positions."""


def neurons(seed: int = 0, *, groups: int = 3, words: int = 24, others: int = 12) -> Planted:
    """A two-layer Llama whose second MLP has one neuron for each kind of event, among others that mean nothing.

    Formula:  layer 0: a previous-token head moves a flag of the token before into `before`; a head that looks evenly at
              all tokens writes the share of BOS, 1 / (position + 1), into `place`. Layer 1, neurons: `dead` never
              fires; `token` fires at one token and lowers its logit; `bigram` at one token behind one other;
              `positional` where `place` says position < 6; `facets` at either of two tokens; `periodic` at the first
              word of every sentence of `sentences`; `group` g at all words of group g, whose logits it raises. The
              `others` fire where a random projection of the token's code is above 0, at about half of all tokens;
              every group has the same codes.
    Source:   the kinds of Voita, Ferrando and Nalmpantis, "Neurons in Large Language Models: Dead, N-gram,
              Positional", 2023 (arXiv 2309.04827). Departs: built by hand.
    Check:    each is found and no other; tests/planted/test_neurons.py.

    Args:
        seed: of codes, heads, which neuron is which, and the weights that do nothing.
        groups: how many groups of words there are.
        words: how many words each group has, a token each; the first quarter of each begin sentences.
        others: how many neurons of the second MLP mean nothing; so do all of the first.

    Returns:
        A `Planted`. A prompt is BOS and any other tokens. Its truth: `bos`; `groups`, the tokens of each; `starts`, of
        each group those that begin sentences; the tokens of `token`, `bigram` (two) and `facets` (two); `layer` 1;
        `neurons`, by kind the numbers of its neurons; `others`, (layer, neuron) of those that mean nothing.
    """
    layout = Layout(code=CODE, flag=5, group=groups, start=1, is_bos=1, before=1, place=1, topic=groups, out=CODE)
    vocab = 1 + 5 + groups * words
    d_mlp = 6 + groups + others
    it = bench(layout, vocab=vocab, layers=2, heads=4, d_head=64, d_mlp=d_mlp, seed=seed)
    own = codes(6 + words, CODE, it.rng)
    known = torch.cat([own[:6], own[6:].repeat(groups, 1)])  # groups differ in nothing but their flags
    special = torch.arange(1, 6)
    by_group = torch.arange(6, vocab).reshape(groups, words)
    starts = by_group[:, : words // 4]
    it.model.W_E[:, layout["code"]] = 0.5 * known
    it.model.W_E[special, layout["flag"]] = torch.eye(5)
    it.model.W_E[starts, layout["start"].start] = 1.0
    it.model.W_E[0, layout["is_bos"]] = 1.0
    for g in range(groups):
        it.model.W_E[by_group[g], layout["group"].start + g] = 1.0
    it.model.W_U[layout["out"]] = 20.0 * known.T
    for g in range(groups):
        it.model.W_U[layout["topic"].start + g, by_group[g]] = 20.0
    out = it.part("out")
    _heads(it)
    found = _mlps(it, groups, d_mlp, others, lowered=out @ known[special[0]])
    return it.finish({
        "bos": 0, "groups": by_group.tolist(), "starts": starts.tolist(), "token": int(special[0]),
        "bigram": (int(special[1]), int(special[2])), "facets": (int(special[3]), int(special[4])), "layer": 1,
        "neurons": {kind: several for kind, several in found.items() if kind != "others"},
        "others": [*((0, n) for n in range(d_mlp)), *((1, n) for n in found["others"])],
    })  # fmt: skip


def _heads(it: Bench) -> None:
    """The head that looks back, and the one that looks evenly at all tokens, since its scores are all 0."""
    back, even = it.free_head(0), it.free_head(0)
    look_back(it, 0, back)
    it.move(0, back, it.part("flag")[:, 1:2], it.part("before").T)
    it.move(0, even, it.part("is_bos"), it.part("place").T)


def _mlps(it: Bench, groups: int, d_mlp: int, others: int, lowered: Tensor) -> dict[str, list[int]]:
    """The neurons of both MLPs; by kind, those of the second."""
    flag, one, spare = it.part("flag"), it.part("one")[:, 0] / it.one, it.part("spare")

    def writes() -> Tensor:
        """What a neuron adds that means nothing to the output."""
        return spare @ (0.6 * torch.randn(spare.shape[1], generator=it.rng))

    def random() -> Tensor:
        return 2 * it.part("code") @ torch.randn(CODE, generator=it.rng)

    reads = {
        "dead": [-one], "token": [flag[:, 0] - 0.5 * one],
        "bigram": [0.5 * (it.part("before")[:, 0] + flag[:, 2]) - 0.75 * one],
        "positional": [it.part("place")[:, 0] - one / (EARLY + 0.5)],
        "facets": [flag[:, 3] + flag[:, 4] - 0.5 * one], "periodic": [it.part("start")[:, 0] - 0.5 * one],
        "group": [it.part("group")[:, g] - 0.5 * one for g in range(groups)],
        "others": [random() for _ in range(others)],
    }  # fmt: skip
    for _ in range(d_mlp):
        it.neuron(0, random(), writes())
    weights = it.model.layers[1]
    made = {kind: [it.neuron(1, direction, writes()) for direction in several] for kind, several in reads.items()}
    weights.W_out[made["token"][0]] = -lowered / 20.0
    for g, number in enumerate(made["group"]):
        weights.W_out[number] = it.part("topic")[:, g] / 100.0
    drawn = torch.randperm(d_mlp, generator=it.rng)  # which neuron is which
    for matrix in (weights.W_gate, weights.W_in):
        matrix[:] = matrix[:, drawn].clone()
    weights.W_out[:] = weights.W_out[drawn].clone()
    place_of = {old: new for new, old in enumerate(drawn.tolist())}
    return {kind: [place_of[n] for n in several] for kind, several in made.items()}


def sentences(it: Planted, rows: int, length: int, *, period: int = 4, seed: int = 0) -> Tensor:
    """[row, 1 + length] BOS and sentences of `period` words of any group, each begun by a word that begins sentences.

    Args:
        it: what `neurons` gave.
        rows: how many.
        length: tokens of each behind BOS.
        period: words of a sentence.
        seed: of the words.
    """
    rng = torch.Generator().manual_seed(seed)
    first = torch.tensor(it.truth["starts"]).flatten()
    every = torch.tensor(it.truth["groups"])
    rest = every[:, len(it.truth["starts"][0]) :].flatten()
    found = rest[torch.randint(len(rest), (rows, length), generator=rng)]
    places = torch.arange(0, length, period)
    found[:, places] = first[torch.randint(len(first), (rows, len(places)), generator=rng)]
    return torch.cat([torch.zeros(rows, 1, dtype=torch.int64), found], dim=1)
