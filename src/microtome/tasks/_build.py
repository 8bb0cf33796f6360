"""The tasks there are, and building one for a tokenizer."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from operator import index
from typing import Any, SupportsIndex

import numpy as np

from microtome.errors import PromptError, error, nearest
from microtome.tasks._copying import induction, needle
from microtome.tasks._facts import fact
from microtome.tasks._language import docstring, gendered_pronoun, indirect_object, subject_verb_agreement
from microtome.tasks._numbers import addition, greater_than
from microtome.tasks._pair import Answers, Draft, Pair, pair_of
from microtome.tasks._task import Task
from microtome.tasks._tokens import Misfit, Tokens
from microtome.tasks._words import relations


@dataclass(frozen=True)
class Kind:
    """A task that can be built.

    Attributes:
        about: what it asks, in a line.
        corruption: what the corrupt prompt changes.
        source: where it comes from, and where it departs.
        drafts: yields candidates from (tokens, generator, options).
        answers: how answers are read, where the task itself decides.
        finite: whether it has only so many pairs.
        text: whether it is made of text.
    """

    about: str
    corruption: str
    source: str
    drafts: Callable[..., Iterator[Draft | Pair]]
    answers: Answers | None = None
    finite: bool = False
    text: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults."""
        own = list(signature(self.drafts).parameters.values())[2:]
        return {p.name: p.default for p in own if not (isinstance(self.drafts, partial) or p.default is p.empty)}


KINDS: dict[str, Kind] = {
    "indirect_object": Kind(
        "who is given something, of two people named before",
        'the one who gives is, with "swap", the other of the two; with "third", someone new',
        "Wang et al., 2022 (arXiv 2211.00593); departs: templates and names",
        indirect_object,
    ),
    "greater_than": Kind(
        "a year later than the year in which something began",
        "the first year becomes the first one of its century with a later one, so that any end is later",
        "Hanna, Liu and Variengien, 2023 (arXiv 2305.00586); departs: any tokenizer that cuts years after two or three "
        "digits; an answer is a token that begins only later years, a foil one that begins only others",
        greater_than,
        answers="first",
    ),
    "docstring": Kind(
        "the next parameter of a function in its docstring",
        "the third and the fourth parameter of the definition change places",
        "Heimersheim and Janiak, 2023 (Alignment Forum); departs: words, and the corruption",
        docstring,
    ),
    "gendered_pronoun": Kind(
        "he or she, after a first name",
        "a first name that is usually given to the other sex",
        "Mathwin and Corlouer, 2023 (Apart Research); departs: templates, names, and the corruption",
        gendered_pronoun,
    ),
    "subject_verb_agreement": Kind(
        "a verb that agrees with its subject and not with the noun before it",
        "the subject in the other number",
        "Linzen, Dupoux and Goldberg, 2016 (arXiv 1611.01368); departs: templates; answers are is, was and has against "
        "are, were and have",
        subject_verb_agreement,
    ),
    "induction": Kind(
        "the next token of random tokens that are repeated",
        "where the answer stands first, another random token",
        "Olsson et al., 2022 (arXiv 2209.11895); departs: only the last token is asked",
        induction,
        text=False,
    ),
    "needle": Kind(
        "a word from one sentence of a longer context",
        "another word in that sentence",
        "after Wu et al., 2024 (arXiv 2404.15574); departs: one word, and a context of a few sentences",
        needle,
    ),
    "addition": Kind(
        "a sum, after two worked ones",
        "another second operand",
        "Stolfo, Belinkov and Sachan, 2023 (arXiv 2305.15054); departs: operands that give a sum of one token",
        addition,
    ),
    "fact": Kind(
        "facts of all relations",
        "another subject of the same relation",
        "pairs of subjects as in Meng et al., 2022 (arXiv 2202.05262); departs: own tables",
        partial(fact, relation=None),
        finite=True,
    ),
}
KINDS |= {
    f"fact.{name}": Kind(held["about"], KINDS["fact"].corruption, KINDS["fact"].source,
                         partial(fact, relation=name), finite=True)
    for name, held in relations().items()
}  # fmt: skip


def names() -> list[str]:
    """The tasks that `build` knows."""
    return list(KINDS)


def about(name: str) -> str:
    """What a task asks, in a line.

    Raises:
        PromptError: there is no such task.
    """
    return _named(name).about


