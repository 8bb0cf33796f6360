"""Interchange interventions: what is swapped between which prompts, and what the model should then say."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import numpy as np

from microtome.errors import ArgumentError, PromptError, error
from microtome.shown import in_notebooks, shown
from microtome.tasks import Asked, Task

Wants = Literal["cause", "isolate"]
SHOWN = 12
"""Attributes that are shown."""
FOR_PLACEBO = 3
"""Labels below which the other than the base's own is the source's."""
LEAST = 8
"""Entities below which nothing can be said of any that were held out."""


@shown
@dataclass(frozen=True)
class Swap:
    """One interchange: a part of the activation at a place of the base prompt comes from a place of the source prompt.

    Attributes:
        base, source: ids of the two prompts.
        base_at, source_at: the two places, positions in them.
        label: the token that the base prompt should then be continued by.
        wants: "cause" where that is what the source's value gives, "isolate" where it is still the base's own.
        own: the token that the base prompt is continued by without a swap.
        attribute: what it is about.
        entity: whose base prompt it is; swaps of one entity are one example.
        given: whose source prompt it is.
        pair: whether label and own answer are compared with each other alone, and not with all tokens.
    """

    base: tuple[int, ...]
    source: tuple[int, ...]
    base_at: int
    source_at: int
    label: int
    wants: Wants
    own: int
    attribute: str = ""
    entity: str = ""
    given: str = ""
    pair: bool = False


@in_notebooks
@dataclass(frozen=True, eq=False)
class Swaps:
    """Interchanges of one attribute.

    Attributes:
        swaps: the interchanges.
        attrs: how they were made, as plain values.
    """

    swaps: tuple[Swap, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __len__(self) -> int:
        return len(self.swaps)

    def __iter__(self) -> Iterator[Swap]:
        return iter(self.swaps)

    @overload
    def __getitem__(self, at: int) -> Swap: ...
    @overload
    def __getitem__(self, at: slice) -> Swaps: ...
    def __getitem__(self, at: int | slice) -> Swap | Swaps:
        return replace(self, swaps=self.swaps[at]) if isinstance(at, slice) else self.swaps[at]

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.of(wants))} {wants}" for wants in ("cause", "isolate"))
        return f"Swaps({counts}, of {len(self.entities)} entities)"

    def _facts(self) -> dict[str, str]:
        counts = {wants: str(len(self.of(wants))) for wants in ("cause", "isolate")}
        more = {name: str(value) for name, value in list(self.attrs.items())[:SHOWN]}
        return counts | {"entities": str(len(self.entities))} | more

    @property
    def entities(self) -> tuple[str, ...]:
        """Whose base prompts they are."""
        return tuple(dict.fromkeys(swap.entity for swap in self.swaps))

    def of(self, wants: Wants) -> Swaps:
        """Those that want one of the two."""
        return replace(self, swaps=tuple(swap for swap in self.swaps if swap.wants == wants))

    def placebo(self, seed: int = 0, labels: Sequence[int] | None = None) -> Swaps:
        """The same with an attribute that no model was ever told: each source gets one of the labels, by chance alone.

        Each name of a source has an order of labels of its own; a swap takes the first that is not the base's own
        answer, since a swap to that one could never be seen. Bases keep what they should keep.

        Args:
            seed: of the draws.
            labels: what is drawn from; by default `labels`.

        Raises:
            PromptError: there are fewer than three labels, so that what is not the base's own would be the source's.
        """
        labels = self.labels if labels is None else labels
        if len(labels) < FOR_PLACEBO:
            got, allowed = f"{len(labels)} different labels", f"{FOR_PLACEBO} or more"
            raise error(PromptError, "these swaps have no placebo", got=got, allowed=allowed, do="give more answers")

        def drawn(swap: Swap) -> int:
            rng = np.random.default_rng([seed, zlib.crc32(swap.given.encode())])
            return next(labels[i] for i in rng.permutation(len(labels)) if labels[i] != swap.own)

        changed = (replace(s, label=drawn(s)) if s.wants == "cause" else s for s in self.swaps)
        return replace(self, swaps=tuple(changed), attrs={**self.attrs, "placebo": True})

    @property
    def labels(self) -> tuple[int, ...]:
        """The tokens that swaps which want a cause should give, each once."""
        return tuple(sorted({swap.label for swap in self.of("cause")}))

    @classmethod
    def of_pairs(cls, task: Task, at: str | int = "end") -> Swaps:
        """The interchanges of a task's pairs, both ways: into the corrupt prompt, and into the clean one.

        Answer and foil are compared with each other alone.

        Args:
            task: pairs of one answer and one foil each.
            at: the name of a span that all pairs have, whose last token is the place, or a position.

        Raises:
            PromptError: there are no pairs, or a pair has no such span or several answers.
        """
        found: list[Swap] = []
        for number, pair in enumerate(task):
            if len(pair.answer_ids) != 1 or len(pair.foil_ids) != 1:
                got, do = f"{len(pair.answer_ids)} answers", "take a task of one answer and one foil"
                raise error(PromptError, f"pair {number} has several answers or foils", got=got, do=do)
            place = _place(at, pair.spans, len(pair.clean_tokens), number)
            sides = (pair.clean_tokens, pair.answer_ids[0]), (pair.corrupt_tokens, pair.foil_ids[0])
            for (base, own), (source, label) in (sides, sides[::-1]):
                name = f"pair {number}"
                found.append(Swap(base, source, place, place, label, "cause", own, task.name, name, name, True))
        if not found:
            raise error(PromptError, f'the task "{task.name}" has no pairs', do="keep at least one of them")
        return cls(tuple(found), {"task": task.name, "pairs": len(task), "at": str(at)})


def _place(at: str | int, spans: Mapping[str, tuple[int, int]], length: int, number: int) -> int:
    if isinstance(at, int):
        place = at + length if at < 0 else at
        if not 0 <= place < length:
            raise error(PromptError, f"pair {number} has no position {at}", got=f"{length} tokens", do="count tokens")
        return place
    if at not in spans:
        raise error(PromptError, f'pair {number} has no span "{at}"', allowed=", ".join(spans), do="name one of these")
    return spans[at][1] - 1


def of_asked(asked: Sequence[Asked], attribute: str, entities: Iterable[str], *, each: int = 4, seed: int = 0) -> Swaps:
    """The interchanges of one attribute among entities that a model knows.

    A base is a question that the model answers, the source another entity in any prompt that was asked, whose own
    answer to the base's question is another one and known too. Where the question is about the attribute, the label is
    the source's answer (cause); where it is about another attribute, the base's own (isolate).

    Args:
        asked: questions with answers, as `Ravel.ask` gives them.
        attribute: which attribute is to be swapped.
        entities: whose questions take part, as bases and as sources.
        each: swaps of either kind per entity, as bases.
        seed: of the draws.
    """
    own = set(entities)
    known = [q for q in asked if q.known and q.entity in own]
    said = {(q.entity, q.attribute, q.template): q for q in known}
    by_entity: dict[str, list[Asked]] = {}
    for q in asked:
        if q.entity in own:
            by_entity.setdefault(q.entity, []).append(q)
    others: dict[tuple[str, str], list[str]] = {}
    for q in known:
        others.setdefault((q.attribute, q.template), []).append(q.entity)
    rng, found = np.random.default_rng(seed), list[Swap]()
    for entity in dict.fromkeys(q.entity for q in known):
        mine = [q for q in known if q.entity == entity]
        for wants in ("cause", "isolate"):
            bases = [q for q in mine if (q.attribute == attribute) == (wants == "cause")]
            pool = [
                (base, name)
                for base in bases
                for name in others[base.attribute, base.template]
                if said[name, base.attribute, base.template].said not in base.answers
            ]
            for i in rng.permutation(len(pool))[:each]:
                base, name = pool[i]
                source = by_entity[name][rng.integers(len(by_entity[name]))]
                label = said[name, base.attribute, base.template].said if wants == "cause" else base.said
                where = base.tokens, source.tokens, base.at, source.at
                found.append(Swap(*where, label, wants, base.said, attribute, entity, name))
    return Swaps(tuple(found), {"attribute": attribute, "each": each, "seed": seed})


def require_both(swaps: Swaps, attribute: str, what: str, share: float) -> None:
    """Refuse swaps of too few entities to say anything, or of one kind alone.

    Raises:
        PromptError: they are; with the share of the questions that the model answers.
    """
    cause, isolate = (len(swaps.of(wants).entities) for wants in ("cause", "isolate"))
    if min(cause, isolate) < LEAST:
        raise error(
            PromptError, f"too few {what} entities whose {attribute} and another attribute the model knows",
            got=f"{cause} that can be changed, {isolate} that can stay; it answers {share:.1%} of all questions",
            allowed=f"{LEAST} of each", do="ask more entities, other attributes, or a larger model",
        )  # fmt: skip


def require_swaps(given: object) -> Swaps:
    """What was given, if it is interchanges.

    Raises:
        ArgumentError: it is something else.
    """
    if isinstance(given, Swaps):
        return given
    do = "give Swaps(tuple of Swap), or make them with Swaps.of_pairs(task)"
    raise error(ArgumentError, "interchanges are given as Swaps", got=type(given).__name__, do=do)


def require_known(swaps: Swaps, known: Sequence[bool], what: str) -> tuple[Swaps, float]:
    """The swaps whose base prompt the model answers as they say, and their share.

    Raises:
        PromptError: there is none.
    """
    kept = tuple(swap for swap, answered in zip(swaps, known, strict=True) if answered)
    if not kept:
        got, do = f"0 of {len(swaps)} base prompts", "choose prompts that it answers"
        raise error(PromptError, f"{what} answers none of the prompts, so that nothing can be swapped", got=got, do=do)
    return replace(swaps, swaps=kept), len(kept) / len(swaps)


def require_rank(rank: int, width: int, site: str) -> int:
    """Refuse a rank that a site has no room for.

    Raises:
        ArgumentError: it is below 1 or above the width.
    """
    if not 1 <= rank <= width:
        do = "choose a smaller one"
        raise error(ArgumentError, f"no subspace of {site} has this rank", got=rank, allowed=f"1 to {width}", do=do)
    return rank
