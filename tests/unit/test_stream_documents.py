"""Rows of one document each: nothing lost, nothing twice, no border inside a row, nothing padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError
from microtome.stream import Corpus, DocumentBatches, Position, rows_of


class Words:
    """A tokenizer whose tokens are words, and which knows where they begin if it is fast."""

    eos_token_id = 0

    def __init__(self, *, begins: bool = False, is_fast: bool = True) -> None:
        self.bos_token_id, self.begins, self.is_fast = (1 if begins else None), begins, is_fast
        self.characters = 0

    def __call__(self, text: str, /, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> dict:
        self.characters += len(text)
        ids, places, at = [], [], 0
        for word in text.split():
            at = text.index(word, at)
            ids.append(1 if word == "<s>" else 2 + sum(map(ord, word)))
            places.append((at, at + len(word)))
            at += len(word)
        first = [1] if self.begins and add_special_tokens else []
        return {"input_ids": [*first, *ids]} | ({"offset_mapping": places} if return_offsets_mapping else {})


def ids(text: str) -> list[int]:
    return Words()(text, add_special_tokens=False)["input_ids"]


def words(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{number}" for number in range(count))


TEXTS = [words(5, "a"), words(12, "b"), "", words(4, "c"), "one", words(4, "d")]
CORPUS = Corpus.of("t", TEXTS, ["x", "y", "x", "y", "x", "z"])


def test_rows_hold_one_document_each_and_know_where_they_are_from() -> None:
    rows = list(rows_of(CORPUS, Words(), length=5))
    assert [(r.source, r.place.token, len(r.tokens)) for r in rows] == [
        (0, 0, 5), (1, 0, 5), (1, 5, 5), (1, 10, 2), (3, 0, 4), (4, 0, 1), (5, 0, 4),
    ]  # fmt: skip
    assert [r.group for r in rows] == ["x", "y", "y", "y", "y", "x", "z"]
    assert [(r.long, r.last) for r in rows[:4]] == [(False, True), (True, False), (True, False), (True, True)]
    for row in rows:
        text = TEXTS[row.source]
        assert list(row.tokens) == ids(text)[row.place.token : row.place.token + len(row.tokens)]
        assert [ids(text[at:])[0] for at in row.offsets] == list(row.tokens)
    slow = list(rows_of(CORPUS, Words(is_fast=False), length=5))
    assert [r.tokens for r in slow] == [r.tokens for r in rows]
    assert {at for r in slow for at in r.offsets} == {-1}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(2, 6), st.booleans(), st.integers(1, 40))
def test_from_any_place_the_rest_comes(sizes: list[int], length: int, begins: bool, tokens: int) -> None:
    corpus = Corpus("t", tuple(words(n, chr(97 + i)) for i, n in enumerate(sizes)), ("g",), "0" * 64)
    tokenizer = Words(begins=begins)
    rows = list(rows_of(corpus, tokenizer, length=length))
    assert [t for r in rows for t in r.tokens] == [t for text in corpus for t in ids(text)]
    assert all(len(r.tokens) <= length - begins for r in rows)
    for number, row in enumerate(rows):
        assert list(rows_of(corpus, tokenizer, length=length, start=row.next)) == rows[number + 1 :]
    some = list(rows_of(corpus, tokenizer, length=length, tokens=tokens))
    assert [t for r in some for t in r.tokens] == [t for r in rows for t in r.tokens][:tokens]
    rest = list(rows_of(corpus, tokenizer, length=length, start=some[-1].next)) if some else rows
    assert [t for r in [*some, *rest] for t in r.tokens] == [t for r in rows for t in r.tokens]


def test_batches_are_of_one_length_and_unpadded() -> None:
    batches = DocumentBatches(CORPUS, Words(), length=5, rows=2)
    shapes = [tuple(batch.tokens.shape) for batch in batches]
    assert shapes == [(2, 5), (1, 5), (2, 4), (1, 2)]
    assert (batches.dropped, batches.split, batches.short, batches.next) == (1, 1, False, Position(6))
    assert batches.groups == ("x", "y", "z")
    seen: dict[tuple[int, int], int] = {}
    for batch in batches:
        for row in range(len(batch.tokens)):
            assert len(batch.document[row].unique()) == 1
            for at, token in enumerate(batch.tokens[row].tolist()):
                document, position = int(batch.document[row, at]), int(batch.position[row, at])
                assert (document, position) not in seen
                seen[document, position] = token
                assert batches.groups[int(batch.group[row, at])] == CORPUS.group_of(document)
                assert batches.flat[int(batch.start[row]) + at] == token
    assert seen == {(d, p): t for d, text in enumerate(TEXTS) if d != 4 for p, t in enumerate(ids(text))}
    assert torch.equal(batches[-1].tokens, batches[3].tokens)
    with pytest.raises(IndexError):
        batches[4]


def test_the_token_that_begins_a_text_is_before_every_row_and_no_text() -> None:
    batches = DocumentBatches(Corpus.of("t", [words(7), "<s> " + words(3)]), Words(begins=True), length=4, rows=8)
    rows = [row for batch in batches for row in batch.tokens.tolist()]
    assert {row[0] for row in rows} == {1}
    assert sorted(len(row) for row in rows) == [4, 4, 4]  # 3 and 3 of the first, whose last token is alone, and 3
    assert (batches.dropped, batches[0].lead) == (1, 1)
    assert batches[0].position.tolist() == [[0, 0, 1, 2], [3, 3, 4, 5], [0, 0, 1, 2]]
    assert batches[0].text is not None


def test_many_short_documents_make_few_batches() -> None:
    corpus = Corpus.of("t", [words(3 + n % 4) for n in range(400)])
    batches = DocumentBatches(corpus, Words(), length=64, rows=8)
    assert sum(batch.tokens.numel() for batch in batches) == sum(3 + n % 4 for n in range(400))
    assert len(batches) == 4 + 1  # 512 tokens a batch: each of four lengths fits one, but 600 tokens of the longest


def test_only_what_is_needed_of_a_long_document_is_tokenised() -> None:
    tokenizer = Words()
    text = "\n".join(words(10, chr(97 + n % 26)) for n in range(5_000))
    batches = DocumentBatches(Corpus.of("one", [text]), tokenizer, length=64, tokens=1_000)
    assert batches.flat == ids(text)[:1_000]
    assert tokenizer.characters < 0.2 * len(text)
    assert (batches.short, batches.next) == (False, Position(0, 1_000))


def test_what_cannot_be_cut_into_rows() -> None:
    with pytest.raises(DataError, match=r'corpus "t" gives too few tokens; got 2; allowed: a document of 2 or more'):
        DocumentBatches(Corpus.of("t", ["a", "b"]), Words())
    for name in ("length", "tokens"):
        with pytest.raises(DataError, match=f"{name} is too small; got 1; allowed: 2 or more"):
            DocumentBatches(CORPUS, Words(), **{name: 1})
