"""Factual recall: the answer to a subject, against the answer to another subject of the same relation."""

from __future__ import annotations

import re
from collections.abc import Iterator

from numpy.random import Generator

from microtome.tasks._pair import Draft, draft
from microtome.tasks._tokens import Tokens
from microtome.tasks._words import facts, relations

TRIES = 12
"""How many other subjects are tried for one, until one has as many tokens."""


def fact(tokens: Tokens, rng: Generator, relation: str | None) -> Iterator[Draft]:
    """Each fact of a relation, or of all, in random order, with other subjects of its relation in random order."""
    table = facts(relation)
    for i in rng.permutation(len(table)):
        name, subject, answer = table[i]
        template = _template(rng, name, subject, answer)
        others = [(s, a) for _, s, a in facts(name) if a != answer and not _names(template, a)]
        for other in rng.permutation(len(others))[:TRIES]:
            its_subject, its_answer = others[other]
            yield draft(template, {"subject": subject}, {"subject": its_subject}, f" {answer}", f" {its_answer}", name)


def _template(rng: Generator, relation: str, subject: str, answer: str) -> str:
    """A template of the relation whose own words name neither subject nor answer; without its example where all do."""
    templates: list[str] = relations()[relation]["templates"]
    free = [t for t in templates if not _names(t, subject) and not _names(t, answer)]
    chosen = free or [t.split(". ")[-1] for t in templates]  # without its worked example
    return chosen[rng.integers(len(chosen))]


def _names(template: str, word: str) -> bool:
    """Whether a template's own words hold a word, so that it could be copied from there."""
    return re.search(rf"\b{re.escape(word)}\b", template) is not None
