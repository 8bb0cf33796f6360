"""Where text comes from, and what is said when it cannot be read."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microtome.errors import DataError
from microtome.stream import Corpus, joined, read_text, standard_library_code, standard_library_text


def test_the_documentation_topics_are_english_prose_in_the_order_of_their_names() -> None:
    corpus = standard_library_text()
    texts = list(corpus)
    assert texts[0].startswith('The "assert" statement')
    assert 300_000 < sum(map(len, texts)) < 900_000
    assert {corpus.group_of(number) for number in range(len(texts))} == {"prose"}
    assert corpus == standard_library_text()
    assert len(corpus.sha256) == 64


def test_a_python_without_topics_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(DataError, match=r"no documentation topics .* To do: install the full standard library"):
        standard_library_text()


def test_the_code_of_the_standard_library() -> None:
    corpus = standard_library_code()
    texts = list(corpus)
    assert len(texts) > 20
    assert sum("def " in text for text in texts) > 20
    assert corpus.group_of(3) == "code"
    assert list(standard_library_code(["textwrap", "bisect", "sys", "no_such_module"])) == list(
        standard_library_code(["bisect", "textwrap"])
    )
    with pytest.raises(DataError, match="no source code of the standard library"):
        standard_library_code(["sys"])


def test_checksums_tell_texts_apart() -> None:
    assert Corpus.of("a", ["ab", "c"]).sha256 == Corpus.of("b", ["ab", "c"]).sha256
    assert Corpus.of("a", ["ab", "c"]).sha256 != Corpus.of("a", ["a", "bc"]).sha256


def test_corpora_join_and_keep_their_groups() -> None:
    both = joined("both", [Corpus.of("a", ["x", "y"], "prose"), Corpus.of("b", ["z"], "code")])
    assert list(both) == ["x", "y", "z"]
    assert [both.group_of(number) for number in range(3)] == ["prose", "prose", "code"]
    assert Corpus.of("a", ["x"]).group_of(0) == "a"


def test_a_corpus_in_memory_is_checked() -> None:
    with pytest.raises(DataError, match='corpus "none" has no text; got 1 documents'):
        Corpus.of("none", [" \n"])
    with pytest.raises(DataError, match="the groups do not fit; got 2 groups for 3 documents"):
        Corpus.of("a", ["x", "y", "z"], ["p", "q"])


def test_a_text_file_is_one_document_or_its_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "Story.TXT"
    path.write_bytes(b"\xef\xbb\xbfOnce\r\nupon.\r\n\r\n \r\n\n  A time.\r\n")
    corpus = read_text(path)
    assert list(corpus) == ["Once\nupon.\n\n \n\n  A time.\n"]
    assert corpus.name == corpus.group_of(0) == "Story"
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(read_text(str(path), paragraphs=True)) == ["Once\nupon.", "  A time."]


def test_json_lines_are_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\u00e9", "id": 3}\n', encoding="utf-8")
    corpus = read_text(path)
    assert list(corpus) == list(corpus) == ["one", "twoé"]
    path.write_text('{"body": "one"}\n', encoding="utf-8")
    assert list(read_text(path, field="body")) == ["one"]


def test_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"document {number}" for number in range(600)]
    pq.write_table(pa.table({"text": texts, "id": list(range(600))}), path)
    corpus = read_text(path)
    assert list(corpus) == list(corpus) == texts
    with pytest.raises(DataError, match=r'has no column "texts"\. Did you mean "text"\?; got text, id\. To do: pass'):
        read_text(path, field="texts")
    with pytest.raises(DataError, match=r'row 0, column "id" is not text; got int'):
        read_text(path, field="id")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(DataError, match=r'row 1, column "text" is not text; got NoneType'):
        list(read_text(path))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r'a.txt" has no text; got 0 bytes'),
        ("a.txt", b" \n\n", r'a.txt" has no text; got 3 bytes'),
        ("a.txt", b"ab\xff\xfe", r'a.txt" is not UTF-8; got byte 0xff at 2\. To do: convert it'),
        ("a.jsonl", b"\n\n", r'a.jsonl" has no text'),
        ("a.jsonl", b'{"text": "\xff"}', r'a.jsonl" line 1 is not UTF-8; got byte 0xff at 10'),
        ("a.jsonl", b"{'text'}", r'a.jsonl" line 1 is not JSON \(.*one JSON object per line'),
        ("a.jsonl", b'\n["text"]', r'a.jsonl" line 2 is not a JSON object; got list'),
        ("a.jsonl", b'{"txt": "a", "id": 1}', r'line 1 has no field "text"\. Did you mean "txt"\?; got txt, id'),
        ("a.jsonl", b'{"text": 3}', r'line 1, field "text" is not text; got int'),
        ("a.jsonl", b'{"text": "a\\ud800"}', r"half a surrogate pair at character 1"),
        ("a.parquet", b"", r'a.parquet" cannot be read as Parquet'),
        ("a.parquet", b"PAR1 not really", r'a.parquet" cannot be read as Parquet'),
        ("a.md", b"text\nhello", r'as text; got "\.md"; allowed: \.txt, \.jsonl, \.parquet, \.csv, \.tsv'),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_text(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'absent.txt": it does not exist\. To do: give the path of a file'):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="holds no text; got an empty folder"):
        read_text(tmp_path)


def test_a_bad_line_further_down_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n{}\n", encoding="utf-8")
    corpus = read_text(path)
    with pytest.raises(DataError, match=r'line 2 has no field "text"; got none'):
        list(corpus)


def test_the_registers_of_this_machine_are_four_and_differ() -> None:
    from microtome.stream import registers

    corpus, again = registers(), registers()
    assert tuple(dict.fromkeys(corpus.groups)) == ("documentation", "code", "science", "law")
    assert corpus.sha256 == again.sha256
    texts = {
        group: " ".join(t for t, g in zip(corpus, corpus.groups, strict=True) if g == group) for group in corpus.groups
    }
    assert all(len(text) > 20_000 for text in texts.values())
    share = {
        group: [text.lower().count(word) / len(text) for word in ("def ", "data", "licen")]
        for group, text in texts.items()
    }
    for word, group in enumerate(("code", "science", "law")):
        assert max(share, key=lambda g: share[g][word]) == group
