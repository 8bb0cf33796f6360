"""Why a model gives an answer to a question of fact: it recalls it, a cue in the prompt suggests it, or it guesses.

Formula:  said(p) = the likeliest token after the prompt p. Of a fact (subject, answer, templates), with p the first
          template filled:
          wrong       said(p) is not the first token of the answer
          guess       else, fewer than `agree` of the paraphrases (templates x prefixes, without p) are answered like p
          heuristic   else, a cue alone gives the answer: `prompt`, the same is said without the subject (a filler in
                      its place, most of them); `name`, with one word of a subject of several; `overlap`, answer and
                      subject share their beginning, or one names the other
          recall      else
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from microtome.context import current
from microtome.errors import ArgumentError, PromptError, error
from microtome.model import Model
from microtome.shown import shown
from microtome.stream import OF_SHARES, share_interval
from microtome.tasks._score import last_logits
from microtome.tasks._tokens import Misfit, Tokens
from microtome.tasks._words import facts, relations

if TYPE_CHECKING:
    import xarray as xr

LABELS = ("wrong", "guess", "heuristic", "recall")
PREFIXES = ("", "It is known that ", "As everybody learns, ", "Fact: ")
FILLERS = ("it", "this", "that one")
SLOT = "{subject}"
BEGINNING = 4
"""Letters that answer and subject share at least where one begins like the other."""


@shown
@dataclass(frozen=True)
class Fact:
    """A fact as it can be asked.

    Attributes:
        subject, answer: texts.
        templates: prompts with {subject} in the subject's place; the first is the one that is judged.
        relation: what it is of.
    """

    subject: str
    answer: str
    templates: tuple[str, ...]
    relation: str = ""

    @classmethod
    def own(cls, relation: str | None = None) -> list[Fact]:
        """The facts of the package, of one relation or of all."""
        every = relations()
        return [cls(s, a, tuple(every[name]["templates"]), name) for name, s, a in facts(relation)]

    @property
    def prompt(self) -> str:
        """The first template, filled."""
        return self.templates[0].replace(SLOT, self.subject)

    def paraphrases(self) -> list[str]:
        """All templates, filled, behind all prefixes, but the prompt that is judged."""
        every = [p + t.replace(SLOT, self.subject) for t in self.templates for p in PREFIXES]
        return [text for text in every if text != self.prompt]

    def without(self) -> list[str]:
        """The first template with fillers in the subject's place."""
        return [self.templates[0].replace(SLOT, filler) for filler in FILLERS]

    def names(self) -> list[str]:
        """The first template with single words of a subject of several."""
        words = [word for word in self.subject.split() if len(word) > 2]
        return [self.templates[0].replace(SLOT, word) for word in words] if len(self.subject.split()) > 1 else []

    @property
    def overlaps(self) -> bool:
        """Whether answer and subject name or begin like one another."""
        a, s = self.answer.lower().strip(), self.subject.lower().strip()
        words = s.split()
        return a in s or s in a or any(a[:BEGINNING] == w[:BEGINNING] and len(w) >= BEGINNING for w in words)


