"""Pairs of prompts, aligned token by token, and what is read of them: from prompts, a task, or a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from microtome.errors import PromptError, SiteError, error
from microtome.explain._answers import Answer, answers_and_foils, metric_in_words, metric_of
from microtome.explain._spans import span_of
from microtome.files import PAIRS
from microtome.method import Argument, Span
from microtome.metric import LogitDifference, LogProbability, Metric
from microtome.model import Model
from microtome.run import Encoding, Prompt, Run, prompt_from_text
from microtome.shown import shown
from microtome.tasks import Task, read, require_fit

Given = Prompt | Task | os.PathLike[str]
Place = tuple[int, int]
SMALLEST_GAP = 1e-4
"""What rounding may leave of the difference between two equal metrics."""

Clean = Annotated[
    Given,
    Argument(
        "the prompt with the answer, or several; a task; a .csv or .jsonl file",
        positional=True,
        from_text=prompt_from_text,
    ),
]
Corrupt = Annotated[
    Prompt | None,
    Argument(
        "prompts of as many tokens with another answer, one per clean prompt",
        positional=True,
        from_text=prompt_from_text,
    ),
]
AnswerOfClean = Annotated[
    Answer | None, Argument("the clean prompt's answer, one token, or one per pair", from_text=str)
]
FoilOfCorrupt = Annotated[
    Answer | None, Argument("the corrupt prompt's answer; without it, only the answer is read", from_text=str)
]
ReadMetric = Annotated[
    Metric | None, Argument("metric to use instead of the answer, of prompt i for pair i", command=False)
]
Direction = Annotated[
    str, Argument('"denoise" puts clean values into the corrupt run, "noise" the reverse', choices=("denoise", "noise"))
]
Spans = Annotated[
    Mapping[str, Span] | Sequence[Mapping[str, Span]] | None,
    Argument("named spans in each pair's clean prompt, or in all of them", command=False),
]


@dataclass(frozen=True)
class _Some:
    """A metric of many prompts, read of some of them, by their numbers."""

    metric: Metric
    numbers: tuple[int, ...]

    def columns(self, prompt: int, length: int) -> list[int]:
        """The columns of the prompt."""
        return self.metric.columns(self.numbers[prompt], length)

    def read(self, logits: Float[Tensor, "row read vocab"], prompts: Int[Tensor, " row"]) -> Shaped[Tensor, "row ..."]:
        """What the metric reads of the prompts, [row, ...]."""
        return self.metric.read(logits, torch.tensor(self.numbers, device=prompts.device)[prompts])


@shown
@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean and corrupt prompts, and what is read of them.

    Attributes:
        tokens: of each pair [2, pos], the clean prompt and the corrupt one.
        metric: what is read of prompt i for pair i.
        answer_ids, foil_ids: the tokens that it compares, where it is of single tokens.
        answer, foil: in words, one per pair; none where another metric is read.
        spans: by name, where each pair has it; only those that all pairs have.
        groups: of each pair, where its task tells them.
    """

    tokens: tuple[Int[Tensor, "2 _"], ...]
    metric: Metric
    answer_ids: tuple[int, ...] = ()
    foil_ids: tuple[int, ...] = ()
    answer: tuple[str, ...] = ()
    foil: tuple[str, ...] = ()
    spans: Mapping[str, tuple[Place, ...]] = field(default_factory=dict[str, tuple[Place, ...]])
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, some: slice) -> Pairs:
        """Some of them, numbered anew."""
        return self.take(range(*some.indices(len(self))))

    def take(self, numbers: Sequence[int]) -> Pairs:
        """Those of some numbers, one of them as often as it is named; numbered anew."""

        def of(own: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(own[i] for i in numbers) if own else ()

        answers, foils = of(self.answer_ids), of(self.foil_ids)
        same = list(numbers) == list(range(len(self)))
        metric = _of_tokens(answers, foils) if answers else self.metric if same else _Some(self.metric, tuple(numbers))
        return replace(
            self, tokens=of(self.tokens), metric=metric, answer_ids=answers, foil_ids=foils, answer=of(self.answer),
            foil=of(self.foil), groups=of(self.groups), spans={name: of(places) for name, places in self.spans.items()},
        )  # fmt: skip

    def batches(self, most: int) -> Iterator[list[int]]:
        """The numbers of pairs of one length, at most so many together."""
        by_length: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(i)
        for numbers in by_length.values():
            yield from (numbers[first : first + most] for first in range(0, len(numbers), most))

    @property
    def lengths(self) -> list[int]:
        """How many tokens the prompts of each pair have."""
        return [pair.shape[1] for pair in self.tokens]

    def start(self, direction: str) -> list[Int[Tensor, " _"]]:
        """The prompts that are patched: the corrupt ones to denoise, the clean ones to noise."""
        return [pair[int(direction == "denoise")] for pair in self.tokens]

    def goal(self, direction: str) -> list[Int[Tensor, " _"]]:
        """The prompts that values are taken from."""
        return [pair[int(direction != "denoise")] for pair in self.tokens]

    def read(self, run: Run) -> Float[Tensor, " pair"]:
        """The metric of a run of one prompt of each pair."""
        found: list[Tensor] = []
        for i, (pads, length) in enumerate(run.batch.spans):
            columns = [pads + column for column in self.metric.columns(i, length)]
            number = torch.tensor([i], device=run.logits.device)
            found.append(self.metric.read(run.logits[i : i + 1, columns], number).reshape(1))
        return torch.cat(found)

    def answered(self, model: Model) -> float:
        """The share of clean prompts of which the answer is the most likely next token."""
        right = 0
        for some in self.batches(8):
            logits = model.run([self.tokens[i][0] for i in some]).logits[:, -1].argmax(-1).tolist()
            right += sum(own == self.answer_ids[i] for own, i in zip(logits, some, strict=True))
        return right / len(self)

    @property
    def unit(self) -> str:
        """Of the metric."""
        return metric_in_words(self.metric)[1]

    def attrs(self) -> dict[str, Any]:
        """What a result says of them: the metric in words, and answer and foil where all pairs share them."""
        attributes: dict[str, Any] = {"metric": metric_in_words(self.metric)[0], "pairs": len(self)}
        for name, words in (("answer", self.answer), ("foil", self.foil)):
            if len(set(words)) == 1:
                attributes[name] = words[0]
        return attributes


def pairs_of(
    model: Model,
    clean: Given,
    corrupt: Prompt | None = None,
    *,
    answer: Answer | None = None,
    foil: Answer | None = None,
    metric: Metric | None = None,
    spans: Mapping[str, Span] | Sequence[Mapping[str, Span]] | None = None,
) -> Pairs:
    """The pairs that are meant: prompts and others, a task, or a file of pairs.

    Args:
        model: whose tokens they are.
        clean: prompts with the answers; or, without `corrupt`, a `Task` or the path of a .csv or .jsonl file.
        corrupt: one per clean prompt, of the same number of tokens.
        answer: one token, or one per pair; those of the task where it is one.
        foil: the same of the corrupt prompts.
        metric: what is read instead.
        spans: names and what they mean in each clean prompt; those of the task where it is one.

    Raises:
        PromptError: a pair does not align or is one prompt twice, an answer or foil does not fit, there is nothing to
            read, or a span is not in its prompt.
        SiteError: the metric reads only what comes before the prompts of a pair differ.
        DataError: the file cannot be read as pairs.
        ArgumentError: the metric is none.
    """
    task = task_of(model, clean) if corrupt is None else None
    if corrupt is None and task is None:
        do = "give corrupt=, give a Task, or name a .csv or .jsonl file of pairs"
        raise error(PromptError, "there is no corrupt prompt", do=do)
    if corrupt is not None and isinstance(clean, Task):
        raise error(PromptError, "a task has corrupt prompts of its own", got="corrupt=", do="leave it out")
    sides: list[Any] = [clean, corrupt] if task is None else [task.clean_tokens, task.corrupt_tokens]
    batches = [model.to_batch(side).rows for side in sides]
    counts = [len(rows) for rows in batches]
    if counts[0] != counts[1]:
        what, do = "there must be one corrupt prompt per clean one", "give as many of each"
        raise error(PromptError, what, got=counts[1], allowed=str(counts[0]), do=do)
    names = [f"pair {i}: " if counts[0] > 1 else "" for i in range(counts[0])]
    tokens = tuple(aligned(model, a, b, of) for a, b, of in zip(*batches, names, strict=True))
    pairs = _reading(model, tokens, task, answer, foil, metric)
    for i, pair in enumerate(tokens):
        require_effect_on_metric(model, pairs.metric, pair, i, names[i])
    groups = () if task is None else tuple(pair.group for pair in task)
    texts = _texts(model, clean, task, batches[0])
    return replace(pairs, spans=_spans(model, texts, task, spans), groups=groups)


def pairs_given(model: Model, given: Any) -> Pairs:
    """Other pairs, given as one value: pairs, the arguments of `pairs_of` by name, a task, or the path of a file.

    Raises:
        PromptError, DataError: as `pairs_of`.
    """
    if isinstance(given, Pairs):
        return given
    if isinstance(given, Mapping):
        return pairs_of(model, **cast("Mapping[str, Any]", given))
    return pairs_of(model, given)


def _texts(model: Model, clean: Given, task: Task | None, rows: Sequence[Tensor]) -> Sequence[Encoding | Tensor]:
    """The clean prompts as they were written, where there is a tokenizer to read them."""
    if model.tokenizer is None or (task is not None and not task.text):
        return rows
    return model.encodings([pair.clean for pair in task] if task is not None else cast("Prompt", clean))


def task_of(model: Model, given: Given) -> Task | None:
    """The task that was given, as it is or as the path of a file of pairs; None where these are prompts.

    Raises:
        PromptError: the task was built with another tokenizer; DataError: the file cannot be read as pairs.
    """
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.lower().endswith(PAIRS)):
        return read(given, model)
    if not isinstance(given, Task):
        return None
    require_fit(model, given.pairs, given.text)
    return given


