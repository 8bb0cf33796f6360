"""The kinds of heads on the pages are those of the scores in the table; neurons are counted by class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from microtome.atlas._kinds import for_pages, kinds_of
from microtome.view._page_data import count_classes


def heads(**columns: Any) -> pa.Table:
    return pa.table({"layer": [0, 0, 2, 2], "head": [0, 1, 0, 1], **columns})


@pytest.mark.parametrize(
    ("induction", "lower", "sink", "expected"),
    [
        (0.5, 0.4, 0.9, "induction"),  # a sink only where it is of no other kind
        (0.5, -0.1, 0.9, "first token (sink)"),  # not surely above its control
        (0.19, 0.1, 0.9, "first token (sink)"),  # under the threshold
        (0.19, 0.1, 0.19, "other"),
        (float("nan"), float("nan"), 0.9, "first token (sink)"),
    ],
)
def test_a_head_is_named_after_what_is_furthest_above_its_control(
    induction: float, lower: float, sink: float, expected: str
) -> None:
    table = heads(
        induction=[9.0] * 4, induction_diff=[0.0, induction, 0.0, 0.0], induction_diff_lo=[-1.0, lower, -1.0, -1.0],
        first_token_diff=[0.0, sink, 0.0, 0.0], duplicate_diff=[0.3, 0.21, 0.0, None],
        duplicate_diff_lo=[0.1, -0.1, 0.0, None],
    )  # fmt: skip
    assert kinds_of(table) == ["duplicate token", expected, "other", "other"]


def test_without_scores_there_are_no_kinds() -> None:
    assert kinds_of(heads(result_norm=[1.0] * 4)) is None
    assert kinds_of(heads(induction_diff=[0.9] * 4).slice(0, 0)) is None


def test_a_list_of_a_head_is_no_score_of_it() -> None:
    lists = pa.array([[0.9, None], [0.1, 0.2], [0.0, 0.0], [0.0, 0.0]], pa.list_(pa.float32()))
    table = heads(induction_diff=[0.9, 0.0, 0.0, 0.0], lag_attention_diff=lists, lag_attention_diff_lo=lists)
    assert kinds_of(table) == ["induction", "other", "other", "other"]
    assert kinds_of(heads(lag_attention_diff=lists)) is None


def test_the_pages_have_the_kinds_and_the_tables_do_not() -> None:
    manifest = {
        "tables": {"heads": {"columns": {"layer": {}}}, "neurons": {"columns": {"io_class": {"unit": "index"}}}}
    }
    before = json.dumps(manifest)
    table = heads(induction_diff=[0.9, 0.0, 0.0, 0.0])
    told, shown = for_pages(manifest, {"heads": table})
    assert shown["heads"].column("kind").to_pylist() == ["induction", "other", "other", "other"]
    assert "kind" not in table.column_names
    assert json.dumps(manifest) == before
    assert "furthest above its control" in told["tables"]["heads"]["columns"]["kind"]["meaning"]
    names = told["tables"]["neurons"]["columns"]["io_class"]["names"]
    assert (len(names), names[3], names[9]) == (12, "orthogonal output", "orthogonal output, atypical")


def test_neurons_are_counted_by_layer_and_class() -> None:
    g = np.random.default_rng(0)
    layers, classes = g.integers(0, 3, 200), g.integers(0, 4, 200)
    table = pa.table(
        {"layer": layers, "neuron": np.arange(200), "c": pa.array(classes, mask=classes == 3), "d": classes}
    )
    (found,) = count_classes(table, {"c": {"names": ["x", "y", "z"]}, "d": {"unit": "index"}})
    assert (found["name"], found["names"], found["layers"]) == ("c", ["x", "y", "z"], [0, 1, 2])
    expected = [[int(((layers == i) & (classes == k)).sum()) for k in range(3)] for i in range(3)]
    assert found["counts"] == expected


def test_the_pages_of_an_atlas_hold_them(tmp_path: Path) -> None:
    from microtome.view import write_pages

    neurons = pa.table({"layer": [0, 0], "neuron": [0, 1], "io_class": pa.array([3, 9], pa.int32())})
    manifest = {"tables": {"heads": {"columns": {}}, "neurons": {"columns": {"io_class": {"unit": "index"}}}}}
    tables = {"heads": heads(induction_diff=[0.9, 0.0, 0.0, 0.0]), "neurons": neurons}
    told, shown = for_pages(manifest, tables)
    write_pages(tmp_path, told, shown, [], [])
    text = (tmp_path / "assets" / "data" / "model.js").read_text()
    assert '"kind":["induction","other","other","other"]' in text
    assert '"counts":[[0,0,0,1,0,0,0,0,0,1,0,0]]' in text