def build(
    name: str,
    source: Any,
    n: int = 50,
    *,
    seed: int = 0,
    answers: Answers = "one",
    fewer: bool = False,
    **options: Any,
) -> Task:
    """Draw pairs of a task that align under a tokenizer.

    Candidates are drawn in an order that only the seed decides, and those are kept whose clean and corrupt prompt have
    the same number of tokens, whose words of interest are whole tokens at the same places, whose answer and foil can be
    read, and whose clean prompt is new.

    Args:
        name: one of `names()`.
        source: an open model, or a tokenizer of `transformers`.
        n: how many pairs.
        seed: of the drawing.
        answers: "one" keeps only pairs whose answer and foil are one token each; "first" reads the first token of each.
            Greater-than always reads the first one of each possible year.
        fewer: be content with fewer pairs where a table holds no more that fit.
        options: of the task. indirect_object: `order` ("both", "ABBA", "BABA"), `corruption` ("swap", "third");
            induction: `length` in tokens; needle: `sentences` around it.

    Returns:
        A `Task` of n pairs.

    Raises:
        PromptError: there is no such task, option or seed, or not enough candidates fit this tokenizer; says how many
            did, and why most did not.

    >>> task = build("indirect_object", model, n=50)
    >>> known = task.known_by(model)
    """
    kind = _kind(name, n, seed, options)
    if answers not in ("one", "first"):
        raise error(PromptError, "answers cannot be read in this way", got=repr(answers), allowed='"one" or "first"')
    tokens = Tokens.of(source)
    if kind.text:
        tokens.require(name)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    pairs, refused = _drawn(tokens, kind.drafts(tokens, rng, **options), n, kind.answers or answers, kind.finite)
    if len(pairs) < n and not (fewer and pairs):
        raise _too_few(name, n, pairs, refused)
    made = {"seed": seed, "changed": kind.corruption, "source": kind.source, "answers": kind.answers or answers}
    return Task(name, kind.about, tuple(pairs), made | kind.options | options, kind.text)


def _named(name: str) -> Kind:
    if name not in KINDS:
        near, allowed = nearest(name, names()), ", ".join(names())
        raise error(
            PromptError,
            f'there is no task "{name}"' + (f".{near}" if near else ""),
            allowed=allowed,
            do="name one of these",
        )
    return KINDS[name]


def _kind(name: str, n: object, seed: object, options: dict[str, Any]) -> Kind:
    kind = _named(name)
    if not isinstance(n, SupportsIndex) or index(n) < 1:
        raise error(PromptError, "a task has at least one pair", got=f"n={n!r}", do="ask for more")
    if not isinstance(seed, SupportsIndex) or index(seed) < 0:
        do = "choose another"
        raise error(PromptError, "a task cannot be drawn with this seed", got=repr(seed), allowed="0 or more", do=do)
    if unknown := sorted(options.keys() - kind.options.keys()):
        got, allowed = ", ".join(unknown), ", ".join(kind.options) or "none"
        raise error(PromptError, f'the task "{name}" has no such option', got=got, allowed=allowed)
    choices = {"order": ("both", "ABBA", "BABA"), "corruption": ("swap", "third")}
    for option, value in options.items():
        default = kind.options[option]
        if not isinstance(value, SupportsIndex if isinstance(default, int) else type(default)):
            what, do = f'the task "{name}" cannot use this {option}', f"give one such as {default!r}"
            raise error(PromptError, what, got=repr(value), do=do)
        if option in choices and value not in choices[option]:
            allowed = ", ".join(choices[option])
            raise error(PromptError, f'the task "{name}" has no such {option}', got=repr(value), allowed=allowed)
    return kind


def _drawn(
    tokens: Tokens, drafts: Iterator[Draft | Pair], n: int, answers: Answers, finite: bool
) -> tuple[list[Pair], Counter[str]]:
    """Up to n pairs, and how often each reason kept a draft from becoming one, with the first of its kind."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    refused: Counter[str] = Counter()
    for number, drawn in enumerate(drafts):
        if len(pairs) == n or (not finite and number >= 60 * n + 600):
            break
        if drawn.clean in seen:
            continue
        try:
            pair = drawn if isinstance(drawn, Pair) else pair_of(tokens, drawn, answers)
        except Misfit as why:
            refused[_as_first(refused, why)] += 1
            continue
        seen.add(drawn.clean)
        pairs.append(pair)
    return pairs, refused


def _as_first(refused: Counter[str], why: Misfit) -> str:
    """The text of the first refusal of this kind, under which all of its kind are counted."""
    return next((text for text in refused if text.startswith(why.kind)), str(why))


def _too_few(name: str, n: int, pairs: list[Pair], refused: Counter[str]) -> PromptError:
    got = f"{refused.total()} drafts refused"
    if refused:
        got += f", {refused.most_common(1)[0][1]} of them because {refused.most_common(1)[0][0]}"
    ways = [f"ask for n={len(pairs)}", "pass fewer=True"] if pairs else []
    if any("several tokens" in text for text in refused):
        ways.append('read the first token of each answer with answers="first"')
    return error(
        PromptError,
        f'only {len(pairs)} of {n} pairs of "{name}" fit this tokenizer',
        got=got,
        do=", or ".join(ways) or "choose another task",
    )