def aligned(model: Model, clean: Prompt, corrupt: Prompt, of: str = "") -> Int[Tensor, "2 pos"]:
    """Tokens of two prompts of one length.

    Raises:
        PromptError: their lengths differ; names the first difference, behind `of`.
    """
    rows = [model.to_batch(p).tokens for p in (clean, corrupt)]
    if any(r.shape[0] != 1 for r in rows):
        raise error(PromptError, "a pair is one clean and one corrupt prompt", got=str([r.shape[0] for r in rows]))
    lengths = [r.shape[1] for r in rows]
    if lengths[0] == lengths[1]:
        return torch.cat(rows)
    words = [model.to_words(r[0]) for r in rows]
    at = next((i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b), min(lengths))
    there = [str(row[at : at + 3]) if row[at:] else "its end" for row in words]
    raise error(
        PromptError, f"{of}the prompts do not align: they differ first at token {at}",
        got=f"{lengths[0]} and {lengths[1]} tokens, {there[0]} against {there[1]}",
        allowed="the same number of tokens", do="reword one so that every token has its counterpart",
    )  # fmt: skip


def _reading(
    model: Model,
    tokens: tuple[Int[Tensor, "2 _"], ...],
    task: Task | None,
    answer: Answer | None,
    foil: Answer | None,
    metric: Metric | None,
) -> Pairs:
    """The pairs with what is read: a metric that was given, answers that were given, or those of the task."""
    if metric is not None and not (answer is None and foil is None):
        raise error(PromptError, "a metric and an answer cannot both be read", do="give one of them")
    if foil is not None and answer is None:
        raise error(PromptError, "a foil needs an answer to be compared with", do="give answer= too")
    if metric is not None:
        return Pairs(tokens, metric_of(model, metric, [pair[0] for pair in tokens]))
    if answer is None and task is not None:
        sets = [pair.answer_ids for pair in task], [pair.foil_ids for pair in task]
        if not all(len(ids) == 1 for side in sets for ids in side):
            words = tuple(pair.answer for pair in task), tuple(pair.foil for pair in task)
            return Pairs(tokens, task.metric(), answer=words[0], foil=words[1])
        answer, foil = ([ids[0] for ids in side] for side in sets)
    if answer is None:
        raise error(PromptError, "there is nothing to read", do="give answer= or metric=")
    answers, foils = answers_and_foils(model, answer, foil, [pair[0] for pair in tokens])
    ids = tuple(answers), tuple(foils or ())
    words = tuple(model.to_words(answers)), tuple(model.to_words(foils) if foils else ())
    return Pairs(tokens, _of_tokens(*ids), *ids, *words)


