"""Documents as batches of token rows, in a fixed order.

Formula:  flat = d_0, sep, d_1, sep, ... cut to `tokens`; row r is flat[r length : (r + 1) length]. A tokenizer that
          begins every text with a token of its own has it at the head of every row, before `length - 1` of the others,
          and leaves it out of documents that were written with it.
Cost:     tokenises documents only until there are enough tokens, and of a long document only as much as is needed.
Check:    rows concatenated give `flat`; the same tokens as tokenising everything first (tests/unit).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from microtome.axes import Tokens
from microtome.errors import DataError, error
from microtome.shown import brief, shown
from microtome.stream._corpus import Corpus

_CHARACTERS = 8  # a token of text is rarely longer, so this many characters a token nearly always give enough
T = TypeVar("T")
_MARGIN = 64  # tokens kept away from a cut in a document, which may tokenise otherwise than the whole


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer: `tokenizer(text, add_special_tokens=False)["input_ids"]`, as Hugging Face's do."""

    def __call__(self, text: str, /, *, add_special_tokens: bool) -> Any: ...


@shown
@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Rows of tokens, and where they are from; all int64.

    `tokens` [batch, pos]; `start` [batch], the global index of each row's first token; `document` [batch, pos], the
    number of the document that each token is from, where a separator counts to the document before it; `position`
    [batch, pos], its place in that document; `group` [batch, pos], the number of the document's group. The first
    `lead` tokens of every row are no text: 1 where the rows begin with a beginning-of-text token.
    """

    tokens: Tokens
    start: Int[Tensor, " batch"]
    document: Int[Tensor, "batch pos"]
    position: Int[Tensor, "batch pos"]
    group: Int[Tensor, "batch pos"]
    lead: int = 0

    @classmethod
    def of(cls, tokens: Tokens, start: Int[Tensor, " batch"] | None = None, lead: int = 0) -> Self:
        """Rows of tokens that are of one document each, numbered by row; `start` as if they stood one after another."""
        rows, width = tokens.shape
        start = torch.arange(rows) * width if start is None else start
        document = (start // width).unsqueeze(1).expand(rows, width)
        position = (torch.arange(width) - lead).clamp(min=0).expand(rows, width)
        return cls(tokens, start, document, position, torch.zeros_like(document), lead)

    @property
    def text(self) -> Bool[Tensor, "batch pos"] | None:
        """[batch, pos] True at tokens of the text; None if all of them are."""
        if not self.lead:
            return None
        mask = torch.ones(self.tokens.shape, dtype=torch.bool, device=self.tokens.device)
        mask[:, : self.lead] = False
        return mask


def bos_id(tokenizer: Any) -> int | None:
    """The beginning-of-text token that a tokenizer puts before every text by itself, or None if it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    with_it, without = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    return int(bos) if list(with_it)[:1] == [bos] and list(without)[:1] != [bos] else None


