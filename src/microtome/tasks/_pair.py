"""A draft in text becomes a pair in tokens, or says why it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from microtome.shown import shown
from microtome.tasks._tokens import Ids, Misfit, Span, Tokens

Answers = Literal["one", "first"]
FIELD = re.compile(r"\{(\w+)\}")


@shown
@dataclass(frozen=True)
class Pair:
    """Two prompts of one length that are answered differently.

    Attributes:
        clean: the prompt that `answer` continues; in a task of random ids, what they decode to.
        corrupt: the same with one thing changed.
        clean_tokens: ids of the clean prompt, special tokens included.
        corrupt_tokens: as many ids.
        answer: text of the answer, with its leading space; the texts of several right tokens are joined by "|".
        foil: text of the wrong answer, likewise.
        answer_ids: the token that answers, or the set of tokens each of which does.
        foil_ids: the token, or the set of tokens, that it is compared with.
        spans: (first, end) token positions of words of interest, the same in both prompts; "end" is the last token.
        group: which template, role order or relation it is of.
    """

    clean: str
    corrupt: str
    clean_tokens: Ids
    corrupt_tokens: Ids
    answer: str
    foil: str
    answer_ids: Ids
    foil_ids: Ids
    spans: Mapping[str, Span]
    group: str = ""


@dataclass(frozen=True)
class Draft:
    """A pair as text, before it meets a tokenizer; `ranges` are characters in the clean and in the corrupt prompt."""

    clean: str
    corrupt: str
    answers: Sequence[str]
    foils: Sequence[str]
    ranges: Mapping[str, tuple[Span, Span]] = field(default_factory=dict[str, tuple[Span, Span]])
    group: str = ""


def filled(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """A template with its fields filled, and the characters where each field went; a field may stand once.

    >>> filled("The capital of {subject} is", {"subject": "Peru"})
    ('The capital of Peru is', {'subject': (15, 19)})
    """
    text, ranges, at = "", {}, 0
    for match in FIELD.finditer(template):
        text += template[at : match.start()]
        ranges[match[1]] = (len(text), len(text) + len(values[match[1]]))
        text += values[match[1]]
        at = match.end()
    return text + template[at:], ranges


def draft(
    template: str,
    clean: Mapping[str, str],
    corrupt: Mapping[str, str],
    answers: str | Sequence[str],
    foils: str | Sequence[str],
    group: str = "",
) -> Draft:
    """One template filled twice: with the clean values, and with those of them that `corrupt` replaces."""
    (text, ranges), (other, moved) = filled(template, clean), filled(template, {**clean, **corrupt})
    both = {name: (ranges[name], moved[name]) for name in ranges}
    right = (answers,) if isinstance(answers, str) else tuple(answers)
    wrong = (foils,) if isinstance(foils, str) else tuple(foils)
    return Draft(text, other, right, wrong, both, group)


def pair_of(tokens: Tokens, d: Draft, answers: Answers = "one") -> Pair:
    """The pair that a draft is under a tokenizer.

    Args:
        tokens: the tokenizer.
        d: the draft.
        answers: "one" takes answers and foils of one token alone; "first" reads the first token of each, and leaves
            out tokens that begin both an answer and a foil.

    Raises:
        Misfit: the prompts do not align, a word of interest is no whole number of tokens, or the answers cannot be
            read.
    """
    rows = tokens.ids(d.clean), tokens.ids(d.corrupt)
    require_aligned(tokens, *rows)
    spans = tokens.spans(d.clean, {name: r[0] for name, r in d.ranges.items()})
    moved = tokens.spans(d.corrupt, {name: r[1] for name, r in d.ranges.items()})
    if shifted := next((name for name in spans if spans[name] != moved[name]), None):
        raise Misfit("a word of interest lies elsewhere in the corrupt prompt", shifted)
    right, wrong = _read(tokens, d, answers)
    return Pair(
        d.clean, d.corrupt, *rows, "|".join(tokens.words(right)), "|".join(tokens.words(wrong)), right, wrong,
        with_places(spans, len(rows[0])), d.group,
    )  # fmt: skip


def with_places(spans: Mapping[str, Span], length: int) -> dict[str, Span]:
    """Spans with the two places that most methods ask for: the last token, and the last one of the subject."""
    places = {"end": (length - 1, length)}
    if "subject" in spans:
        end = spans["subject"][1]
        places["subject_last"] = (end - 1, end)
    return {**spans, **places}


def require_aligned(tokens: Tokens, clean: Ids, corrupt: Ids) -> None:
    """Refuse prompts of different lengths, empty prompts, identical prompts and prompts that are too long.

    Raises:
        Misfit: names the first difference and both lengths.
    """
    both = zip(clean, corrupt, strict=False)
    at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(clean), len(corrupt)))
    if not clean or not corrupt:
        raise Misfit("a prompt is empty", do="give both prompts")
    if len(clean) != len(corrupt):
        words = [repr(tokens.words(row)[at]) if at < len(row) else "the end" for row in (clean, corrupt)]
        raise Misfit(
            "the prompts do not align",
            f"{len(clean)} and {len(corrupt)} tokens, first different at position {at}: {words[0]} and {words[1]}",
            "choose words of as many tokens",
        )
    if at == len(clean):
        raise Misfit("the clean and the corrupt prompt are the same", do="change what the answer depends on")
    if tokens.n_ctx is not None and len(clean) > tokens.n_ctx:
        raise Misfit("the prompt is longer than the model's context", f"{len(clean)} tokens, at most {tokens.n_ctx}")


def _read(tokens: Tokens, d: Draft, answers: Answers) -> tuple[Ids, Ids]:
    """The ids of answers and foils, which must be the same after both prompts."""
    if same := set(d.answers) & set(d.foils):
        raise Misfit("the foil equals the answer", repr(min(same)), "choose another foil")
    texts = [*d.answers, *d.foils]
    found = tokens.continuations(d.clean, texts)
    if found != tokens.continuations(d.corrupt, texts):
        raise Misfit("the answer is tokenised differently after the two prompts", repr(texts[0]))
    if answers == "one" and (long := next((i for i, ids in enumerate(found) if len(ids) > 1), None)) is not None:
        raise Misfit(
            "an answer or foil is several tokens",
            f"{texts[long]!r} is {tokens.words(found[long])}",
            'choose one of one token, or read the first token of each with answers="first"',
        )
    right = {ids[0] for ids in found[: len(d.answers)]}
    wrong = {ids[0] for ids in found[len(d.answers) :]}
    if not right - wrong or not wrong - right:
        got = f"{d.answers[0]!r} and {d.foils[0]!r}"
        raise Misfit("answer and foil begin with the same token", got, "choose another foil")
    return tuple(sorted(right - wrong)), tuple(sorted(wrong - right))
