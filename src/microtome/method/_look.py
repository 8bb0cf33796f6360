"""What a measure looks at: the weights alone, a text, or random tokens that repeat.

A look gives batches of tokens. Measures whose looks are equal share one pass over them. Its fields are arguments of
every measure that uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.method._declare import Argument
from microtome.run import LoadedModel
from microtome.stream import (
    Corpus,
    TokenBatch,
    TokenBatches,
    bos_id,
    joined,
    read_text,
    standard_library_text,
)
from microtome.tasks import Task


@dataclass(frozen=True)
class Batches:
    """Batches of tokens, and the names of the groups that their tokens are of."""

    parts: Sequence[TokenBatch] | TokenBatches
    groups: tuple[str, ...] = ("all",)


@dataclass(frozen=True)
class Weights:
    """The weights, layer by layer: no text is read."""

    def fitted(self, model: LoadedModel) -> Weights:
        """The same: weights have no sizes to choose."""
        return self


@dataclass(frozen=True)
class Text:
    """A text, read once in rows of tokens.

    Attributes:
        text: a corpus, the path of a file, texts, a `Task` (its clean prompts), tokens [row, pos], batches, or a
            mapping from groups to any of these; the documentation topics of the standard library by default.
        tokens, length, rows: see `TokenBatches`.
        sequences: read only so many rows, each cut to `width` tokens.
        width: tokens of those rows.
    """

    text: Any = field(default=None, compare=False)
    tokens: Annotated[int, Argument("how many tokens of the text to read", "tokens", least=2)] = 20_000
    length: Annotated[int, Argument("tokens in a row", "tokens", least=2)] = 256
    rows: Annotated[int, Argument("rows in a batch", "rows", least=1)] = 4
    sequences: int | None = None
    width: int | None = None

    def fitted(self, model: LoadedModel) -> Text:
        """The same: rows longer than the context are cut when they are made."""
        return self

    def batches(self, model: LoadedModel) -> Batches:
        """The rows of tokens.

        Raises:
            DataError: there is too little text; ModelUnsupported or PromptError: the model cannot read it.
        """
        if self.sequences is not None:
            return self._first_rows(model, self.sequences)
        text = standard_library_text() if self.text is None else self.text
        if isinstance(text, TokenBatches):
            return Batches(text, text.groups)
        if isinstance(text, Tensor):
            rows = text if text.dim() == 2 else text.unsqueeze(0)
            starts = torch.arange(len(rows)) * rows.shape[1]
            parts = zip(rows.split(self.rows), starts.split(self.rows), strict=True)
            return Batches([TokenBatch.of(part, start) for part, start in parts])
        if isinstance(text, Task):
            return _prompts(text)
        if not isinstance(text, str | Path | Corpus | Mapping) and all(isinstance(b, TokenBatch) for b in text):
            return Batches(list(text))
        if model.tokenizer is None:
            do = "give tokens [row, pos], or open it with tokenizer="
            raise error(DataError, f"{model.anatomy.name} has no tokenizer to read a text with", do=do)
        length = min(self.length, model.anatomy.n_ctx)
        made = TokenBatches(corpus_of(text), model.tokenizer, length=length, rows=self.rows, tokens=self.tokens)
        return Batches(made, made.groups)

    def _first_rows(self, model: LoadedModel, sequences: int) -> Batches:
        whole = Text(self.text, self.tokens, self.length, self.rows).batches(model)
        found: list[TokenBatch] = []
        for batch in whole.parts:
            left = sequences - sum(len(b.tokens) for b in found)
            if left <= 0:
                break
            some = (x[:left, : self.width] for x in (batch.tokens, batch.document, batch.position, batch.group))
            tokens, document, position, group = some
            found.append(TokenBatch(tokens, batch.start[:left], document, position, group, batch.lead))
        return Batches(found, whole.groups)


def _prompts(task: Task) -> Batches:
    """The clean prompts of a task, a document each, in batches of one length; its groups by name."""
    names = list(dict.fromkeys(pair.group for pair in task))
    by_length: dict[int, list[int]] = {}
    for number, pair in enumerate(task):
        by_length.setdefault(len(pair.clean_tokens), []).append(number)
    found: list[TokenBatch] = []
    for members in by_length.values():
        tokens = torch.tensor([task[i].clean_tokens for i in members])
        document = torch.tensor(members).unsqueeze(1).expand_as(tokens)
        group = torch.tensor([names.index(task[i].group) for i in members]).unsqueeze(1).expand_as(tokens)
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        found.append(TokenBatch(tokens, torch.tensor(members) * 10**6, document, position, group))
    return Batches(found, tuple(names))


def corpus_of(text: Any) -> Corpus:
    """A corpus from what was given as text: a corpus, a path, texts, or a mapping from groups to any of these.

    Raises:
        DataError: a file cannot be read, or it is no text.
    """
    if isinstance(text, Corpus):
        return text
    if isinstance(text, Mapping):
        parts = {str(name): corpus_of(part) for name, part in cast("Mapping[Any, Any]", text).items()}
        return joined(", ".join(parts), [Corpus.of(name, tuple(part), name) for name, part in parts.items()])
    if isinstance(text, Path) or (isinstance(text, str) and "\n" not in text and Path(text).suffix):
        return read_text(text)
    texts: tuple[Any, ...] = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, Iterable) else ()
    if not texts or not all(isinstance(part, str) for part in texts):
        allowed = "a corpus, a path, texts, a task, tokens, batches, or a mapping from groups to these"
        raise error(DataError, "cannot read this as text", got=type(text).__name__, allowed=allowed, do="give one")
    return Corpus.of("text", texts)


@dataclass(frozen=True)
class RepeatedTokens:
    """Random tokens that repeat once: r_0 .. r_{T-1} r_0 .. r_{T-1}, after the beginning-of-text token if there is one.

    Attributes:
        sequences: how many.
        period: T, the tokens before the repeat; by default 50, or as many as fit twice into the context.
    """

    sequences: Annotated[int, Argument("how many random sequences", "sequences", least=1)] = 16
    period: Annotated[
        int | None, Argument("tokens before the repeat; 50, or what the context has room for, without it", "tokens", 12)
    ] = None

    def fitted(self, model: LoadedModel) -> RepeatedTokens:
        """The same with a period, if it has none."""
        if self.period is not None:
            return self
        return replace(self, period=max(12, min(50, _longest_period(model))))

    def batches(self, model: LoadedModel) -> Batches:
        """The sequences, drawn by the seed of the settings evenly from the vocabulary without special tokens.

        Raises:
            ArgumentError: the repeat does not fit into the model's context.
        """
        bos, period, most = bos_id(model.tokenizer), self.fitted(model).period, _longest_period(model)
        assert period is not None
        lead = 0 if bos is None else 1
        if period > most:
            what = f"period must be an integer from 12 to {most} (tokens) for {model.anatomy.name}"
            raise error(ArgumentError, what, got=period, do="choose another value")
        special: set[int] = set(getattr(model.tokenizer, "all_special_ids", None) or ())
        allowed = torch.tensor([t for t in range(model.anatomy.d_vocab) if t not in special])
        generator = torch.Generator().manual_seed(current().seed)
        half = allowed[torch.randint(len(allowed), (self.sequences, period), generator=generator)]
        first = torch.full((self.sequences, lead), bos or 0)
        tokens = torch.cat([first, half, half], dim=1)
        starts = torch.arange(self.sequences) * tokens.shape[1]
        parts = zip(tokens.split(16), starts.split(16), strict=True)
        return Batches([TokenBatch.of(part, start, lead) for part, start in parts])


def _longest_period(model: LoadedModel) -> int:
    """How many tokens fit twice into the context, behind the token that begins a text."""
    return (model.anatomy.n_ctx - (0 if bos_id(model.tokenizer) is None else 1)) // 2


Look = Weights | Text | RepeatedTokens
