"""Documents as rows of tokens that keep their borders: no row holds two, so no token attends over a border.

Formula:  document d of n tokens gives rows d[0:w], d[w:2w], ..., where w is the length of a row without the token that
          a tokenizer puts before every text. Rows of one length make a batch, the longest first, so that nothing is
          padded: every family runs them as it would run each alone.
Cost:     tokenises documents one after another, and of a long one only as much as is needed. Batches have about
          `length * rows` tokens, so that many short documents make few batches.
Check:    rows of one document, put together, are the document; a row's numbers are those of that row alone;
          tests/unit/test_stream_documents.py, tests/laws/test_harvest.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from microtome.errors import DataError, error
from microtome.shown import brief, shown
from microtome.stream._batches import TokenBatch, Tokenizer, bos_id, start_of
from microtome.stream._corpus import Corpus


@shown
@dataclass(frozen=True, order=True)
class Position:
    """A place in a corpus to go on from: a document, by its place in the corpus, and a token of it."""

    document: int = 0
    token: int = 0


@shown
@dataclass(frozen=True)
class Row:
    """A piece of one document.

    Attributes:
        place: where it begins.
        source: the number of the document in what the corpus was read from; another one where that is shuffled.
        group: the group of the document.
        tokens: the ids.
        offsets: for each token the character of the document at which its text begins; -1 where that is unknown.
        last: whether the document ends with it.
        long: whether the document has other rows.
    """

    place: Position
    source: int
    group: str
    tokens: tuple[int, ...]
    offsets: tuple[int, ...]
    last: bool
    long: bool

    @property
    def next(self) -> Position:
        """Where the next row begins."""
        if self.last:
            return Position(self.place.document + 1)
        return Position(self.place.document, self.place.token + len(self.tokens))


def rows_of(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    length: int,
    tokens: int | None = None,
    start: Position | None = None,
) -> Iterator[Row]:
    """The rows of a corpus in its order, from a place on.

    Args:
        corpus: the documents; those without tokens give no row.
        tokenizer: called as `tokenizer(text, add_special_tokens=False)`; a fast one also tells where tokens begin.
        length: tokens of a row, with the one that the tokenizer puts before every text, if it does.
        tokens: how many tokens of text to give at most; the last row is cut there.
        start: the place.
    """
    begins, start = bos_id(tokenizer), start or Position()
    width, left = length - (begins is not None), tokens
    for place, (source, text) in enumerate(corpus.numbered(start.document), start.document):
        first = start.token if place == start.document else 0
        ids = start_of(text, lambda part: _tokens(tokenizer, part), None if left is None else first + left + 2)
        if begins is not None and ids and ids[0][0] == begins:
            ids = ids[1:]
        group = corpus.group_of(place)
        for at in range(first, len(ids), width):
            if left is not None and left <= 0:
                return
            piece = ids[at : at + width]
            piece = piece if left is None else piece[:left]
            left = None if left is None else left - len(piece)
            last = at + len(piece) == len(ids)
            held, offsets = zip(*piece, strict=True)
            yield Row(Position(place, at), source, group, held, offsets, last, not last or at > 0)
        if left is not None and left <= 0:
            return


def _tokens(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Ids of a text without special tokens, each with the character at which it begins, or -1."""
    if not text:
        return []
    if not getattr(tokenizer, "is_fast", False):
        return [(int(token), -1) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = (first for first, _ in found["offset_mapping"])
    return [(int(token), int(first)) for token, first in zip(found["input_ids"], places, strict=True)]


def batched(rows: Sequence[Row], tokens: int) -> list[list[int]]:
    """The numbers of rows, those of one length together, about `tokens` tokens a batch, the longest rows first."""
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row.tokens), []).append(number)
    found: list[list[int]] = []
    for length, members in sorted(by_length.items(), reverse=True):
        count = max(1, tokens // length)
        found += [members[first : first + count] for first in range(0, len(members), count)]
    return found


def table_of(rows: Sequence[Row], lead: Sequence[int]) -> torch.Tensor:
    """Rows of one length as token ids [batch, pos], each behind the tokens that begin a text."""
    return torch.tensor([[*lead, *row.tokens] for row in rows], dtype=torch.int64)


@shown
class DocumentBatches:
    """A corpus as batches of rows of tokens of one document each; within a batch all rows have one length.

    Args:
        corpus: the documents.
        tokenizer: called as `tokenizer(text, add_special_tokens=False)["input_ids"]`.
        length: tokens of a row at most; longer documents make several rows, which do not see each other.
        rows: `length * rows` is how many tokens a batch has, about.
        tokens: how many tokens to take from the corpus, all of them by default.
        start: where to begin in the corpus, such as the `next` of batches that were read before.

    Attributes:
        flat: the tokens of all rows in the order of the documents; that at position p of a row is `flat[start + p]`.
        short: whether the corpus has fewer tokens than were asked for.
        split: how many documents make several rows.
        dropped: how many rows of one token were left out, in which nothing is predicted.
        next: where in the corpus to go on.

    Raises:
        DataError: a number is too small, or no document gives 2 tokens.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        length: int = 256,
        rows: int = 8,
        tokens: int | None = None,
        start: Position | None = None,
    ) -> None:
        for name, value, least in (("length", length, 2), ("rows", rows, 1), ("tokens", tokens, 2)):
            if value is not None and value < least:
                raise error(DataError, f"DocumentBatches: {name} is too small", got=value, allowed=f"{least} or more")
        self.corpus, self.length, self.rows = corpus, length, rows
        self.bos_id = bos_id(tokenizer)
        found = list(rows_of(corpus, tokenizer, length=length, tokens=tokens, start=start))
        self._rows = [row for row in found if len(row.tokens) > 1]
        if not self._rows:
            what, got = f'corpus "{corpus.name}" gives too few tokens', sum(len(row.tokens) for row in found)
            raise error(DataError, what, got=got, allowed="a document of 2 or more", do="give it more text")
        self.next = found[-1].next
        self.dropped = len(found) - len(self._rows)
        self.short = tokens is not None and sum(len(row.tokens) for row in found) < tokens
        self.split = len({row.place.document for row in self._rows if row.long})
        lead = [] if self.bos_id is None else [self.bos_id]
        self._batches = batched(self._rows, length * rows)
        self._start: list[int] = []
        self.flat: list[int] = []
        for row in self._rows:
            self._start.append(len(self.flat))
            self.flat += [*lead, *row.tokens]
        self._lead = lead

    def _facts(self) -> dict[str, str]:
        """The text, and how it is cut."""
        rows = f"{len(self._rows):,} rows of one document each, at most {self.length} tokens, in {len(self)} batches"
        asked = "fewer than were asked for" if self.short else ""
        return {"corpus": brief(self.corpus.name), "tokens": f"{len(self.flat):,}", "rows": rows, "short": asked}

    def __len__(self) -> int:
        """How many batches."""
        return len(self._batches)

    def __getitem__(self, number: int) -> TokenBatch:
        """Batch by number; negative numbers count from the end."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"no batch {number}: there are {len(self)}")
        members = self._batches[number % len(self)]
        rows = [self._rows[i] for i in members]
        tokens, lead = table_of(rows, self._lead), len(self._lead)
        inside = (torch.arange(tokens.shape[1]) - lead).clamp(min=0)
        position = torch.tensor([row.place.token for row in rows]).unsqueeze(1) + inside
        document = torch.tensor([row.place.document for row in rows]).unsqueeze(1).expand_as(tokens)
        group = torch.tensor([self._group[row.group] for row in rows]).unsqueeze(1).expand_as(tokens)
        start = torch.tensor([self._start[i] for i in members])
        return TokenBatch(tokens, start, document, position, group, lead)

    def __iter__(self) -> Iterator[TokenBatch]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of the documents reached, in the order in which they come."""
        return tuple(dict.fromkeys(row.group for row in self._rows))

    @cached_property
    def _group(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.groups)}
