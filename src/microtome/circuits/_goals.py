"""What a masked model should say: the bigrams of a text, its own whole self, or the answers of a task.

Formula:  KL(p || q) in nats, q the model's next-token distribution, in the mean over a row's read positions:
          bigram   p(. | token) = how often each token follows this one in the learned rows, of all that follow it there
          model    p = what the whole model says there
          answers  p = the answer, at the last position, so that KL is -log q(answer)
          loss of a row = -log q of the token that follows, or of the answer.
          Of texts every position is read that has a token behind it, but those of a leading token; for bigrams those
          alone whose token the learned rows have with one behind it: no judged row adds to what it is judged by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from microtome.errors import ArgumentError, DataError, error
from microtome.method import Text
from microtome.model import Model
from microtome.tasks import Task, read, require_fit

TARGETS = ("bigram", "model", "answers")
HELD_OUT = 4
"""Each row of so many is judged, the others are learned from."""

Rows = Int[Tensor, "row pos"]
Logits = Float[Tensor, "row pos vocab"]
PerRow = Float[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class Bigrams:
    """Which tokens follow each token, and how often.

    Attributes:
        first, count: [vocab] where those of a token begin, and how many they are.
        token, share: of each, one token after the other.
        entropy: [vocab] in nats.
        likely: [vocab] the most frequent; -1 where none follows.
    """

    first: Int[Tensor, " vocab"]
    count: Int[Tensor, " vocab"]
    token: Int[Tensor, " bigram"]
    share: Float[Tensor, " bigram"]
    entropy: Float[Tensor, " vocab"]
    likely: Int[Tensor, " vocab"]

    @classmethod
    def of(cls, rows: Sequence[Int[Tensor, " pos"]], lead: int, vocab: int) -> Bigrams:
        """Those of rows, without what follows leading tokens."""
        pairs = torch.cat([row[lead:-1] * vocab + row[lead + 1 :] for row in rows])
        both, times = pairs.unique(return_counts=True)
        before, after = both // vocab, both % vocab
        count = torch.bincount(before, minlength=vocab)
        first = count.cumsum(0) - count
        share = times.double() / torch.zeros(vocab, dtype=torch.float64).index_add_(0, before, times.double())[before]
        entropy = torch.zeros(vocab, dtype=torch.float64).index_add_(0, before, -share * share.log())
        order = torch.argsort(share, stable=True)
        likely = torch.full((vocab,), -1)
        likely[before[order]] = after[order]  # the last that is written is the largest
        return cls(first, count, after, share.float(), entropy.float(), likely)

    def cross(self, now: Int[Tensor, " place"], log_q: Float[Tensor, "place vocab"]) -> Float[Tensor, " place"]:
        """- sum over what follows of its share times log q."""
        count, first = self.count[now], self.first[now]
        place = torch.arange(len(now)).repeat_interleave(count)
        within = torch.arange(len(place)) - (count.cumsum(0) - count).repeat_interleave(count)
        at = first.repeat_interleave(count) + within
        device = log_q.device
        values = log_q[place.to(device), self.token[at].to(device)] * self.share[at].to(device)
        return -log_q.new_zeros(len(now)).index_add(0, place.to(device), values)


@dataclass(frozen=True, eq=False)
class Goal:
    """Rows of tokens, and what is to be predicted.

    Attributes:
        target: one of `TARGETS`.
        rows: tokens of each row.
        lead: tokens at the beginning of a row that are no text.
        answers: of a task, the answer of each row; else none.
        bigrams: where they are the target.
        source: what the rows were read from.
    """

    target: str
    rows: tuple[Int[Tensor, " pos"], ...]
    lead: int = 0
    answers: tuple[int, ...] = ()
    bigrams: Bigrams | None = None
    source: str = ""

    @property
    def halves(self) -> tuple[list[int], list[int]]:
        """The rows that are learned from, and those that are judged, where any place of them is read."""
        every = range(len(self.rows))
        judged = [i for i in every if _is_judged(i) and bool(self._seen([i]).any())]
        return [i for i in every if not _is_judged(i)], judged

    def together(self, numbers: Sequence[int], most: int) -> Iterator[list[int]]:
        """Numbers of rows of one length, at most so many together."""
        lengths: dict[int, list[int]] = {}
        for i in numbers:
            lengths.setdefault(len(self.rows[i]), []).append(i)
        for own in lengths.values():
            yield from (own[first : first + most] for first in range(0, len(own), most))

    def tokens(self, numbers: Sequence[int]) -> Rows:
        """Of rows of one length."""
        return torch.stack([self.rows[i] for i in numbers])

    def _seen(self, numbers: Sequence[int]) -> Bool[Tensor, "row place"]:
        """Which places of rows have a token that the target knows."""
        now = self._cut(self.tokens(numbers)).cpu()
        return torch.ones_like(now, dtype=torch.bool) if self.bigrams is None else self.bigrams.count[now] > 0

    def _mean(self, values: Float[Tensor, "row place"], numbers: Sequence[int]) -> PerRow:
        """The mean over the read places of each row."""
        seen = self._seen(numbers).to(values.device)
        return torch.where(seen, values, 0.0).sum(1) / seen.sum(1)

    @property
    def share_read(self) -> float:
        """The share of the places of all held-out rows that is read."""
        every = [i for i in range(len(self.rows)) if _is_judged(i)]
        seen = [self._seen([i]) for i in every]
        return sum(int(x.sum()) for x in seen) / max(1, sum(x.numel() for x in seen))

    def _cut(self, x: Shaped[Tensor, " row pos *of"]) -> Tensor:
        """The positions that are read."""
        return x[:, -1:] if self.answers else x[:, self.lead : -1]

    def predicted(self, logits: Logits) -> Tensor:
        """What a model predicts, as `divergence` takes it."""
        return self._cut(logits).float().log_softmax(-1)

    def divergence(self, logits: Logits, numbers: Sequence[int], whole: Tensor | None = None) -> PerRow:
        """KL from the target to what is predicted, of each row; `whole` is what the whole model predicts."""
        if self.target == "answers":
            return self.loss(logits, numbers)
        log_q = self.predicted(logits)
        if self.bigrams is None:
            assert whole is not None
            return self._mean((whole.exp() * (whole - log_q)).sum(-1), numbers)
        now = self._cut(self.tokens(numbers)).flatten().cpu()
        cross = self.bigrams.cross(now, log_q.flatten(0, 1)) - self.bigrams.entropy[now].to(log_q.device)
        return self._mean(cross.view(len(numbers), -1), numbers)

    def loss(self, logits: Logits, numbers: Sequence[int]) -> PerRow:
        """-log q of the tokens that follow, or of the answer."""
        log_q = self.predicted(logits)
        next_ = torch.tensor([[self.answers[i]] for i in numbers]) if self.answers else self.tokens(numbers)[
            :, self.lead + 1 :
        ]  # fmt: skip
        return self._mean(-log_q.gather(-1, next_.to(log_q.device).unsqueeze(-1)).squeeze(-1), numbers)

    def likely(self, logits: Logits, numbers: Sequence[int]) -> Int[Tensor, "row place"]:
        """The tokens that the target holds likeliest; `logits` are of the whole model."""
        if self.target == "answers":
            return torch.tensor([[self.answers[i]] for i in numbers])
        if self.bigrams is None:
            return self._cut(logits).argmax(-1).cpu()
        return self.bigrams.likely[self._cut(self.tokens(numbers)).cpu()]

    def places(self, x: Shaped[Tensor, " row pos *of"]) -> Tensor:
        """The read positions of anything that has positions."""
        return self._cut(x)


def goal_of(model: Model, given: Any, target: str | None, *, tokens: int, length: int) -> Goal:
    """The rows and the target that are meant.

    Raises:
        ArgumentError: answers are asked of a text, or bigrams of a task.
        DataError: there are fewer than 4 rows, or it can be read as neither.
    """
    if isinstance(given, str) and target == "answers":
        given = read(given, model)
    if isinstance(given, Task):
        goal = _of_task(model, given, "answers" if target is None else target)
    else:
        goal = _of_text(model, given, "bigram" if target is None else target, tokens, length)
    if len(goal.rows) < HELD_OUT:
        raise error(DataError, "a mask is learned from some rows and judged on others", got=f"{len(goal.rows)} rows",
                    allowed=f"{HELD_OUT} or more", do="give more text or pairs, or shorter rows")  # fmt: skip
    if not goal.halves[1]:
        raise error(DataError, "no token of the judged rows is followed by any in the learned ones",
                    got=f"{len(goal.rows)} rows", do="give more text")  # fmt: skip
    return goal


def _is_judged(row: int) -> bool:
    """Whether a row of this number is held out."""
    return row % HELD_OUT == HELD_OUT - 1


def _of_task(model: Model, task: Task, target: str) -> Goal:
    if target == "bigram":
        raise error(ArgumentError, "a task has no bigrams", got='target="bigram"', allowed="model, answers",
                    do="give a text")  # fmt: skip
    require_fit(model, task.pairs, task.text)
    rows = tuple(torch.tensor(row) for row in task.clean_tokens)
    return Goal(target, rows, answers=tuple(pair.answer_ids[0] for pair in task), source=task.name)


def _of_text(model: Model, text: Any, target: str, tokens: int, length: int) -> Goal:
    if target == "answers":
        raise error(ArgumentError, "a text has no answers", got='target="answers"', allowed="bigram, model",
                    do="give a task, or a file of pairs")  # fmt: skip
    found = Text(text, tokens=tokens, length=length, rows=1).batches(model)
    batches = list(found.parts)
    lead = max((batch.lead for batch in batches), default=0)
    rows = tuple(row for batch in batches for row in batch.tokens if len(row) > lead + 1)
    learned = [row for i, row in enumerate(rows) if not _is_judged(i)]
    bigrams = Bigrams.of(learned, lead, model.anatomy.d_vocab) if target == "bigram" and rows else None
    return Goal(target, rows, lead, bigrams=bigrams, source=found.source)
