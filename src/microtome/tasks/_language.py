"""Tasks of language: who received something, which pronoun, which verb, which parameter comes next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

from numpy.random import Generator

from microtome.tasks._pair import Draft, draft
from microtome.tasks._tokens import Tokens
from microtome.tasks._words import words

T = TypeVar("T")
INDIRECT_OBJECT = (
    "When {first} and {second} went to the {place}, {s2} gave a {object} to",
    "After {first} and {second} arrived at the {place}, {s2} handed a {object} to",
    "While {first} and {second} were sitting in the {place}, {s2} passed a {object} to",
    "Yesterday {first} and {second} met at the {place}, and {s2} brought a {object} to",
)
PRONOUN = (
    "So {subject} is such a good cook, isn't",
    "{subject} was very tired last night, wasn't",
    "I think {subject} is a great dancer, isn't",
    "{subject} was the last to leave, wasn't",
)
AGREEMENT = (
    "The {subject} near the {attractor}",
    "The {subject} behind the {attractor}",
    "The {subject} next to the {attractor}",
    "I know that the {subject} beside the {attractor}",
)
SINGULAR, PLURAL = (" is", " was", " has"), (" are", " were", " have")
DOCSTRING = '''def {function}(self, {arg1}, {arg2}, {arg3}, {arg4}):
    """{t1} {t2}

    :param {doc1}: {t3} {t4}
    :param {doc2}: {t5} {t6}
    :param'''


def indirect_object(
    tokens: Tokens,
    rng: Generator,
    order: Literal["both", "ABBA", "BABA"] = "both",
    corruption: Literal["swap", "third"] = "swap",
) -> Iterator[Draft]:
    """Two people, one gives something to the other; A is who receives it (`io`), B who gives it (`s1`, then `s2`)."""
    names = words("women") + words("men")
    while True:
        chosen = order if order != "both" else ("ABBA", "BABA")[rng.integers(2)]
        number = int(rng.integers(len(INDIRECT_OBJECT)))
        io, s, third = (names[i] for i in rng.permutation(len(names))[:3])
        roles = ("io", "s1") if chosen == "ABBA" else ("s1", "io")
        template = INDIRECT_OBJECT[number].replace("{first}", f"{{{roles[0]}}}").replace("{second}", f"{{{roles[1]}}}")
        values = {"io": io, "s1": s, "s2": s, "place": _one(rng, "places"), "object": _one(rng, "objects")}
        other = {"s2": io if corruption == "swap" else third}
        yield draft(template, values, other, f" {io}", f" {s}", f"{chosen} {number}")


def gendered_pronoun(tokens: Tokens, rng: Generator) -> Iterator[Draft]:
    """A first name, then the pronoun of a tag question."""
    kinds = (("women", " she"), ("men", " he"))
    while True:
        (own, right), (others, wrong) = kinds if rng.integers(2) else kinds[::-1]
        number = int(rng.integers(len(PRONOUN)))
        values, other = {"subject": _one(rng, own)}, {"subject": _one(rng, others)}
        yield draft(PRONOUN[number], values, other, right, wrong, f"{right.strip()} {number}")


def subject_verb_agreement(tokens: Tokens, rng: Generator) -> Iterator[Draft]:
    """A subject, then a noun of the other number, then the verb that agrees with the subject."""
    while True:
        subject, attractor = _one_of(rng, words("nouns")), _one_of(rng, words("attractors"))
        plural, number = int(rng.integers(2)), int(rng.integers(len(AGREEMENT)))
        right, wrong = (PLURAL, SINGULAR) if plural else (SINGULAR, PLURAL)
        values = {"subject": subject[plural], "attractor": attractor[1 - plural]}
        group = f"{('singular', 'plural')[plural]} {number}"
        yield draft(AGREEMENT[number], values, {"subject": subject[1 - plural]}, right, wrong, group)


def docstring(tokens: Tokens, rng: Generator) -> Iterator[Draft]:
    """A function with four parameters whose docstring has come to the third."""
    while True:
        args = [words("arguments")[i] for i in rng.permutation(len(words("arguments")))[:4]]
        things = [words("things")[i] for i in rng.permutation(len(words("things")))[:6]]
        values = {"function": _one(rng, "functions"), "doc1": args[0], "doc2": args[1]}
        values |= {f"arg{i + 1}": a for i, a in enumerate(args)} | {f"t{i + 1}": t for i, t in enumerate(things)}
        yield draft(DOCSTRING, values, {"arg3": args[3], "arg4": args[2]}, f" {args[2]}", f" {args[3]}")


def _one(rng: Generator, name: str) -> str:
    return _one_of(rng, words(name))


def _one_of(rng: Generator, held: Sequence[T]) -> T:
    return held[int(rng.integers(len(held)))]