def _of_tokens(answers: tuple[int, ...], foils: tuple[int, ...]) -> Metric:
    return LogitDifference(answers, foil=foils) if foils else LogProbability(answers)


def _spans(
    model: Model, texts: Sequence[Encoding | Tensor], task: Task | None, spans: Any
) -> dict[str, tuple[Place, ...]]:
    """By name, where each pair has the spans that all of them have."""
    if spans is None:
        given: list[Mapping[str, Span]] = [] if task is None else [pair.spans for pair in task]
    else:
        given = [spans] * len(texts) if isinstance(spans, Mapping) else list(spans)
    if spans is not None and len(given) != len(texts):
        do = "give one mapping from names to places per pair"
        raise error(PromptError, "there must be spans for each pair", got=len(given), allowed=str(len(texts)), do=do)
    names = [name for name in (given[0] if given else ()) if all(name in own for own in given)]
    if spans is not None and not names:
        got = str([list(own) for own in given[:3]])
        raise error(PromptError, "the pairs have no span in common", got=got, do="name the same places in all of them")
    placed = list(zip(texts, given, strict=True)) if given else []
    return {name: tuple(span_of(model, prompt, own[name], name) for prompt, own in placed) for name in names}


def require_effect_on_metric(
    model: Model, metric: Metric, tokens: Int[Tensor, "2 pos"], number: int = 0, of: str = ""
) -> None:
    """Refuse a pair [2, pos], named by `of`, of which no patch can reach what is read.

    Raises:
        PromptError: its prompts are the same, so that there is nothing to patch.
        SiteError: the metric reads only what comes before they differ; says where.
    """
    differ = (tokens[0] != tokens[1]).nonzero().flatten().tolist()
    if not differ:
        raise error(
            PromptError, f"{of}the clean and the corrupt prompt are the same, so that there is nothing to patch",
            do="change what the answer depends on",
        )  # fmt: skip
    reads = metric.columns(number, tokens.shape[1])
    if model.anatomy.causal and max(reads) < differ[0]:
        raise error(
            SiteError, f"{of}the metric does not depend on what is patched, so that every effect would be 0",
            got=f"it reads positions {reads}, and the prompts differ from token {differ[0]} on",
            do="read a later position",
        )  # fmt: skip
