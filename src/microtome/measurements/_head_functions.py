"""Which relations heads compute, from the weights alone: their maps from token to token (MAPS).

Formula:  M[s, t] = the logit of token t that a head would add had it attended to token s alone (see
          _head_vocabulary.py), row by row for the sources of the relations only, never for the whole vocabulary.
          maps_<relation> = share of the pairs s -> t with t among the `top` largest of row s (`copying`: the largest);
          suppress_<relation> the same of -M;  their controls: t exchanged among the pairs of the relation by the seed.
          successor = share of the words of series (days, numbers, letters, ...) whose successor has the largest logit
          of the series, the word itself left out; control: the successors of a shuffled series.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.measurements._head_vocabulary import (
    above_shuffled,
    alone,
    ordinary,
    read,
    single_tokens,
    unembedding,
    values,
    writes,
)
from microtome.measurements._relations import RELATIONS, SERIES
from microtome.method import Argument, Column, Seen, Source, Weights, measure
from microtome.model import Model

FEWEST = 5
"""Pairs of single tokens that a relation must have; with fewer it is left out."""
COPIED = 64
"""Tokens on which copying is tried."""
BLOCK = 256
"""Rows of M at a time."""
TOGETHER = 640
"""Dimensions of heads that are read as logits at a time."""
NEEDS = ("attn_out", "W_V", "W_O")
MAPS = Source(
    "Elhelo and Geva", "Inferring Functionality of Attention Heads from their Parameters", 2024, "2412.11965",
    departs="tokens are read behind the MLP of layer 0 together with their embedding, relative to the mean token; "
    "relations are smaller; shuffled pairs are the control",
)  # fmt: skip
SUCCESSOR = Source(
    "Gould et al.", "Successor Heads: Recurring, Interpretable Attention Heads In The Wild", 2023, "2312.09230",
    departs="the word itself is left out of its series; tokens are read behind the MLP of layer 0 together with their "
    "embedding",
)  # fmt: skip


def _columns(relation: str) -> tuple[Column, ...]:
    return tuple(
        column
        for name, what in (("maps", "among the largest logits"), ("suppress", "among the smallest logits"))
        for column in (
            Column(
                f"{name}_{relation}", "share", f"share of the pairs of the relation {relation} whose target is {what} "
                "that the head would add for the source", f"{name}_{relation}_shuffled", (0, 1), interval=False,
            ),
            Column(f"{name}_{relation}_shuffled", "share", "the same for targets of other pairs", range=(0, 1),
                   interval=False),
        )
    )  # fmt: skip


@measure(
    "head_functions",
    of="head",
    on=Weights(),
    sites="attn.z",
    needs=NEEDS,
    title="relations that heads compute",
    question="Which relations between words does each head compute, by its weights?",
    columns=(
        *(column for relation in ("copying", *RELATIONS) for column in _columns(relation)),
        Column(
            "successor", "share", "share of words in series whose successor the head raises most of the series",
            "successor_shuffled", (0, 1), interval=False,
        ),
        Column("successor_shuffled", "share", "the same for series in another order", range=(0, 1), interval=False),
    ),
    source=(MAPS, SUCCESSOR),
    cost="sources x d_head x vocab operations per head, for some 250 sources; memory for 256 rows of logits",
    check="tests/laws/test_head_functions.py",
    atlas="full",
)  # fmt: skip
def head_functions(
    seen: Seen, top: Annotated[int, Argument("how many of the largest logits count", "tokens", least=1)] = 10
) -> dict[str, Float[Tensor, " head"]]:
    """The share of each relation's pairs that each head's weights map, or suppress; `relation_scores` takes your own.

    A relation of which fewer than 5 pairs are single tokens is left out, and so is a series of words that are not all.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    pairs = _tried(seen.model)
    layer, series = seen.layer or 0, _series(seen.model)
    found = _scores(seen.model, layer, pairs, top)
    return above_shuffled(found | (successors(seen.model, layer, series) if series else {}))


def relation_pairs(model: Model) -> dict[str, list[tuple[int, int]]]:
    """The pairs of tokens that `head_functions` tries on a model, by relation; a word that is no single token has none.

    Cost:     tokenising some 500 words.
    Check:    tests/laws/test_head_functions.py.

    Args:
        model: an open model with a tokenizer.

    Returns:
        By relation (source, target) token ids: `copying` a token and itself, `successor` the words of each series that
        follow one another.
    """
    following = [pair for words in _series(model) for pair in itertools.pairwise(words)]
    return _tried(model) | ({"successor": following} if following else {})