@shown
class TokenBatches:
    """A corpus as batches of rows of tokens.

    Documents are joined into one list, `flat`, with the tokenizer's end-of-text token between them (its
    beginning-of-text token when it has no other, nothing when it has neither). Rows are cut from it one after another,
    so that a row may begin inside a document. What is left over and does not fill a row is dropped, unless it would be
    the only row; so `flat` has at most `tokens` tokens, and every token in it is in exactly one row.

    Args:
        corpus: the documents.
        tokenizer: called as `tokenizer(text, add_special_tokens=False)["input_ids"]`.
        length: tokens per row.
        rows: rows per batch; the last batch may have fewer.
        tokens: how many tokens to take from the corpus, all of them by default.

    Attributes:
        flat: every token, in order; the token at position p of a row is `flat[start + p]`.
        beginning: the token that every row begins with, or None.
        ranges: the first index and the one after the last of each document that was reached, in `flat`.
        short: whether the corpus has fewer tokens than were asked for.
        dropped: how many tokens were left over.

    Raises:
        DataError: when a number is too small, or the corpus gives fewer than 2 tokens.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, *, length: int = 256, rows: int = 8, tokens: int | None = None
    ) -> None:
        for name, value, least in (("length", length, 2), ("rows", rows, 1), ("tokens", tokens, 2)):
            if value is not None and value < least:
                raise error(DataError, f"TokenBatches: {name} is too small", got=value, allowed=f"{least} or more")
        self.corpus, self.length, self.rows = corpus, length, rows
        flat, ranges = _tokenise(corpus, tokenizer, tokens)
        if len(flat) < 2:
            what = f'corpus "{corpus.name}" gives too few tokens'
            raise error(DataError, what, got=len(flat), allowed="2 or more", do="give it more text")
        self.short = tokens is not None and len(flat) < tokens
        self.bos_id = bos_id(tokenizer)
        lead = [] if self.bos_id is None else [self.bos_id]
        width = length - len(lead)
        kept = len(flat) // width * width or len(flat)
        width = min(width, kept)
        self.dropped = len(flat) - kept
        rows_of_text = [lead + flat[at : at + width] for at in range(0, kept, width)]
        self.flat = [token for row in rows_of_text for token in row]
        ends = [(min(first, kept), min(end, kept)) for first, end in ranges if first < kept]
        if lead:
            ends = [(_shifted(first, width), _shifted(end, width)) for first, end in ends]
        self.ranges = ends
        self._table = torch.tensor(rows_of_text, dtype=torch.int64)

    def _facts(self) -> dict[str, str]:
        """The text, and how it is cut."""
        rows, width = self._table.shape
        begins = "" if self.bos_id is None else f", each begins with token {self.bos_id}"
        size = f"{rows:,} rows of {width}{begins}, {self.rows} in a batch"
        asked = "fewer than were asked for" if self.short else ""
        return {"corpus": brief(self.corpus.name), "tokens": f"{len(self.flat):,}", "rows": size, "short": asked}

    def __len__(self) -> int:
        """How many batches."""
        return -(-self._table.shape[0] // self.rows)

    def __getitem__(self, number: int) -> TokenBatch:
        """Batch by number; negative numbers count from the end."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"no batch {number}: there are {len(self)}")
        first = number % len(self) * self.rows
        tokens = self._table[first : first + self.rows].clone()
        start = torch.arange(first, first + tokens.shape[0]) * tokens.shape[1]
        index = start[:, None] + torch.arange(tokens.shape[1])
        document = torch.searchsorted(self._firsts, index, right=True) - 1
        position = (self._text_before(index) - self._text_before(self._firsts)[document]).clamp(min=0)
        return TokenBatch(tokens, start, document, position, self._group[document], 0 if self.bos_id is None else 1)

    def __iter__(self) -> Iterator[TokenBatch]:
        return (self[number] for number in range(len(self)))

    def document_of(self, index: int) -> int:
        """The number of the document that the token at a global index is from."""
        if not 0 <= index < len(self.flat):
            raise error(DataError, f"no token {index}", allowed=f"0 to {len(self.flat) - 1}")
        return bisect_right([first for first, _ in self.ranges], index) - 1

    def group_of(self, index: int) -> str:
        """The group of the document that the token at a global index is from."""
        return self.corpus.group_of(self.document_of(index))

    def _text_before(self, index: Int[Tensor, "*at"]) -> Int[Tensor, "*at"]:
        """How many tokens of the text come before a global index; those that begin rows are none."""
        if self.bos_id is None:
            return index
        width = self._table.shape[1]
        return index - index // width - (index % width > 0).to(index)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of the documents reached, in the order in which they come."""
        return tuple(dict.fromkeys(self.corpus.group_of(number) for number in range(len(self.ranges))))

    @cached_property
    def _firsts(self) -> Int[Tensor, " document"]:
        return torch.tensor([first for first, _ in self.ranges], dtype=torch.int64)

    @cached_property
    def _group(self) -> Int[Tensor, " document"]:
        numbers = {name: number for number, name in enumerate(self.groups)}
        return torch.tensor([numbers[self.corpus.group_of(i)] for i in range(len(self.ranges))], dtype=torch.int64)


def _shifted(index: int, width: int) -> int:
    """Where an index moves when a token is put before every `width`; the head of a row becomes that token's place."""
    row, column = divmod(index, width)
    return row * (width + 1) + (column + 1 if column else 0)


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, tokens: int | None) -> tuple[list[int], list[tuple[int, int]]]:
    """The first `tokens` tokens of a corpus, and the range of each document reached."""
    separator = getattr(tokenizer, "eos_token_id", None)
    separator = getattr(tokenizer, "bos_token_id", None) if separator is None else separator
    between = [] if separator is None else [int(separator)]
    begins = bos_id(tokenizer)  # rows begin with it: a text of a chat template would have it twice
    flat: list[int] = []
    ranges: list[tuple[int, int]] = []
    for text in corpus:
        if flat and ranges[-1][0] < ranges[-1][1]:  # a document without tokens gets no separator
            flat += between
        first = len(flat)
        ids = start_of(text, partial(_ids, tokenizer), None if tokens is None else tokens - first)
        flat += ids[1:] if begins is not None and ids[:1] == [begins] else ids
        ranges.append((first, len(flat)))
        if tokens is not None and len(flat) >= tokens:
            break
    if tokens is not None:
        ranges = [(min(first, tokens), min(end, tokens)) for first, end in ranges]
    return flat[:tokens], ranges


def start_of(text: str, read: Callable[[str], list[T]], needed: int | None) -> list[T]:
    """The first `needed` tokens of a text or more, as `read` gives them, without reading much more of it than that."""
    characters = len(text) if needed is None else max(needed, 0) * _CHARACTERS + 1024
    while needed is not None and characters < len(text):
        cut = text.rfind("\n", characters // 2, characters)
        cut = cut if cut > 0 else characters
        found = read(text[:cut])
        if len(found) >= needed + _MARGIN:
            return found[:needed]
        characters *= 2
    return read(text)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []
