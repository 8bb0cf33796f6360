"""Turn anything given as text into batches of tokens, with the names of their groups.

Groups that come as a mapping, or as the groups of a corpus, are cut into rows of their own, so that no row holds two of
them and no token attends over their border; each has an equal share of the tokens that are read. Their documents keep
their borders too: see `DocumentBatches`. A text without groups is joined, as `TokenBatches` does; whoever wants its
documents apart gives a `DocumentBatches`, and whoever wants those of groups joined a `TokenBatches` of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from microtome.errors import DataError, MicrotomeWarning, error
from microtome.run import LoadedModel
from microtome.stream import (
    Corpus,
    DocumentBatches,
    TokenBatch,
    TokenBatches,
    bos_id,
    rows_of,
    standard_library_text,
    unreadable,
)
from microtome.stream import corpus_of as corpus_of
from microtome.tasks import Task

ALLOWED = "a corpus, a path, texts, a task, tokens [row, pos], batches, or a mapping from groups to these"


@dataclass(frozen=True)
class Batches:
    """Batches of tokens, the names of the groups that their tokens are of, and what they were read from."""

    parts: Sequence[TokenBatch] | TokenBatches | DocumentBatches
    groups: tuple[str, ...] = ("all",)
    source: str = ""

    def first(self, sequences: int, width: int | None) -> Batches:
        """The first rows, each cut to `width` tokens; of several groups as many of each."""
        share = max(1, sequences // len(self.groups))
        taken = dict.fromkeys(range(len(self.groups)), 0)
        found: list[TokenBatch] = []
        for batch in self.parts:
            keep: list[int] = []
            for row, group in enumerate(batch.group[:, -1].tolist()):
                if taken[group] < share:
                    taken[group] += 1
                    keep.append(row)
            if keep:
                some = (x[keep, :width] for x in (batch.tokens, batch.document, batch.position, batch.group))
                tokens, document, position, group_of = some
                found.append(TokenBatch(tokens, batch.start[keep], document, position, group_of, batch.lead))
            if min(taken.values()) >= share:
                break
        return replace(self, parts=found)


def batches_of(text: Any, model: LoadedModel, *, tokens: int, length: int, rows: int) -> Batches:
    """Batches of whatever was given as text; see `Text`.

    Raises:
        DataError: it is no text, there is too little of it, or the model has no tokenizer to read it with.
    """
    if text is None:
        text = standard_library_text()
    if isinstance(text, str | Path) or hasattr(text, "column_names"):  # the latter is a data set
        text = corpus_of(text)
    if isinstance(text, Corpus) and len(set(text.groups)) > 1:
        text = by_group(text)
    if isinstance(text, Mapping):
        return _of_groups(cast("Mapping[Any, Any]", text), model, tokens=tokens, length=length, rows=rows)
    if isinstance(text, TokenBatches | DocumentBatches):
        return Batches(text, text.groups, _named(text.corpus))
    if isinstance(text, Tensor):
        return _of_tensor(text, model, rows)
    if isinstance(text, Task):
        return _of_task(text, model, rows)
    if not isinstance(text, Corpus | Iterable):
        raise unreadable(text, ALLOWED)
    if not isinstance(text, Corpus):
        items: list[Any] = list(text)
        if items and all(isinstance(item, TokenBatch) for item in items):
            return _of_batches(items)
        text = items
    _require_tokenizer(model)
    made = TokenBatches(corpus_of(text), model.tokenizer, length=length, rows=rows, tokens=tokens)
    return Batches(made, made.groups, _named(made.corpus))


def _require_tokenizer(model: LoadedModel) -> None:
    if model.tokenizer is None:
        do = "give tokens [row, pos], or open it with tokenizer="
        raise error(DataError, f"{model.anatomy.name} has no tokenizer to read a text with", do=do)


def _named(corpus: Corpus) -> str:
    return f"{corpus.name}, sha256 {corpus.sha256[:16]}"


def by_group(corpus: Corpus) -> dict[str, Corpus]:
    """A corpus for each group of another, its documents in their order."""
    documents: dict[str, list[str]] = {}
    for number, text in enumerate(corpus):
        documents.setdefault(corpus.group_of(number), []).append(text)
    return {name: Corpus.of(name, texts, name) for name, texts in documents.items()}


def _of_groups(texts: Mapping[Any, Any], model: LoadedModel, *, tokens: int, length: int, rows: int) -> Batches:
    """Batches of each group in turn, numbered on."""
    if not texts:
        raise error(DataError, "the mapping from groups to texts is empty", do="give one group or more")
    found: list[TokenBatch] = []
    sources: list[str] = []
    start = document = 0
    for number, (name, part) in enumerate(texts.items()):
        own = _of_group(str(name), part, model, tokens=max(2, tokens // len(texts)), length=length, rows=rows)
        if own is None:
            continue
        sources.append(own.source)
        moved = [
            replace(
                batch, start=batch.start + start, document=batch.document + document,
                group=torch.full_like(batch.group, number),
            )
            for batch in own.parts
        ]  # fmt: skip
        start = max(int(batch.start.max()) + batch.tokens.shape[1] for batch in moved)
        document = max(int(batch.document.max()) for batch in moved) + 1
        found += moved
    if not found:
        what = "no group of the text has a document of 2 tokens or more"
        raise error(DataError, what, got=", ".join(map(str, texts)), do="give them more text")
    return Batches(found, tuple(map(str, texts)), "; ".join(sources))


def _of_group(name: str, part: Any, model: LoadedModel, *, tokens: int, length: int, rows: int) -> Batches | None:
    """Batches of one group, its documents apart; None, with a warning, where it has too few tokens."""
    if isinstance(part, TokenBatches | DocumentBatches | Tensor | Task | Mapping) or _are_batches(part):
        return batches_of(part, model, tokens=tokens, length=length, rows=rows)
    _require_tokenizer(model)
    corpus = standard_library_text() if part is None else corpus_of(part)
    if not any(len(row.tokens) > 1 for row in rows_of(corpus, model.tokenizer, length=length, tokens=tokens)):
        what = f'group "{name}" has no document of 2 tokens or more: nothing is known of it, its values are not numbers'
        warnings.warn(str(error(DataError, what, do="give it more text")), MicrotomeWarning, stacklevel=2)
        return None
    made = DocumentBatches(corpus, model.tokenizer, length=length, rows=rows, tokens=tokens)
    return Batches(made, made.groups, _named(corpus))


def _are_batches(part: object) -> bool:
    return isinstance(part, Sequence) and bool(part) and isinstance(part[0], TokenBatch)


def _of_tensor(tokens: Tensor, model: LoadedModel, rows: int) -> Batches:
    fits = tokens.dim() in (1, 2) and tokens.numel() and tokens.dtype in (torch.int64, torch.int32, torch.int16)
    if not fits:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise error(DataError, "tokens must be integers [row, pos]", got=got, do="give the ids of a tokenizer")
    table = tokens.long() if tokens.dim() == 2 else tokens.long().unsqueeze(0)
    starts, lead = torch.arange(len(table)) * table.shape[1], _lead(model, table)
    parts = zip(table.split(rows), starts.split(rows), strict=True)
    return Batches([TokenBatch.of(part, start, lead) for part, start in parts], source="tokens")


def _lead(model: LoadedModel, tokens: Tensor) -> int:
    """1 where every row begins with the tokenizer's beginning-of-text token, which is no text; else 0."""
    bos = bos_id(model.tokenizer)
    return int(bos is not None and bool((tokens[:, 0] == bos).all()))


def _of_batches(batches: Sequence[TokenBatch]) -> Batches:
    """Batches that were made outside; their groups are called by their numbers.

    Raises:
        DataError: two rows have one start, and would be taken for one example.
    """
    starts = torch.cat([batch.start for batch in batches])
    if len(starts.unique()) < len(starts):
        do = "give each batch the starts of its rows: TokenBatch.of(tokens, start=...)"
        raise error(DataError, "two rows of the batches have the same start", got=f"{len(starts)} rows", do=do)
    count = 1 + max(int(batch.group.max()) for batch in batches)
    return Batches(list(batches), tuple(map(str, range(count))) if count > 1 else ("all",), "batches")


def _of_task(task: Task, model: LoadedModel, rows: int) -> Batches:
    """The clean prompts of a task, one document each, in batches of one length; its groups by name."""
    names = list(dict.fromkeys(pair.group for pair in task))
    by_length: dict[int, list[int]] = {}
    for number, pair in enumerate(task):
        by_length.setdefault(len(pair.clean_tokens), []).append(number)
    found: list[TokenBatch] = []
    start = 0
    for length, every in sorted(by_length.items()):
        for members in (every[first : first + rows] for first in range(0, len(every), rows)):
            tokens = torch.tensor([task[i].clean_tokens for i in members])
            document = torch.tensor(members).unsqueeze(1).expand_as(tokens)
            group = torch.tensor([names.index(task[i].group) for i in members]).unsqueeze(1).expand_as(tokens)
            lead = _lead(model, tokens)
            position = (torch.arange(length) - lead).clamp(min=0).expand_as(tokens)
            starts = start + torch.arange(len(members)) * length
            found.append(TokenBatch(tokens, starts, document, position, group, lead))
            start += tokens.numel()
    return Batches(found, tuple(names), f"task {task.name}")
