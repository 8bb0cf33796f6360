"""Tables, folders and data sets give each document its group; an order by seed keeps them together."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microtome.errors import DataError
from microtome.stream import Corpus, corpus_of, read_dataset, read_text

TEXTS = ["the cat", "der Hund, groß", 'le "chat"\nnoir', "a dog"]
GROUPS = ["en", "de", "fr", "en"]


def lines() -> str:
    return "".join(json.dumps({"text": t, "lang": g}) + "\n" for t, g in zip(TEXTS, GROUPS, strict=True))


def separated(mark: str) -> str:
    quoted = ['"' + t.replace('"', '""') + '"' for t in TEXTS]
    return f"lang{mark}text\n" + "".join(f"{g}{mark}{t}\n" for t, g in zip(quoted, GROUPS, strict=True))


def table(folder: Path, kind: str) -> Path:
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "lang": GROUPS}), path)
    else:
        path.write_text(lines() if kind == "jsonl" else separated("\t" if kind == "tsv" else ","), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "tsv"])
def test_a_column_is_the_group_of_each_document(tmp_path: Path, kind: str) -> None:
    path = table(tmp_path, kind)
    corpus = read_text(path, group="lang")
    assert list(corpus) == list(corpus) == TEXTS
    assert [corpus.group_of(number) for number in range(4)] == GROUPS
    assert read_text(path).groups == ("a",)
    assert corpus_of(path, group="lang") == corpus
    assert list(read_text(path, field="lang", group="lang")) == GROUPS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x", "lang": "en"}\n{"text": "y"}\n', r'line 2 has no field "lang".*as `group`'),
        ("a.jsonl", b'{"text": "x", "lang": null}\n', r'line 1, field "lang" names no group; got nothing'),
        ("a.jsonl", b'{"text": "x", "lang": ["en"]}\n', r"names no group; got \['en'\]"),
        ("a.csv", b"text,language\nx,en\n", r'has no column "lang"\. Did you mean "language"\?.*as `group`'),
        ("a.csv", b"text,lang\nx,en,de\n", r"line 2 has another number of columns; got 3; allowed: 2"),
        ("a.csv", b'text,lang\n"x,en\n', r"line \d cannot be read \(unexpected end of data\)"),
        ("a.csv", b"text,lang\nx\xff,en\n", r"line 2 is not UTF-8; got byte 0xff at 1"),
        ("a.csv", b"text,lang\n", r'a.csv" has no text'),
        ("a.csv", b"", r'has no column "text"; got none'),
        ("a.txt", b"text", r'a.txt" has no column "lang"; got \.txt; allowed: \.jsonl'),
        ("a.txt", b"MZ\0\0\1", r'a.txt" is binary, not text; got a NUL at character 2'),
        ("a.jsonl", b'{"text": "a\\u0000", "lang": "x"}\n', r'line 1, field "text" is binary, not text'),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_text(path, group="lang")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("fr/b.txt", "fr/a.txt", "de/deep/c.txt", "top.txt", ".hidden/x.txt", "fr/.y.txt", "fr/z.png"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    corpus = read_text(tmp_path / "texts")
    assert list(corpus) == ["de/deep/c.txt", "fr/a.txt", "fr/b.txt", "top.txt"]
    assert corpus.groups == ("de", "fr", "fr", "top")
    assert corpus.name == "texts"
    table(tmp_path / "texts" / "fr", "jsonl")
    mixed = read_text(tmp_path / "texts", group="lang")
    assert mixed.groups == ("de", *GROUPS, "fr", "fr", "top")
    assert list(mixed)[1:5] == TEXTS
    assert mixed.sha256 != corpus.sha256
    (tmp_path / "texts" / "fr" / "b.txt").write_text("other")
    assert read_text(tmp_path / "texts").sha256 not in (corpus.sha256, mixed.sha256)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no text; got 1 other files; allowed: \.txt"):
        read_text(tmp_path / "empty")


class Records:
    """What the package `datasets` gives: columns by name, and records."""

    column_names = ("text", "lang")

    def __getitem__(self, number: int) -> dict[str, str]:
        return {"text": TEXTS[number], "lang": GROUPS[number]}  # IndexError ends an iteration


def test_data_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Package:
        @staticmethod
        def load_dataset(path: str, name: str | None, split: str) -> Records:
            asked.append((path, name, split))
            if path == "none":
                raise FileNotFoundError("no such\ndata set")
            return Records()

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: Package if name == "datasets" else real(name))
    corpus = corpus_of("datasets:wiki/text:raw:test", group="lang")
    assert (list(corpus), corpus.groups, corpus.name) == (TEXTS, tuple(GROUPS), "wiki/text:raw:test")
    assert read_dataset("wiki").groups == ("wiki",)
    assert read_dataset("wiki").sha256 == corpus.sha256 == corpus_of(Records()).sha256
    assert asked[:2] == [("wiki/text", "raw", "test"), ("wiki", None, "train")]
    with pytest.raises(DataError, match=r'has no column "text2"; got text, lang'):
        list(read_dataset("wiki", field="text2"))
    with pytest.raises(DataError, match=r'cannot load the data set "none"; got no such data set'):
        read_dataset("none")
    with pytest.raises(DataError, match=r"allowed: NAME, NAME:PART"):
        read_dataset("a:b:c:d")


def test_data_sets_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(DataError, match=r'"x" needs the package datasets, which is not here. To do: pip install'):
        read_dataset("x")


def test_an_order_by_seed_keeps_numbers_and_groups() -> None:
    texts = [f"text {number}" for number in range(50)]
    corpus = Corpus.of("t", texts, [str(number % 3) for number in range(50)])
    one, same, other = corpus.shuffled(1), corpus.shuffled(1), corpus.shuffled(2)
    assert list(one) == list(same)
    assert sorted(one) == sorted(other) == sorted(texts)
    assert len({tuple(corpus), tuple(one), tuple(other)}) == 3
    for place, (number, text) in enumerate(one.numbered()):
        assert text == texts[number]
        assert one.group_of(place) == corpus.group_of(number)
    assert list(one.numbered(20)) == list(one.numbered())[20:]
    assert list(corpus.numbered(48)) == [(48, "text 48"), (49, "text 49")]
    with pytest.raises(DataError, match="shuffled already"):
        one.shuffled(2)


def test_what_is_read_as_it_goes_is_shuffled_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    from microtome.stream import _corpus

    class Pages:
        most = 0

        def __iter__(self) -> Iterator[str]:
            for self.most in range(25):
                yield f"text {self.most}"

    monkeypatch.setattr(_corpus, "WINDOW", 10)
    pages = Pages()
    corpus = Corpus("pages", pages, tuple(str(n) for n in range(25)), "0" * 64).shuffled(0)
    found = list(corpus.numbered())
    assert [sorted(number for number, _ in found[a : a + 10]) for a in (0, 10, 20)] == [
        list(range(10)), list(range(10, 20)), list(range(20, 25)),
    ]  # fmt: skip
    assert [number for number, _ in found] != list(range(25))
    assert list(corpus.groups) == [str(number) for number, _ in found]
    next(iter(corpus))
    assert pages.most == 9  # no more than a window was read