def relation_scores(
    model: Model, relations: Mapping[str, Sequence[tuple[str, str]] | Sequence[tuple[int, int]]], *, top: int = 10
) -> xr.Dataset:
    """Which of your own relations each head computes, from the weights alone.

    Formula:  see this file's head: the share of pairs whose target is among the `top` largest logits that the head
              would add for the source (`maps`), or the smallest (`suppress`), beside the pairs' targets exchanged.
    Source:   Elhelo and Geva, "Inferring Functionality of Attention Heads from their Parameters", 2024 (2412.11965).
    Cost:     sources x d_head x vocab operations per head.
    Check:    tests/laws/test_head_functions.py.

    Args:
        model: an open model.
        relations: by name, pairs of words or of token ids; words that are no single token are left out.
        top: how many of the largest logits count.

    Returns:
        A dataset of `maps`, `maps_shuffled`, `suppress`, `suppress_shuffled` [relation, layer, head], shares, and
        `pairs` [relation], how many pairs were left; a relation of fewer than 5 is NaN. Layers without W_V or W_O have
        no row.

    Raises:
        ArgumentError: there is no relation, or `top` is no positive number.
        SiteError: the model's residual stream cannot be read as logits, or no layer has these weights.

    >>> relation_scores(model, {"capital": [("France", "Paris"), ("Italy", "Rome"), ...]})
    """
    if not relations or top < 1:
        got = f"{len(relations)} relations, top={top}"
        raise error(ArgumentError, "relations need pairs, and top is 1 or more", got=got, do="give a mapping of pairs")
    found = {name: given_pairs(model, name, pairs) for name, pairs in relations.items()}
    from microtome.method import declared

    measured = declared("head_functions")
    layers: list[int] = measured.layers(model)  # pyright: ignore[reportAttributeAccessIssue]
    kept = {name: pairs for name, pairs in found.items() if len(pairs) >= FEWEST}
    with torch.no_grad():
        unembed = unembedding(model)
        rows = [_scores(model, i, kept, top, unembed) for i in layers]
    nothing = torch.full((len(layers), model.anatomy.n_heads), torch.nan, dtype=torch.float64)
    variables = {
        f"{kind}{end}": (
            ("relation", "layer", "head"),
            torch.stack([
                torch.stack([row[f"{kind}_{name}{end}"] for row in rows]) if name in kept else nothing for name in found
            ]).cpu().numpy(),
            {"unit": "share"},
        )
        for kind in ("maps", "suppress") for end in ("", "_shuffled")
    }  # fmt: skip
    counts = ("relation",), [len(pairs) for pairs in found.values()], {"unit": "pairs"}
    coords = {"relation": list(found), "layer": layers, "head": list(range(model.anatomy.n_heads))}
    return xr.Dataset(variables | {"pairs": counts}, coords=coords, attrs=dict(model.provenance))


def _tried(model: Model) -> dict[str, list[tuple[int, int]]]:
    """The pairs of copying and of the relations that have enough."""
    pairs = {"copying": _copied(model)}
    return pairs | {name: found for name, of in RELATIONS.items() if len(found := _ids(model, of)) >= FEWEST}


