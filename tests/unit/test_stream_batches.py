"""Documents become rows: nothing lost, nothing twice, nothing tokenised that is not needed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError
from microtome.stream import Corpus, TokenBatches, bos_id, standard_library_text


class Words:
    """A tokenizer whose tokens are words and line ends; it remembers what it was asked for."""

    def __init__(self, eos: int | None = 0, bos: int | None = None, *, begins: bool = False) -> None:
        self.eos_token_id, self.bos_token_id, self.begins = eos, bos, begins
        self.characters = 0

    def __call__(self, text: str, /, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.characters += len(text)
        first = [self.bos_token_id] if self.begins and add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*first, *(2 + sum(map(ord, word)) for word in re.findall(r"\w+|\n", text))]}


def words(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{number}" for number in range(count))


def ids(text: str) -> list[int]:
    return Words()(text, add_special_tokens=False)["input_ids"]


def test_documents_are_joined_by_the_separator_and_cut_into_rows() -> None:
    texts = [words(5, "a"), words(4, "b"), words(3, "c")]
    batches = TokenBatches(Corpus.of("t", texts, ["x", "y", "x"]), Words(eos=1), length=4, rows=2)
    everything = [*ids(texts[0]), 1, *ids(texts[1]), 1, *ids(texts[2])]  # 14 tokens
    assert batches.flat == everything[:12]
    assert (batches.dropped, batches.short, len(batches)) == (2, False, 2)
    assert batches.ranges == [(0, 5), (6, 10), (11, 12)]
    first, second = batches
    assert first.tokens.tolist() == [everything[0:4], everything[4:8]]
    assert first.start.tolist() == [0, 4]
    assert first.document.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert second.tokens.tolist() == [everything[8:12]]
    assert second.start.tolist() == [8]
    assert second.document.tolist() == [[1, 1, 1, 2]]
    assert [batches.group_of(index) for index in (0, 5, 6, 11)] == ["x", "x", "y", "x"]
    assert batches[-1].tokens.tolist() == second.tokens.tolist()


def test_the_separator_is_eos_else_bos_else_none() -> None:
    corpus = Corpus.of("t", ["a", "b"])
    assert TokenBatches(corpus, Words(eos=7, bos=9)).flat == [*ids("a"), 7, *ids("b")]
    assert TokenBatches(corpus, Words(eos=None, bos=9)).flat == [*ids("a"), 9, *ids("b")]
    assert TokenBatches(corpus, Words(eos=None)).flat == [*ids("a"), *ids("b")]


def test_a_corpus_shorter_than_a_row_is_one_short_row() -> None:
    batches = TokenBatches(Corpus.of("t", ["a b c"]), Words(), length=8, tokens=100)
    (batch,) = batches
    assert batch.tokens.tolist() == [ids("a b c")]
    assert batches.short
    assert batches.dropped == 0
    assert not TokenBatches(Corpus.of("t", ["a b c"]), Words(), length=2, tokens=3).short


def test_exactly_as_many_tokens_as_asked() -> None:
    corpus = Corpus.of("t", [words(50), words(50)])
    batches = TokenBatches(corpus, Words(), length=10, rows=3, tokens=64)
    assert len(batches.flat) == 60
    assert (batches.dropped, batches.short, len(batches)) == (4, False, 2)
    assert batches.ranges == [(0, 50), (51, 60)]
    assert [batch.tokens.shape[0] for batch in batches] == [3, 3]


def test_documents_without_tokens_keep_their_number() -> None:
    batches = TokenBatches(Corpus.of("t", ["", "a b", "  ", "c"], ["e", "f", "g", "h"]), Words(eos=1), length=4)
    assert batches.flat == [*ids("a b"), 1, *ids("c")]
    assert batches.ranges == [(0, 0), (0, 2), (3, 3), (3, 4)]
    assert batches[0].document.tolist() == [[1, 1, 1, 3]]
    assert batches.group_of(2) == "f"


def test_only_what_is_needed_is_tokenised() -> None:
    documents = Words()
    corpus = standard_library_text()
    batches = TokenBatches(corpus, documents, length=256, tokens=20_000)
    assert len(batches.flat) == 78 * 256
    assert documents.characters < 0.5 * sum(map(len, corpus))
    whole = Words()
    text = "\n".join(corpus)
    batches = TokenBatches(Corpus.of("one", [text]), whole, length=100, tokens=5_000)
    assert batches.flat == ids(text)[:5_000]
    assert whole.characters < 0.2 * len(text)


def test_documents_beyond_the_last_token_are_not_even_read() -> None:
    class Pages:
        read = 0

        def __iter__(self) -> Iterator[str]:
            for self.read in range(1, 100):
                yield "a b c"

    pages = Pages()
    batches = TokenBatches(Corpus("long", pages, ("g",), "0" * 64), Words(), length=4, tokens=8)
    assert len(batches.flat) == 8
    assert batches.ranges == [(0, 3), (4, 7)]
    assert pages.read == 3


def test_a_long_document_of_long_words_is_still_read_far_enough() -> None:
    text = " ".join("x" * 50 + str(number) for number in range(3_000))
    batches = TokenBatches(Corpus.of("one", [text]), Words(), length=10, tokens=1_000)
    assert batches.flat == ids(text)[:1_000]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    length=st.integers(2, 12),
    rows=st.integers(1, 4),
    tokens=st.none() | st.integers(2, 80),
)
def test_rows_are_the_flat_list_cut_in_order(sizes: list[int], length: int, rows: int, tokens: int | None) -> None:
    texts = [words(size, f"d{number}x") for number, size in enumerate(sizes)]
    everything: list[int] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        if everything and texts[number - 1]:
            everything.append(0)
            owner.append(number - 1)
        everything += ids(text)
        owner += [number] * sizes[number]
    asked = everything[:tokens]
    batches = TokenBatches(Corpus.of("t", texts), Words(eos=0), length=length, rows=rows, tokens=tokens)
    kept = len(asked) // length * length or len(asked)
    assert batches.flat == asked[:kept]
    assert batches.short == (tokens is not None and len(everything) < tokens)
    assert batches.dropped == len(asked) - kept
    found = [token for batch in batches for token in batch.tokens.flatten().tolist()]
    assert found == batches.flat
    documents = [number for batch in batches for number in batch.document.flatten().tolist()]
    assert documents == owner[:kept] == [batches.document_of(index) for index in range(kept)]
    for batch in batches:
        for row, start in zip(batch.tokens, batch.start.tolist(), strict=True):
            assert row.tolist() == batches.flat[start : start + len(row)]
    for number, (first, end) in enumerate(batches.ranges):
        assert batches.flat[first:end] == ids(texts[number])[: end - first]


def test_only_a_tokenizer_that_begins_texts_by_itself_has_a_beginning() -> None:
    assert bos_id(Words(bos=9, begins=True)) == 9
    assert bos_id(Words(bos=9)) is None  # it has such a token, but does not put it there
    assert bos_id(Words(bos=None, begins=True)) is None
    everywhere = Words(bos=9, begins=True)
    everywhere.bos_token_id = ids("a")[0]  # what begins this text anyway
    everywhere.begins = False
    assert bos_id(everywhere) is None


def test_rows_begin_with_the_beginning_that_the_tokenizer_puts_there() -> None:
    texts = [words(5, "a"), words(4, "b"), words(3, "c")]
    batches = TokenBatches(Corpus.of("t", texts), Words(eos=1, bos=9, begins=True), length=4, rows=2)
    plain = [*ids(texts[0]), 1, *ids(texts[1]), 1, *ids(texts[2])]  # 14 tokens, three a row
    assert [row for batch in batches for row in batch.tokens.tolist()] == [[9, *plain[i : i + 3]] for i in (0, 3, 6, 9)]
    assert [batch.lead for batch in batches] == [1, 1]
    assert (batches.dropped, batches.short) == (2, False)
    documents = [number for batch in batches for number in batch.document.flatten().tolist()]
    assert documents == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    length=st.integers(2, 12),
    tokens=st.none() | st.integers(2, 80),
)
def test_a_beginning_changes_nothing_but_the_heads_of_rows(sizes: list[int], length: int, tokens: int | None) -> None:
    corpus = Corpus.of("t", [words(size, f"d{number}x") for number, size in enumerate(sizes)])
    plain = TokenBatches(corpus, Words(), length=max(2, length - 1), tokens=tokens)
    begun = TokenBatches(corpus, Words(bos=1, begins=True), length=max(2, length - 1) + 1, tokens=tokens)
    assert (begun.short, begun.dropped, len(begun)) == (plain.short, plain.dropped, len(plain))
    for a, b in zip(plain, begun, strict=True):
        assert (b.tokens[:, 0] == 1).all()
        assert torch.equal(a.tokens, b.tokens[:, 1:])
        assert torch.equal(a.document, b.document[:, 1:])
        for row, start in zip(b.tokens, b.start.tolist(), strict=True):
            assert row.tolist() == begun.flat[start : start + len(row)]
    documents = [number for batch in begun for number in batch.document.flatten().tolist()]
    assert documents == [begun.document_of(index) for index in range(len(begun.flat))]
    for (first, end), whole in zip(begun.ranges, plain.ranges, strict=True):
        assert [t for t in begun.flat[first:end] if t != 1] == plain.flat[slice(*whole)]


def test_batches_are_copies() -> None:
    batches = TokenBatches(Corpus.of("t", ["a b c d"]), Words(), length=2)
    batches[0].tokens.zero_()
    assert batches[0].tokens.flatten().tolist() == batches.flat
    assert batches[0].tokens.dtype == batches[0].start.dtype == batches[0].document.dtype == torch.int64


def test_what_is_too_small_is_refused() -> None:
    corpus = Corpus.of("tiny", ["a"])
    with pytest.raises(DataError, match=r'"tiny" gives too few tokens; got 1; allowed: 2 or more\. To do: give'):
        TokenBatches(corpus, Words())
    with pytest.raises(DataError, match="length is too small; got 1; allowed: 2 or more"):
        TokenBatches(corpus, Words(), length=1)
    with pytest.raises(DataError, match="rows is too small; got 0; allowed: 1 or more"):
        TokenBatches(corpus, Words(), rows=0)
    with pytest.raises(DataError, match="tokens is too small; got 1; allowed: 2 or more"):
        TokenBatches(corpus, Words(), tokens=1)
    batches = TokenBatches(Corpus.of("t", ["a b"]), Words())
    with pytest.raises(IndexError, match="no batch 1: there are 1"):
        batches[1]
    with pytest.raises(DataError, match="no token 2; allowed: 0 to 1"):
        batches.group_of(2)
