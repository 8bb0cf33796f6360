"""Results saved as SVG and as CSV."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from tests import effects

from microtome.errors import DataError
from microtome.view import View

SVG = "{http://www.w3.org/2000/svg}"


def test_the_figures_are_one_svg_that_stands_alone(tmp_path: Path) -> None:
    path = View(effects.fake()).save(tmp_path / "a.svg")
    text = path.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("color"), "what takes the colour around it finds one"
    assert not re.search(r"var\(|class=|<script|<div|href=|@import", text)
    pictures = root.findall(f".//{SVG}svg")
    assert len(pictures) == 2
    words = [node.text or "" for node in root.iter(f"{SVG}text")]
    assert words[0] == "Activation patching: <b>Paris rather than Rome"
    assert any("-1.23 to 1.23 share of the gap" in word for word in words), words
    titles = [node.text or "" for node in root.iter(f"{SVG}title")]
    assert any("+0.877" in title for title in titles)
    boxes = [(float(p.get("y", 0)), float(p.get("height", 0))) for p in pictures]
    assert boxes[0][0] + boxes[0][1] < boxes[1][0], "one below the other"
    assert boxes[1][0] + boxes[1][1] < float(root.get("height", 0))


def test_numbers_are_rfc_4180_with_units(tmp_path: Path) -> None:
    data = effects.fake()
    path = View(data[["resid_pre", "resid_pre_lo", "clean"]]).save(tmp_path / "a.csv")
    raw = path.read_bytes().decode()
    assert raw.count("\n") - raw.count("\r\n") == 2 * len(data["layer"]), "those in two tokens"
    rows = list(csv.DictReader(io.StringIO(raw, newline=""), strict=True))
    assert len(rows) == data["resid_pre"].size
    assert {"layer", "pos", "clean_token", "resid_pre (share of the gap)", "resid_pre_lo (share of the gap)"} <= set(
        rows[0]
    )
    for row in rows:
        expected = data["resid_pre"].values[int(row["layer"]), int(row["pos"])]
        value = row["resid_pre (share of the gap)"]
        assert value == "" if np.isnan(expected) else float(value) == expected
        assert row["clean_token"] == effects.CLEAN[int(row["pos"])]


def test_single_numbers_are_one_row(tmp_path: Path) -> None:
    data = xr.Dataset({"loss": ((), 2.5, {"unit": "nats"}), "rows": ((), 3, {"unit": "1"})})
    path = View(data).save(tmp_path / "a.csv")
    assert path.read_text() == "loss (nats),rows\n2.5,3.0\n"


def test_what_is_no_table_or_no_figure_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"not one table; got resid_pre, .* over layer, pos; attn.z\[head\] over head, layer"
    ):
        View(effects.fake()).save(tmp_path / "a.csv")
    with pytest.raises(DataError, match="nothing of this is drawn as a figure; got loss"):
        View(xr.Dataset({"loss": 2.5})).save(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", effects.EVERY, ids=lambda make: make.__name__)
def test_every_form_is_saved(tmp_path: Path, make: Callable[[], xr.Dataset]) -> None:
    drawn = ET.fromstring(View(make()).save(tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert drawn.tag.endswith("svg")
    assert len(list(drawn.iter())) > 5
