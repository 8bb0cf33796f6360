"""What every head attends to in two short passages, the same in every atlas, so that heads can be compared.

The first is English with two names that come again and a clause that is repeated with a change; the second are random
tokens, repeated once. Both are as short as a page can show token by token.

Cost:  one forward over each passage; one byte per weight: 2 n_layers n_heads 32^2 at most.
Check: tests/laws/test_atlas_patterns.py: the bytes are those of the patterns that a run of the model gives.
"""

from __future__ import annotations

import numpy as np

from microtome.anatomy import Site
from microtome.method import RepeatedTokens
from microtome.model import Model
from microtome.stream import bos_id
from microtome.view import Passage, Patterns

TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary. When Mary and Anna went to the park, Anna gave a"
)
MOST = 32
"""Tokens of a passage, the one that begins a text among them."""

PERIOD = 12
"""Random tokens before the repeat."""

MEANINGS = (
    ("English", "a passage with names that come again, and a clause that is repeated with a change"),
    ("repeated tokens", f"{PERIOD} random tokens, then the same once more"),
)


def patterns_of(model: Model) -> Patterns:
    """The attention patterns of every layer that has them, of the passage and of the repeated tokens.

    The repeated tokens are left out where the model's context has no room for them.
    """
    a = model.anatomy
    sites = [Site("attn.pattern", i) for i in range(a.n_layers)]
    there = [site.layer for site in sites if site in a.hook_points and site.layer is not None]
    missing = {i: a.missing.get(s) or "no attention" for i, s in enumerate(sites) if s not in a.hook_points}
    passages: list[Passage] = []
    layers: dict[int, list[np.ndarray]] = {i: [] for i in there}
    for (title, meaning), tokens in zip(MEANINGS, _tokens(model), strict=True):
        if len(tokens) < 2 or not there:
            continue
        run = model.run(tokens, capture=[f"{i}.attn.pattern" for i in there], logits=False)
        passages.append(Passage(title, meaning, tuple(model.to_words(tokens))))
        for i in there:
            layers[i].append(run[f"{i}.attn.pattern"][0].double().cpu().numpy())
    return Patterns(tuple(passages), layers if passages else {}, missing)


def _tokens(model: Model) -> tuple[list[int], list[int]]:
    """The ids of both passages; none where one does not fit into the context."""
    most = min(MOST, model.anatomy.n_ctx)
    first = bos_id(model.tokenizer)
    begin = [] if first is None else [first]
    assert model.tokenizer is not None
    text: list[int] = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if len(begin) + 2 * PERIOD > most:
        return (begin + text)[:most], []
    (batch,) = RepeatedTokens(sequences=1, period=PERIOD).batches(model).parts
    return (begin + text)[:most], batch.tokens[0].tolist()
