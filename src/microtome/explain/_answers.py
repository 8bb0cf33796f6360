"""Answers as tokens: one, or one per example; by default the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from microtome.errors import ArgumentError, PromptError, error
from microtome.metric import Divergence, LogitDifference, LogProbability, Metric, Probability, Rank, SpanLoss
from microtome.model import Model
from microtome.tasks import LogOdds

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


def require_metric(metric: object) -> None:
    """Refuse a metric that is not one.

    Raises:
        ArgumentError: with what was given.
    """
    if not isinstance(metric, Metric):
        do = "give one of mt.metric, such as LogProbability(answer), or answer= instead"
        raise error(ArgumentError, "metric must be a metric", got=repr(metric), do=do)


def one_token(model: Model, text: str | int) -> int:
    """The id of a text of one token; an id is itself.

    Raises:
        PromptError: it is several tokens, with the tokens that it is, lies outside the vocabulary, or is none.
    """
    return model.to_id(text)


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
    listed: list[Any] = list(plain) if isinstance(plain, Iterable) and not isinstance(plain, str) else [plain] * n
    if len(listed) != n:
        raise error(PromptError, f"there must be one {what} per example", got=len(listed), allowed=str(n))
    return [one_token(model, a) for a in listed]


def answers_and_foils(model: Model, answer: Answer, foil: Answer | None, n: int) -> tuple[list[int], list[int] | None]:
    """The tokens of the answers and of the foils of n examples.

    Raises:
        PromptError: not one per example, not one token, or a foil that equals its answer.
    """
    answers = answers_of(model, answer, n)
    if foil is None:
        return answers, None
    foils = answers_of(model, foil, n, "foil")
    same = next((i for i, (a, f) in enumerate(zip(answers, foils, strict=True)) if a == f), None)
    if same is not None:
        where = f" in example {same}" if n > 1 else ""
        word = model.to_words([answers[same]])[0]
        raise error(PromptError, f"the foil equals the answer{where}", got=f'"{word}"', do="choose another foil")
    return answers, foils


def answer_metric(model: Model, answer: Answer | None, foil: Answer | None, n: int = 1) -> Metric:
    """The logit difference of answer and foil at the last position, or without a foil the answer's log-probability.

    Raises:
        PromptError: there is no answer, one of them is not one token, or they are the same.
    """
    if answer is None:
        raise error(PromptError, "there is nothing to read", do="give answer= or metric=")
    answers, foils = answers_and_foils(model, answer, foil, n)
    return LogProbability(answers) if foils is None else LogitDifference(answers, foil=foils)


def own_answer(model: Model, tokens: Tensor, answer: str | int | None) -> tuple[int, dict[str, Any]]:
    """The token that is read of one prompt [pos], the model's own by default; and what a result says of it."""
    own = int(model.run(tokens.unsqueeze(0)).logits[0, -1].argmax())
    token = own if answer is None else one_token(model, answer)
    return token, {"answer": model.to_words([token])[0], "known": int(token == own)}