def given_pairs(
    model: Model, name: str, pairs: Sequence[tuple[str, str]] | Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The pairs of one relation as tokens.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    ids = [(one, other) for one, other in pairs if isinstance(one, int) and isinstance(other, int)]
    words = [(one, other) for one, other in pairs if isinstance(one, str) and isinstance(other, str)]
    wrong = next((t for pair in ids for t in pair if not 0 <= t < model.W_U.shape[1]), None)
    if wrong is not None:
        what = f'the relation "{name}" names a token that the vocabulary has not'
        raise error(DataError, what, got=wrong, allowed=f"0 to {model.W_U.shape[1] - 1}", do="correct its ids")
    return [*ids, *_ids(model, words)]


def _ids(model: Model, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """The pairs whose words are single tokens, and not the same."""
    ends = single_tokens(model, [word for pair in pairs for word in pair])
    both = zip(ends[::2], ends[1::2], strict=True)
    return [(s, t) for s, t in both if s is not None and t is not None and s != t]


def _copied(model: Model) -> list[tuple[int, int]]:
    """Tokens to be copied, drawn by the seed."""
    tokens = ordinary(model)
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(current().seed))[:COPIED]
    return [(t, t) for t in tokens[chosen].tolist()]


def _series(model: Model) -> list[list[int]]:
    """The tokens of every series whose words are all single tokens."""
    every = [single_tokens(model, words) for words in SERIES.values()]
    return [[t for t in tokens if t is not None] for tokens in every if None not in tokens]


def successors(model: Model, layer: int, series: Sequence[Sequence[int]]) -> dict[str, Float[Tensor, " head"]]:
    """How often each head's weights map a word of a series to the next, and to the next of a shuffled series."""
    generator = torch.Generator().manual_seed(current().seed)
    right: list[Tensor] = []
    chance: list[Tensor] = []
    unembed = unembedding(model)
    for words in series:
        tokens = torch.tensor(words, device=unembed.device)
        logits = _moved(model, layer, tokens) @ unembed[:, tokens]  # [head, source, target]
        own = torch.eye(len(words), dtype=torch.bool, device=logits.device)
        said = logits.masked_fill(own, -torch.inf).argmax(-1)[:, :-1].cpu()
        order = torch.randperm(len(words), generator=generator)
        after = torch.empty_like(order)
        after[order] = order.roll(-1)
        right.append(said == torch.arange(1, len(words)))
        chance.append(said == after[:-1])
    named = {"successor": right, "successor_shuffled": chance}
    return {name: torch.cat(hits, dim=1).double().mean(1) for name, hits in named.items()}


def _moved(model: Model, layer: int, tokens: Int[Tensor, " token"]) -> Float[Tensor, "head token d_model"]:
    """What every head would write, had it attended to each of these tokens alone."""
    x = read(model, layer, alone(model, tokens, layer))
    return x @ values(model, layer) @ writes(model, layer)


def _scores(
    model: Model,
    layer: int,
    relations: Mapping[str, Sequence[tuple[int, int]]],
    top: int,
    unembed: Float[Tensor, "d_model vocab"] | None = None,
) -> dict[str, Float[Tensor, " head"]]:
    """The share of pairs of each relation that every head of a layer maps and suppresses, and of shuffled pairs."""
    unembed = unembedding(model) if unembed is None else unembed
    every = [pair for pairs in relations.values() for pair in pairs]
    sources = torch.tensor([s for s, _ in every], device=unembed.device)
    order = torch.cat([_exchanged(len(pairs)) for pairs in relations.values()])
    first = torch.tensor([sum(len(p) for p in list(relations.values())[:i]) for i in range(len(relations))])
    order = order + torch.cat([f.expand(len(p)) for f, p in zip(first, relations.values(), strict=True)])
    right = torch.tensor([t for _, t in every], device=unembed.device)
    targets = torch.stack([right, right[order.to(right.device)]], dim=1)
    value, write = values(model, layer), writes(model, layer)
    x = read(model, layer, alone(model, sources, layer))
    last = unembed.shape[1] - 1
    most = [min(last, 1 if name == "copying" else top) for name, pairs in relations.items() for _ in pairs]
    rank = torch.tensor(most, device=x.device).unsqueeze(1)
    hits = {kind: torch.zeros((len(value), *targets.shape), dtype=torch.bool) for kind in ("maps", "suppress")}
    for head, to_logits in enumerate(_read_as_logits(write, unembed)):
        for rows in torch.arange(len(x), device=x.device).split(BLOCK):
            logits = x[rows] @ value[head] @ to_logits
            own = logits.gather(1, targets[rows])
            # The first one that is not among so many: equal logits count against the target, so that a head that writes
            # nothing maps nothing.
            largest, smallest = (logits.topk(min(last, top) + 1, largest=end).values for end in (True, False))
            hits["maps"][head, rows.cpu()] = (own > largest.gather(1, rank[rows])).cpu()
            hits["suppress"][head, rows.cpu()] = (own < smallest.gather(1, rank[rows])).cpu()
    found: dict[str, Tensor] = {}
    at = 0
    for name, pairs in relations.items():
        for kind, hit in hits.items():
            share = hit[:, at : at + len(pairs)].double().mean(1)
            found |= {f"{kind}_{name}": share[:, 0], f"{kind}_{name}_shuffled": share[:, 1]}
        at += len(pairs)
    return found


def _read_as_logits(
    write: Float[Tensor, "head d_head d_model"], unembed: Float[Tensor, "d_model vocab"]
) -> Iterator[Float[Tensor, "d_head vocab"]]:
    """What each head writes, as logits; several heads in one product, which is quicker than one by one."""
    for some in write.split(max(1, TOGETHER // write.shape[1])):
        yield from (some.flatten(0, 1) @ unembed).unflatten(0, some.shape[:2])


def _exchanged(count: int) -> Int[Tensor, " pair"]:
    """Another pair for each of `count` pairs, drawn by the seed: round a random circle, so that none is its own."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(current().seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other
