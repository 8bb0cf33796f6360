"""The files of an atlas's pages: what is in them, and that nothing in a table or a text can break them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from microtome.errors import DataError, OutputError
from microtome.view import write_pages
from microtome.view._page_data import LARGE, count_firing, encode, literal, pack_tokens, reindex_vocab, script
from microtome.view._pages import PART

HOSTILE = ["</script><img onerror=x>", '"quote"', "line\nbreak", "a\u2028b", "\ud83d", "é", "]]>"]
MANIFEST: dict[str, Any] = {"model": {"name": "</title><b>$name", "n_layers": 2}, "text": {"length": 4}}


def tables() -> dict[str, Any]:
    """The least that `write_pages` takes."""
    neurons = pa.table(
        {
            "layer": [1, 0, 0],
            "neuron": [0, 1, 0],
            "firing_rate": [0.5, 0.0, None],
            "promoted": pa.array([[5, 1], [1], []], pa.list_(pa.int32())),
            "suppressed": pa.array([[3], None, [5]], pa.list_(pa.int32())),
            "example_index": pa.array([[6], [0, 3], None], pa.list_(pa.int32())),
            "example_start": pa.array([[4], [0, 0], None], pa.list_(pa.int32())),
        }
    )
    heads = pa.table({"layer": [0, 1], "head": [0, 0]})
    return {"layers": pa.table({"layer": [0, 1]}), "heads": heads, "neurons": neurons}


def read(path: Path) -> Any:
    """The value in a data file."""
    found = re.fullmatch(r'atlas\.receive\("([^"]+)", (.*)\);\n', path.read_text(encoding="ascii"), flags=re.S)
    assert found is not None
    return json.loads(found[2])


def test_writes_one_page_with_everything_beside_it(tmp_path: Path) -> None:
    page = write_pages(tmp_path / "new", MANIFEST, tables=tables(), tokens=HOSTILE, vocab=HOSTILE)
    assert page == tmp_path / "new" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert "&lt;/title&gt;&lt;b&gt;$name" in text
    assert "</title><b>" not in text
    for asset in re.findall(r'(?:src|href)="(assets/[^"]+)"', text):
        assert (page.parent / asset).is_file(), asset
    names = sorted(str(path.relative_to(page.parent / "assets" / "data")) for path in page.parent.rglob("data/**/*.js"))
    parts = ["details/0/0.js", "details/1/0.js"]
    expected = [*parts, "groups.js", "labels.js", "model.js", "neurons/0.js", "neurons/1.js"]
    assert names == [*expected, "text.js", "text/0.js", "vocab.js"]


def test_nothing_is_loaded_from_a_network(tmp_path: Path) -> None:
    write_pages(tmp_path, MANIFEST, tables=tables(), tokens=HOSTILE, vocab=HOSTILE)
    for path in tmp_path.rglob("*.*"):
        found = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", path.read_text(encoding="utf-8")))
        assert found <= {"http://www.w3.org/2000/svg"}, (path.name, found)
        assert not re.search(r"\bfetch\(|@import|XMLHttpRequest|WebSocket", path.read_text(encoding="utf-8"))


def test_data_files_survive_every_token(tmp_path: Path) -> None:
    write_pages(tmp_path, MANIFEST, tables=tables(), tokens=HOSTILE, vocab=HOSTILE)
    data = tmp_path / "assets" / "data"
    for path in data.rglob("*.js"):
        raw = path.read_text(encoding="ascii")
        assert "<" not in raw, path.name
    text, places = read(data / "text.js"), read(data / "text" / "0.js")
    assert [text["strings"][place] for place in places] == HOSTILE
    assert read(data / "vocab.js") == [HOSTILE[i] for i in (1, 3, 5)], "only the strings in use are written"


def test_neurons_are_sorted_split_by_layer_and_reindexed(tmp_path: Path) -> None:
    write_pages(tmp_path, MANIFEST, tables=tables(), tokens=HOSTILE, vocab=HOSTILE)
    data = tmp_path / "assets" / "data"
    listed, details = read(data / "neurons" / "0.js"), read(data / "details" / "0" / "0.js")
    assert listed["columns"] == {"layer": [0, 0], "neuron": [0, 1], "firing_rate": [None, 0], "promoted": [[], [0]]}
    assert details["columns"] == {
        "suppressed": [[2], None],
        "example_index": [None, [0, 3]],
        "example_start": [None, [0, 0]],
    }
    assert read(data / "model.js")["neurons"] == [{"layer": 0, "rows": 2}, {"layer": 1, "rows": 1}]


def test_the_details_of_a_layer_are_in_parts_with_their_own_strings(tmp_path: Path) -> None:
    rows = 2 * PART + 3
    vocab = [f"word{i}" for i in range(rows)]
    promoted, suppressed = [[i] for i in range(rows)], [[(i + 1) % rows] for i in range(rows)]
    neurons = pa.table({"layer": [4] * rows, "neuron": range(rows), "promoted": promoted, "suppressed": suppressed})
    write_pages(tmp_path, MANIFEST, tables={"neurons": neurons}, tokens=[], vocab=vocab)
    data = tmp_path / "assets" / "data"
    assert read(data / "model.js")["part"] == PART
    assert sorted(path.name for path in (data / "details" / "4").iterdir()) == ["0.js", "1.js", "2.js"]
    for number, size in enumerate((PART, PART, 3)):
        part = read(data / "details" / "4" / f"{number}.js")
        first = number * PART
        assert part["columns"] == {"suppressed": suppressed[first : first + size]}
        assert part["rows"] == size
        places = {i % rows for i in range(first, first + size + 1)}  # promoted and suppressed
        assert part["strings"] == {str(i): f"word{i}" for i in places}


def test_large_values_are_json_in_a_string_that_survives_every_token() -> None:
    value = [*HOSTILE, "it's", "\\", "\\'", "\n"] * (LARGE // 100)
    text = script("a", literal(value))
    assert len(text) > LARGE
    found = re.fullmatch(r"""atlas\.receive\("a", JSON\.parse\('((?:[^'\\\n]|\\['\\n])*)'\)\);\n""", text)
    assert found is not None, "one string, whose quotes and backslashes are escaped"
    plain = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], found[1])
    assert json.loads(plain) == value
    assert "<" not in text


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pages(tmp_path / name, MANIFEST, tables=tables(), tokens=HOSTILE, vocab=HOSTILE)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_an_atlas_without_heads_or_neurons_is_written(tmp_path: Path) -> None:
    none = {
        "layers": tables()["layers"],
        "heads": tables()["heads"].slice(0, 0),
    }
    page = write_pages(tmp_path, {}, tables=none, tokens=[], vocab=[])
    assert "Atlas of a model" in page.read_text(encoding="utf-8")
    assert read(tmp_path / "assets" / "data" / "model.js")["neurons"] == []


def test_encode_keeps_digits_types_and_nulls() -> None:
    table = pa.table(
        {
            "float": pa.array([1.23456, None, float("nan"), float("-inf"), 1e-9]),
            "half": pa.array(np.array([1.5, 2, 3, 4, 5], np.float16)),
            "int": pa.array([1, None, 10**12, -4, 0]),
            "bool": [True, None, False, True, True],
            "text": ["a", None, "<", '"', ""],
            "list": [[1.5], None, [], [2.0, None], [0.25]],
        }
    )
    found = json.loads(encode(table, digits=3))
    assert found["rows"] == 5
    assert found["types"] == {
        "float": "float", "half": "float", "int": "int", "bool": "bool", "text": "text", "list": "list",
    }  # fmt: skip
    assert found["columns"] == {
        "float": [1.23, None, None, None, 1e-9],
        "half": [1.5, 2, 3, 4, 5],
        "int": [1, None, 10**12, -4, 0],
        "bool": [True, None, False, True, True],
        "text": ["a", None, "<", '"', ""],
        "list": [[1.5], None, [], [2, None], [0.25]],
    }


def test_encode_reads_slices_and_chunks() -> None:
    table = pa.concat_tables([pa.table({"x": [[1], [2, 3]]}), pa.table({"x": [[4], [5, 6]]})]).slice(1, 2)
    assert json.loads(encode(table, 4))["columns"] == {"x": [[2, 3], [4]]}


def test_reindex_vocab_of_a_slice() -> None:
    table = pa.table({"promoted": pa.array([[0], [2, 1], None, [2]], pa.list_(pa.int32()))}).slice(1)
    found, strings = reindex_vocab(table, ["a", "b", "c"])
    assert found["promoted"].to_pylist() == [[1, 0], None, [1]]
    assert strings == ["b", "c"]


def test_literal_is_ascii_json() -> None:
    value = {"a": [float("inf"), np.float32(0.5), np.int64(3)], 1: "<\u2028\ud800", "path": Path("x")}
    assert json.loads(literal(value)) == {"a": [None, 0.5, 3], "1": "<\u2028\ud800", "path": "x"}
    assert literal(value).isascii()
    assert "<" not in literal(value)
    assert script("vocab", "[]") == 'atlas.receive("vocab", []);\n'


def test_pack_tokens_and_count_firing() -> None:
    assert pack_tokens(["a", "b", "a"]) == (["a", "b"], [0, 1, 0])
    found = count_firing(pa.table({"layer": [0, 0, 0, 2], "firing_rate": [0.0, 0.1, 1.0, 0.6]}), bins=2)
    assert found == {"edges": [0.0, 0.5, 1.0], "layers": [0, 2], "never": [1, 0], "counts": [[1, 1], [0, 1]]}
    assert count_firing(pa.table({"layer": [0]})) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tables": {"layers": pa.table({"depth": [1]})}}, 'the table "layers" lacks layer; got depth.'),
        (
            {"tables": {"units": pa.table({})}},
            'there are no pages for a table "units"; allowed: layers, heads, neurons, groups, group_layers, damage',
        ),
        ({"tables": {"groups": pa.table({})}}, 'the table "groups" lacks group_name; got .'),
        ({"vocab": ["a"]}, 'column "promoted" of the neuron table leaves the vocabulary; got 1 to 5; allowed: 0 to 0.'),
        ({"tokens": ["a"]}, 'column "example_index" of the neuron table leaves the text; got 0 to 6; allowed: 0 to 0.'),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    held = tables() | change.get("tables", {})
    given = {"tokens": HOSTILE, "vocab": HOSTILE} | change | {"tables": held}
    with pytest.raises(DataError, match=re.escape(told)):
        write_pages(tmp_path, MANIFEST, **given)
    assert list(tmp_path.iterdir()) == [], "nothing is written before the checks"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="the pages cannot be written to"):
        write_pages(tmp_path / "file", MANIFEST, tables=tables(), tokens=HOSTILE, vocab=HOSTILE)


def test_activations_around_a_peak_are_hundredths_of_its_size() -> None:
    from microtome.view._page_data import hundredths

    rows = [[[1.0, -4.0, 2.0], [None, 0.5, 50.0]], None]
    table = pa.table({"x_around": pa.array(rows, pa.list_(pa.list_(pa.float32()))), "other": [1, 2]})
    found = hundredths(table, 1).column("x_around").to_pylist()
    assert found == [[[25, -100, 50], [None, 100, 999]], None]