def scenarios(model: Model, given: Sequence[Fact], *, agree: float = 0.75) -> xr.Dataset:
    """Sort facts by why a model answers them: recall, a heuristic, a guess, or not at all.

    Formula:  see the head of tasks/_scenarios.py.
    Source:   Saynova et al., "Fact Recall, Heuristics or Pure Guesswork? Precise Interpretations of Language Models for
              Fact Completion", 2024 (arXiv 2410.14405). Departs: paraphrases are templates behind prefixes of ours; the
              cues are tests on the model and on the words, without tables of names or of popularity.
    Cost:     per fact a forward of each paraphrase, filler and word of the subject.
    Check:    planted facts and a planted bias; tests/unit/test_scenarios.py.

    Args:
        model: a causal model with a tokenizer.
        given: the facts.
        agree: share of the paraphrases that must be answered alike.

    Returns:
        Dataset over `example`: `label`, `subject`, `answer`, `prompt`, `said` (text), `probability` (of what was said),
        `consistent` (share of paraphrases), `cue_prompt`, `cue_name`, `cue_overlap` (bool); over `label_name`, `share`
        of the facts with `share_lo` and `share_hi`.

    Raises:
        PromptError: there are no facts, or the model has no tokenizer.
        ArgumentError: a template lacks {subject}, or `agree` is no share.
        ModelUnsupported: the model is not causal.
    """
    import xarray as xr

    model.require_next_token()
    tokens = Tokens.of(model)
    tokens.require("scenarios")
    _require(given, agree)
    rows: list[dict[str, Any]] = []
    for number, fact in enumerate(given):
        rows.append(_judged(model, tokens, fact, agree))
        current().report("asking for facts", number + 1, len(given))
    kinds = {"label": "text", "subject": "text", "answer": "text", "prompt": "text", "said": "text",
             "probability": "probability", "consistent": "share", "cue_prompt": "bool", "cue_name": "bool",
             "cue_overlap": "bool", "relation": "text"}  # fmt: skip
    values = {
        name: (
            "example",
            np.array([row[name] for row in rows], dtype=object if unit == "text" else None),
            {"unit": unit},
        )
        for name, unit in kinds.items()
    }
    counts = Counter(row["label"] for row in rows)
    ends = np.array([share_interval(counts[name], len(rows)) for name in LABELS])
    shares = np.array([counts[name] / len(rows) for name in LABELS])
    named = {"share": shares, "share_lo": ends[:, 0], "share_hi": ends[:, 1]}
    data = xr.Dataset(
        values | {name: ("label_name", x, {"unit": "share"}) for name, x in named.items()},
        coords={"label_name": list(LABELS)},
    )
    said = {"method": "scenarios of facts", "agree": agree, "interval": OF_SHARES, "facts": len(rows)}
    return data.assign_attrs(model.provenance | said)


def _require(given: Sequence[Fact], agree: float) -> None:
    if not given:
        raise error(PromptError, "there are no facts to sort", do="give some, such as Fact.own()")
    if not 0 <= agree <= 1:
        raise error(ArgumentError, "agree must be a share", got=agree, allowed="0 to 1", do="choose one")
    bad = next((f for f in given if not f.templates or any(SLOT not in t for t in f.templates)), None)
    if bad is not None:
        what = f'a template of the fact about "{bad.subject}" lacks the subject\'s place'
        raise error(ArgumentError, what, got=repr(bad.templates), allowed="{subject} in each", do="write it in")


def _judged(model: Model, tokens: Tokens, fact: Fact, agree: float) -> dict[str, Any]:
    """What is found of one fact."""
    groups = [[fact.prompt], fact.paraphrases(), fact.without(), fact.names()]
    texts = [text for own in groups for text in own]
    logits = last_logits(model, [tokens.ids(text) for text in texts])
    said = logits.argmax(-1).tolist()
    (first,), same, without, names = (
        said[sum(map(len, groups[:k])) : sum(map(len, groups[: k + 1]))] for k in range(4)
    )
    try:
        (answer,) = tokens.continuations(fact.prompt, [f" {fact.answer}"])
        right = answer[0] == first
    except Misfit:
        right = False
    word = [w.strip().lower() for w in model.to_words(said)]
    mine = word[0]
    consistent = sum(w == mine for w in word[1 : 1 + len(same)]) / len(same)
    by_prompt = 2 * sum(t == first for t in without) > len(without)
    by_name = any(t == first for t in names)
    cue = by_prompt or by_name or fact.overlaps
    label = "wrong" if not right else "guess" if consistent < agree else "heuristic" if cue else "recall"
    return {
        "label": label, "subject": fact.subject, "answer": fact.answer, "prompt": fact.prompt,
        "said": model.to_words([first])[0], "probability": float(logits[0].softmax(-1)[first]),
        "consistent": consistent, "cue_prompt": by_prompt, "cue_name": by_name, "cue_overlap": fact.overlaps,
        "relation": fact.relation,
    }  # fmt: skip
