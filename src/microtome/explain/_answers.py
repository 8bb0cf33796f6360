"""Answers as tokens: one, or one per example; by default the model's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor

from microtome.errors import ArgumentError, MicrotomeWarning, PromptError, error
from microtome.metric import (
    Divergence,
    LogitDifference,
    LogProbability,
    Metric,
    Probability,
    Rank,
    SpanLoss,
    in_ids,
)
from microtome.model import Model
from microtome.tasks import LogOdds

FAR = 10.0
"""How many times as likely another form of a word must be to be worth a warning."""
SUSPECTS = 8
"""Prompts that are run at most to find one."""

Answer = str | int | Sequence[str] | Sequence[int]
"""One token for all examples, or one per example: as text of one token, or as its id."""

READS: dict[type, tuple[str, str]] = {
    LogitDifference: ("logit difference", "logits"), LogProbability: ("log-probability of the answer", "nats"),
    Probability: ("probability of the answer", "probability"), Rank: ("rank of the answer", "tokens"),
    SpanLoss: ("mean loss of the tokens", "nats"), Divergence: ("KL divergence from the base", "nats"),
    LogOdds: ("log-odds of the answers against the foils", "logits"),
}  # fmt: skip


def metric_in_words(metric: Metric) -> tuple[str, str]:
    """What a metric reads, and its unit."""
    return READS.get(type(metric), (type(metric).__name__, f"units of {type(metric).__name__}"))


def metric_of(model: Model, metric: object, prompts: Sequence[Tensor]) -> Metric:
    """A metric that was given, with the ids of the tokens that it names as text in some prompts [pos].

    Raises:
        ArgumentError: it is none; with what was given.
        PromptError: a text is not one token.
    """
    if not isinstance(metric, Metric):
        do = "give one of mt.metric, such as LogProbability(answer), or answer= instead"
        raise error(ArgumentError, "metric must be a metric", got=repr(metric), do=do)
    found = in_ids(metric, model)
    for name in ("answer", "foil") if getattr(found, "position", None) == -1 else ():
        given, ids = getattr(metric, name, None), getattr(found, name, None)
        if given is not ids and len(_listed(ids, len(prompts))) == len(prompts):
            warn_of_spaces(model, given, _listed(ids, len(prompts)), prompts, name)
    return found


def answers_of(model: Model, given: Answer, n: int, what: str = "answer") -> list[int]:
    """The token of each of n examples.

    Raises:
        PromptError: there are not as many as examples, or one is several tokens or none.
    """
    plain: Any = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(plain, bytes | bytearray):  # their numbers are no ids
        raise error(
            PromptError, f"cannot read the {what}", got=repr(plain), allowed="texts or ids", do="decode it first"
        )
    listed = _listed(plain, n)
    if len(listed) != n:
        raise error(PromptError, f"there must be one {what} per example", got=len(listed), allowed=str(n))
    return [model.to_id(a) for a in listed]


def _listed(given: Any, n: int) -> list[Any]:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given] * n


def warn_of_spaces(model: Model, given: Any, ids: Sequence[int], prompts: Sequence[Tensor], what: str) -> None:
    """Warn where a text is one token and the same word with a space before it another, far likelier one.

    A forward of a few prompts, and only where a text begins without a space that it may have, or with one behind a
    prompt that ends in one.

    Args:
        model: the model.
        given: one token for all prompts, or one per prompt; ids are not questioned.
        ids: the token of each prompt that was made of it.
        prompts: the tokens [pos] of each, up to what is read.
        what: "answer" or "foil".
    """
    if model.tokenizer is None or not model.anatomy.causal:
        return
    others = [_other_form(model, t, row) for t, row in zip(_listed(given, len(prompts)), prompts, strict=True)]
    suspect = [i for i, other in enumerate(others) if other is not None][:SUSPECTS]
    if not suspect:
        return
    run = model.run([prompts[i] for i in suspect])
    for row, i, (first, n) in zip(run.logits, suspect, run.batch.spans, strict=True):
        chances, other = row[first + n - 1].float().log_softmax(-1), others[i]
        times = math.exp(min(float(chances[other] - chances[ids[i]]), 700.0))
        if times >= FAR:
            words, where = model.to_words([ids[i], cast("int", other)]), f" of example {i}" if len(prompts) > 1 else ""
            text = (
                f"the {what}{where} is the token {words[0]!r}, and {words[1]!r} is {times:,.0f} times as likely there. "
                f"To do: write {words[1]!r} if that is meant."
            )
            warnings.warn(text, MicrotomeWarning, stacklevel=2)
            return


def _other_form(model: Model, text: Any, prompt: Tensor) -> int | None:
    """The token of a word with its space where it has none, or without it behind a space or a mark of a chat's turn."""
    if not isinstance(text, str) or not text.strip():
        return None
    special: list[int] = getattr(model.tokenizer, "all_special_ids", [])
    if text[0].isspace() and int(prompt[-1]) not in special and not model.to_words(prompt[-1:])[0][-1:].isspace():
        return None
    try:
        return model.to_id(text.lstrip() if text[0].isspace() else f" {text}")
    except PromptError:
        return None


def answers_and_foils(
    model: Model, answer: Answer, foil: Answer | None, prompts: Sequence[Tensor]
) -> tuple[list[int], list[int] | None]:
    """The tokens of the answers and of the foils of some prompts [pos], which end where they are read.

    Raises:
        PromptError: not one per example, not one token, or a foil that equals its answer.
    """
    n = len(prompts)
    answers = answers_of(model, answer, n)
    warn_of_spaces(model, answer, answers, prompts, "answer")
    if foil is None:
        return answers, None
    foils = answers_of(model, foil, n, "foil")
    warn_of_spaces(model, foil, foils, prompts, "foil")
    same = next((i for i, (a, f) in enumerate(zip(answers, foils, strict=True)) if a == f), None)
    if same is not None:
        where = f" in example {same}" if n > 1 else ""
        word = model.to_words([answers[same]])[0]
        raise error(PromptError, f"the foil equals the answer{where}", got=f'"{word}"', do="choose another foil")
    return answers, foils


def answer_metric(model: Model, answer: Answer | None, foil: Answer | None, prompts: Sequence[Tensor]) -> Metric:
    """The logit difference of answer and foil at the last position, or without a foil the answer's log-probability.

    Raises:
        PromptError: there is no answer, one of them is not one token, or they are the same.
    """
    if answer is None:
        raise error(PromptError, "there is nothing to read", do="give answer= or metric=")
    answers, foils = answers_and_foils(model, answer, foil, prompts)
    return LogProbability(answers) if foils is None else LogitDifference(answers, foil=foils)


def own_answer(model: Model, tokens: Int[Tensor, " pos"], answer: str | int | None) -> tuple[int, dict[str, Any]]:
    """The token that is read of one prompt [pos], the model's own by default; and what a result says of it."""
    own = int(model.run(tokens.unsqueeze(0)).logits[0, -1].argmax())
    token = own if answer is None else model.to_id(answer)
    warn_of_spaces(model, answer, [token], [tokens], "answer")
    return token, {"answer": model.to_words([token])[0], "known": int(token == own)}
