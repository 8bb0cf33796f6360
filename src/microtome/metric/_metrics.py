"""What is read off a run: one number per prompt, from logits at the positions that matter.

Formula:  logit difference  z[answer] - z[foil];     probability  softmax(z)[answer];     log-probability of it;
          rank of the answer (0 is first);   KL(base || row) = sum p_base (log p_base - log p_row), in nats;
          loss over a span = -mean log p(next token), in nats.
          Tokens are named by their ids, or as text of one token that a model's tokenizer then reads.
Check:    against plain torch on random logits; tests/unit/test_metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from microtome.errors import EditError, error
from microtome.shown import shown

if TYPE_CHECKING:
    from microtome.run import Run


Logits = Float[Tensor, "row read vocab"]
Rows = Int[Tensor, " row"]
Values = Float[Tensor, " row"]


@runtime_checkable
class Metric(Protocol):
    """Reads logits at some columns of each prompt."""

    def columns(self, prompt: int, length: int) -> list[int]:
        """The columns of a prompt of some length that it reads."""
        ...

    def read(self, logits: Logits, prompts: Rows) -> Shaped[Tensor, "row ..."]:
        """Values [row, ...] from logits [row, read, vocab] of rows that belong to prompts [row]."""
        ...


@runtime_checkable
class TokenSubsetMetric(Protocol):
    """A metric that reads few tokens of the vocabulary, so that a sweep need not compute the logits of the others."""

    def token_subset(self) -> tuple[tuple[int, ...], Metric]:
        """The token ids it reads, and the same metric over logits [row, read, id] of these alone."""
        ...


@runtime_checkable
class Vocabulary(Protocol):
    """What reads the text of tokens: an open model."""

    def to_id(self, token: str | int) -> int:
        """The id of a text of one token; an id is itself."""
        ...

    def continuation(self, text: str) -> list[int]:
        """The ids that a text becomes inside another one."""
        ...


@runtime_checkable
class TextMetric(Protocol):
    """A metric that may name its tokens as text."""

    def in_ids(self, vocabulary: Vocabulary) -> Metric:
        """The same metric with the ids of these tokens."""
        ...


def in_ids(metric: Metric, vocabulary: Vocabulary) -> Metric:
    """A metric with ids in the place of texts, as all that reads it needs it.

    Raises:
        PromptError: a text is not one token of the vocabulary, or there is no tokenizer to read it.
    """
    return metric.in_ids(vocabulary) if isinstance(metric, TextMetric) else metric


Token = int | str
Tokens = Token | Sequence[Token] | Tensor
"""One token, or one a prompt; each an id or a text."""


def _named(tokens: Any) -> tuple[Any, ...] | None:
    """The tokens that were given if any of them is a text; None if they are ids or nothing that can be read."""
    if isinstance(tokens, str):
        return (tokens,)
    if not isinstance(tokens, Sequence) or isinstance(tokens, bytes | bytearray):
        return None
    several = cast("Sequence[Any]", tokens)
    if not any(isinstance(t, str) for t in several):
        return None
    return tuple(t if isinstance(t, str) else _ids(t)[0] for t in several)


def _named_or_ids(tokens: Tokens) -> tuple[Any, ...]:
    named = _named(tokens)
    return _ids(tokens) if named is None else named


def _read_texts(tokens: Any, vocabulary: Vocabulary) -> Any:
    """The tokens with their ids in the place of texts; ids stay as they were given."""
    named = _named(tokens)
    if named is None:
        return tokens
    ids = [vocabulary.to_id(t) for t in named]
    return ids[0] if isinstance(tokens, str) else ids


def _ids(tokens: Tokens) -> tuple[int, ...]:
    """The ids that were given: one, or one a prompt.

    Raises:
        EditError: there are none, they are not whole numbers, or they are texts that no tokenizer has read yet.
    """
    if _named(tokens) is not None:
        raise error(
            EditError,
            "a metric that names tokens as text must be read by a model's tokenizer first",
            got=repr(tokens),
            do="give it to a sweep or a method, or call its in_ids(model)",
        )
    try:
        listed: list[Any] = np.atleast_1d(np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens)).tolist()
        ids = tuple(index(t) for t in listed)
    except (TypeError, ValueError):
        ids = ()
    if not ids:
        raise error(
            EditError,
            "cannot read the tokens of a metric",
            got=repr(tokens),
            allowed="one token, or one per prompt: ids, or texts of one token",
            do="give one of these",
        )
    return ids


def _ids_alone(targets: Any) -> Any:
    """Targets that are ids; texts are refused as `_ids` does."""
    return _ids(targets) if _named(targets) is not None else targets


def _pick(ids: tuple[int, ...], prompts: Rows) -> Rows:
    """The id of each row's prompt; one id serves all prompts.

    Raises:
        EditError: there are several, and yet fewer than prompts.
    """
    needed = max(prompts.tolist(), default=-1) + 1
    if 1 < len(ids) < needed:
        raise error(
            EditError,
            "a metric names fewer tokens than there are prompts",
            got=f"{len(ids)} for {needed} prompts",
            do="give one, or one per prompt",
        )
    table = torch.tensor(ids, device=prompts.device)
    return table[prompts] if len(ids) > 1 else table.expand(len(prompts))


def _columns(positions: Sequence[int], prompt: int, length: int) -> list[int]:
    """The columns of positions, those from the end counted.

    Raises:
        EditError: one lies outside the prompt.
    """
    for position in positions:
        if not -length <= position < length:
            raise error(
                EditError,
                f"a metric reads position {position} of prompt {prompt}",
                allowed=f"-{length} to {length - 1}",
                do="choose a position inside the prompt",
            )
    return [p + length if p < 0 else p for p in positions]


def _check_shape(what: str, held: Tensor, needed: tuple[int, ...]) -> None:
    """Refuse what a metric holds if it has too few prompts, or other positions or tokens than are read."""
    if held.dim() != len(needed) or held.shape[0] < needed[0] or tuple(held.shape[1:]) != needed[1:]:
        raise error(
            EditError,
            f"the {what} does not fit what is read",
            got=f"shape {list(held.shape)}",
            allowed=f"{list(needed)}, for at least that many prompts",
            do="give a row for each prompt, and a column for each position",
        )


@dataclass(frozen=True)
class _AtOne:
    """Reads one position of each prompt.

    Attributes:
        answer: one token, or one a prompt: its id, or its text, such as " Paris".
        position: where, counted from the end if negative.
    """

    answer: Tokens
    position: int = -1

    def __post_init__(self) -> None:
        _named_or_ids(self.answer)  # refuses what is no token

    def in_ids(self, vocabulary: Vocabulary) -> Metric:
        """The same metric with the ids of its tokens."""
        return cast("Metric", replace(self, answer=_read_texts(self.answer, vocabulary)))

    def columns(self, prompt: int, length: int) -> list[int]:
        """The one column."""
        return _columns((self.position,), prompt, length)

    def _answer(self, values: Logits, prompts: Rows) -> Values:
        return values[:, 0].gather(-1, _pick(_ids(self.answer), prompts).unsqueeze(-1)).squeeze(-1)


@shown
@dataclass(frozen=True)
class LogitDifference(_AtOne):
    """Logit of the answer minus logit of the foil.

    Attributes:
        foil: one token, or one a prompt, likewise.
    """

    foil: Tokens = field(kw_only=True)

    def __post_init__(self) -> None:
        answers, foils = _named_or_ids(self.answer), _named_or_ids(self.foil)
        if len(answers) != len(foils) and 1 not in (len(answers), len(foils)):
            raise error(
                EditError,
                "the numbers of answers and foils do not match",
                got=f"{len(answers)} answers and {len(foils)} foils",
                do="give one of each per prompt, or one for all",
            )
        n = max(len(answers), len(foils))
        pairs = zip(answers * (n // len(answers)), foils * (n // len(foils)), strict=True)
        if any(a == f for a, f in pairs):
            raise error(EditError, "the foil equals the answer", got=f"token {answers[0]!r}", do="choose another foil")

    def in_ids(self, vocabulary: Vocabulary) -> Metric:
        """The same metric with the ids of its tokens."""
        answer, foil = (_read_texts(tokens, vocabulary) for tokens in (self.answer, self.foil))
        return replace(self, answer=answer, foil=foil)

    def token_subset(self) -> tuple[tuple[int, ...], Metric]:
        """Answers and foils."""
        ids = tuple(dict.fromkeys(_ids(self.answer) + _ids(self.foil)))
        answer, foil = ([ids.index(i) for i in _ids(named)] for named in (self.answer, self.foil))
        return ids, LogitDifference(answer, self.position, foil=foil)

    def read(self, logits: Logits, prompts: Rows) -> Values:
        """[row], in logits."""
        logits = logits.float()
        foil = logits[:, 0].gather(-1, _pick(_ids(self.foil), prompts).unsqueeze(-1)).squeeze(-1)
        return self._answer(logits, prompts) - foil


@shown
@dataclass(frozen=True)
class Probability(_AtOne):
    """Probability of the answer."""

    def read(self, logits: Logits, prompts: Rows) -> Values:
        """[row], 0 to 1."""
        return self._answer(logits.float().softmax(-1), prompts)


@shown
@dataclass(frozen=True)
class LogProbability(_AtOne):
    """Log-probability of the answer."""

    def read(self, logits: Logits, prompts: Rows) -> Values:
        """[row], in nats, at most 0."""
        return self._answer(logits.float().log_softmax(-1), prompts)


@shown
@dataclass(frozen=True)
class Rank(_AtOne):
    """How many tokens outrank the answer."""

    def read(self, logits: Logits, prompts: Rows) -> Values:
        """[row], 0 for the first."""
        logits = logits.float()
        own = self._answer(logits, prompts).unsqueeze(-1)
        return (logits[:, 0] > own).sum(-1).float()


@shown
@dataclass(frozen=True)
class Divergence:
    """KL from the base run's distribution to the row's, summed over positions.

    Attributes:
        base: log-probabilities [prompt, read, vocab] of the unedited prompts; see `of`.
        positions: which positions are read.
    """

    base: Float[Tensor, "prompt read vocab"]
    positions: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        total = self.base.float().logsumexp(-1)
        if not torch.allclose(total, torch.zeros_like(total), atol=1e-3):
            raise error(
                EditError,
                "the base of a Divergence is not made of log-probabilities",
                got=f"they sum to exp({float(total.flatten()[0]):.4g})",
                do="give logits.log_softmax(-1), or use Divergence.of(logits)",
            )

    @classmethod
    def of(cls, base: Run | Float[Tensor, "prompt pos vocab"], positions: tuple[int, ...] = (-1,)) -> Divergence:
        """From the run of unedited prompts, or their logits [prompt, pos, vocab] if they are of one length."""
        if isinstance(base, Tensor):
            logits, spans = base, ((0, base.shape[1]),) * len(base)
        else:
            logits, spans = base.logits, base.batch.spans
        read = [[first + p for p in _columns(positions, i, length)] for i, (first, length) in enumerate(spans)]
        rows = torch.arange(len(logits), device=logits.device).unsqueeze(1)
        own = logits[rows, torch.tensor(read, device=logits.device)]
        return cls(own.detach().float().log_softmax(-1), positions)

    def columns(self, prompt: int, length: int) -> list[int]:
        """The columns of the positions."""
        return _columns(self.positions, prompt, length)

    def read(self, logits: Logits, prompts: Rows) -> Values:
        """[row], in nats, at least 0."""
        _check_shape("base of a Divergence", self.base, (int(prompts.max()) + 1, *logits.shape[1:]))
        base = self.base.to(logits.device)[prompts].float()
        weight = base.exp()
        gap = base - logits.float().log_softmax(-1)
        return (weight * gap).where(weight > 0, weight.new_zeros(())).sum((-1, -2))


@shown
@dataclass(frozen=True)
class SpanLoss:
    """Mean loss of known tokens over a span.

    Attributes:
        targets: [prompt, span] the tokens to be predicted, as a tensor, as lists of one length, or as one text per
            prompt, with its leading space.
        positions: where each is predicted from, one a target.
    """

    targets: Tensor | Sequence[Sequence[int]] | Sequence[str]
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if _named(self.targets) is not None:
            return
        try:
            targets = torch.as_tensor(self.targets)
        except (TypeError, ValueError, RuntimeError):
            targets = torch.empty(0)
        if targets.is_floating_point():
            raise error(
                EditError,
                "a SpanLoss cannot use these targets",
                got=repr(self.targets),
                allowed="token ids, equally many for each prompt",
                do="give a tensor [prompt, span] of whole numbers",
            )
        object.__setattr__(self, "targets", targets.long())

    def in_ids(self, vocabulary: Vocabulary) -> Metric:
        """The same metric with the ids of its targets.

        Raises:
            EditError: a text is not as many tokens as there are positions; with what it is.
        """
        texts = _named(self.targets)
        if texts is None:
            return self
        rows = [vocabulary.continuation(text) for text in texts]
        wrong = next((i for i, row in enumerate(rows) if len(row) != len(self.positions)), None)
        if wrong is not None:
            got, allowed = f"{texts[wrong]!r}, {len(rows[wrong])} tokens", f"{len(self.positions)}, one per position"
            what, do = (
                "a target of a SpanLoss does not fit its positions",
                "name one position per token",
            )
            raise error(EditError, what, got=got, allowed=allowed, do=do)
        return replace(self, targets=torch.tensor(rows))

    def columns(self, prompt: int, length: int) -> list[int]:
        """The columns of the positions."""
        return _columns(self.positions, prompt, length)

    def read(self, logits: Logits, prompts: Rows) -> Values:
        """[row], in nats."""
        targets = torch.as_tensor(_ids_alone(self.targets))
        _check_shape("targets of a SpanLoss", targets, (int(prompts.max()) + 1, logits.shape[1]))
        vocab = logits.shape[-1]
        bad = targets[(targets < 0) | (targets >= vocab)]
        if len(bad):
            raise error(
                EditError,
                "the targets of a SpanLoss lie outside the vocabulary",
                got=int(bad[0]),
                allowed=f"0 to {vocab - 1}",
                do="name tokens of the model",
            )
        targets = targets.to(logits.device)[prompts].unsqueeze(-1)
        return -logits.float().log_softmax(-1).gather(-1, targets).squeeze(-1).mean(-1)


@shown
@dataclass(frozen=True)
class FunctionMetric:
    """A metric of your own: a function of logits [row, read, vocab] and prompts [row]."""

    function: Callable[[Tensor, Tensor], Tensor]
    positions: tuple[int, ...] = (-1,)

    def columns(self, prompt: int, length: int) -> list[int]:
        """The columns of the positions."""
        return _columns(self.positions, prompt, length)

    def read(self, logits: Logits, prompts: Rows) -> Shaped[Tensor, "row ..."]:
        """What the function returns, [row, ...].

        Raises:
            EditError: it returns something else than a tensor of as many rows.
        """
        values = cast("Any", self.function)(logits, prompts)
        if isinstance(values, Tensor) and values.shape[:1] == prompts.shape:
            return values
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise error(
            EditError,
            "the function of a FunctionMetric did not return one value per row",
            got=got,
            allowed=f"a tensor of {len(prompts)} rows",
            do="keep the first axis of the logits",
        )
