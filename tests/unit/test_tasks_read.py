"""A user's own pairs: read as they stand, or refused in one line that names the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import families, tokenizers

import microtome as mt
from microtome.errors import DataError, PromptError

HEAD = "clean,corrupt,answer,foil,subject\n"
ROWS = [
    {"clean": "The key near the door", "corrupt": "The keys near the door", "answer": " is", "foil": " are"},
    {"clean": "One apple, two", "corrupt": "One dog, two", "answer": " apples", "foil": " dogs", "subject": "apple"},
]


@pytest.fixture
def tok() -> Any:
    return tokenizers.build("bpe-bos")


def csv(folder: Path, *rows: str, head: str = HEAD) -> Path:
    path = folder / "mine.csv"
    path.write_text(head + "\n".join(rows), encoding="utf-8")
    return path


def test_csv_and_jsonl_give_the_same_pairs(tmp_path: Path, tok: Any) -> None:
    lines = [",".join(f'"{row.get(c, "")}"' for c in HEAD.strip().split(",")) for row in ROWS]
    first = mt.tasks.read(csv(tmp_path, *lines), tok)
    path = tmp_path / "mine.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert mt.tasks.read(path, tok).pairs == first.pairs
    assert first.name == "mine"
    pair = first[1]
    assert tok.decode(pair.clean_tokens[slice(*pair.spans["subject"])]) == " apple"
    assert list(pair.clean_tokens) == tok("One apple, two")["input_ids"]
    assert [tok.decode([*ids]) for ids in (pair.answer_ids, pair.foil_ids)] == [" apples", " dogs"]
    assert "subject" not in first[0].spans


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b"])
def test_only_newlines_end_a_row(mark: str, tmp_path: Path, tok: Any) -> None:
    row = {name: text.replace("near", f"near{mark}") for name, text in ROWS[0].items()}
    path = tmp_path / "mine.jsonl"
    for ending in ("\n", "\r\n"):
        lines = [json.dumps(r, ensure_ascii=mark < " ") for r in (row, ROWS[1])]
        path.write_bytes(ending.join([*lines, ""]).encode())
        assert [pair.clean for pair in mt.tasks.read(path, tok)] == [row["clean"], ROWS[1]["clean"]]
        table = csv(tmp_path, ending.join(",".join([*row.values(), ""]) for _ in (0, 1)))
        assert [pair.clean for pair in mt.tasks.read(table, tok)] == [row["clean"]] * 2


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("The dog,The big dog, ran, sat,", "row 1: the prompts do not align; got 3 and 4 tokens, first different at "
         "position 2: ' dog' and ' b"),
        ("One dog,One car, two, two,", "row 1: the foil equals the answer; got ' two'. To do: choose another foil"),
        ("One dog,One car, is, are,cat", "row 1: the subject is not in the clean prompt; got 'cat'"),
        ("One dog,One car,,are,", "row 1: answer is not text; got ''. To do: fill it in."),
        ("One dog,One car", "row 1: answer is not text; got None"),
        ("One dog,One dog, is, are,", "row 1: the clean and the corrupt prompt are the same"),
        ("One dog,One car,is, are,", "row 1: 'is' would continue the last word of the prompt; got 'dogis'. To do: "
         "begin it with a space, ' is'"),
        ("One dog,One car, is, xyzzyx,", "row 1: an answer or foil is several tokens; got ' xyzzyx' is"),
        ("One dog,One car, is, xyzzyx,", 'read the first token of each with answers="first"'),
        ("One dog,One car, is, are,do", "row 1: a word of interest does not begin and end where tokens do; got 'do'"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit(row: str, text: str, tmp_path: Path, tok: Any) -> None:
    with pytest.raises(DataError) as told:
        mt.tasks.read(csv(tmp_path, row), tok)
    assert text in str(told.value)
    assert "\n" not in str(told.value)


def test_the_row_is_named_by_its_number(tmp_path: Path, tok: Any) -> None:
    good = "One dog,One car, is, are,"
    with pytest.raises(DataError, match=r'mine.csv" row 3: the foil equals'):
        mt.tasks.read(csv(tmp_path, good, good, "One dog,One car, is, is,"), tok)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", "", '"{}" is empty. To do: write the columns clean, corrupt, answer, foil.'),
        ("a.csv", HEAD, '"{}" has no pairs. To do: write one per line, with clean, corrupt, answer, foil.'),
        ("a.jsonl", "\n", '"{}" has no pairs'),
        ("a.csv", "clean,corrupt\na,b\n", '"{}" lacks the columns answer, foil; got clean, corrupt; allowed: clean, '),
        ("a.jsonl", '{"clean": "a"}', '"{}" line 1 lacks the fields corrupt, answer, foil; got clean'),
        ("a.jsonl", "not", '"{}" line 1 is not JSON'),
        ("a.jsonl", "[1]", '"{}" line 1 is not a JSON object; got list'),
        (
            "a.csv",
            HEAD + "x" * 131_073 + ",b,c,d,",
            '"{}" row 1 is not CSV; got field larger than field limit (131072)',
        ),
        ("a.jsonl", json.dumps(ROWS[0] | {"group": ["a"]}), "\"{}\" line 1: the group is not text; got ['a']"),
        ("a.txt", "x", 'cannot read "{}" as pairs; got ".txt"; allowed: .csv, .jsonl.'),
    ],
)
def test_bad_files(name: str, content: str, text: str, tmp_path: Path, tok: Any) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as told:
        mt.tasks.read(path, tok)
    assert text.format(path) in str(told.value)


def test_no_file_no_text_no_tokenizer(tmp_path: Path, tok: Any) -> None:
    with pytest.raises(DataError, match="it does not exist"):
        mt.tasks.read(tmp_path / "none.csv", tok)
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="save it as UTF-8"):
        mt.tasks.read(tmp_path / "a.csv", tok)
    with pytest.raises(PromptError, match="is made of text, and this model has no tokenizer"):
        mt.tasks.read(csv(tmp_path, "a,b, c, d,"), mt.open(families.build("llama-gqa"), prove=False))


def test_first_tokens_of_longer_answers(tmp_path: Path, tok: Any) -> None:
    path = csv(tmp_path, "One dog,One car, is, xyzzyx,")
    pair = mt.tasks.read(path, tok, answers="first")[0]
    assert pair.foil_ids == (tok("One dog xyzzyx")["input_ids"][len(pair.clean_tokens)],)
    assert " xyzzyx".startswith(pair.foil)
