"""Figures saved as SVG and tables saved as CSV, from pages on disk."""

from __future__ import annotations

import csv
import io
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import effects
from tests.browser.tab import Anew, Tab

from microtome.view import write_page, write_pages

pytestmark = pytest.mark.browser
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def page(fake: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(tmp_path_factory.mktemp("pages"), **fake)


@pytest.fixture(scope="module")
def opened(browser: str) -> Iterator[Tab]:
    tab = Anew(browser)
    yield tab
    tab.close()


@pytest.fixture
def tab(opened: Tab) -> Iterator[Tab]:
    opened.resize(1280, 900)
    yield opened
    assert opened.complaints == []


def saved(tab: Tab, button: str) -> tuple[str, str]:
    """The name and the text of what a button saves."""
    found = tab.eval(
        f"""(async () => {{
        const [make, click] = [URL.createObjectURL, HTMLAnchorElement.prototype.click];
        let told = null;
        URL.createObjectURL = (blob) => ((told = {{ blob }}), "blob:none");
        HTMLAnchorElement.prototype.click = function () {{ told.name = this.download; }};
        {button}.click();
        await new Promise((done) => setTimeout(done, 20));
        [URL.createObjectURL, HTMLAnchorElement.prototype.click] = [make, click];
        return [told.name, await told.blob.text()];
        }})()"""
    )
    return found[0], found[1]


def test_the_button_saves_a_file_from_disk(tab: Tab, page: Path, tmp_path: Path) -> None:
    """Both buttons of the atlas, and those of a result's page, whose policy forbids requests."""
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.open(page, "#/heads")
    tab.eval("document.querySelector('.save').click()")
    tab.open(page, "#/head/1.1")
    tab.eval("document.querySelector('figure .save').click()")
    tab.open(write_page(tmp_path / "effects.html", effects.fake()))
    tab.eval("document.querySelector('figure .save').click()")
    names = ["Fake-b-small-Heads-heads.csv", "Fake-b-small-Head-1.1-Head-1.1-First.svg"]
    for _ in range(100):
        files = [p for p in tmp_path.iterdir() if p.suffix in (".csv", ".svg")]
        there = {p.name for p in files if p.stat().st_size > 500}
        if len(there) >= 3:
            break
        time.sleep(0.1)
    assert there >= set(names), there
    assert len(there) == 3


def test_a_table_is_rfc_4180_with_units_and_all_its_rows(tab: Tab, page: Path, fake: dict[str, Any]) -> None:
    tab.open(page, "#/neurons?q=max>10&sort=max&desc=1")
    name, text = saved(tab, "document.querySelector('.tally .save')")
    assert name.endswith("neurons.csv")
    assert text.endswith("\r\n")
    assert text.count("\n") == text.count("\r\n")
    head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert head == ["layer", "neuron", "firing_rate (unit)", "mean (unit)", "max (unit)", "promoted"]
    table = [r for r in fake["tables"]["neurons"].to_pylist() if r["max"] > 10]
    table.sort(key=lambda r: -r["max"])
    assert len(rows) == len(table) > 50, "not only the first page"
    for row, expected in zip(rows, table, strict=True):
        assert [int(row[0]), int(row[1])] == [expected["layer"], expected["neuron"]]
        numbers = [expected[key] for key in ("firing_rate", "mean", "max")]
        assert [float(x) for x in row[2:5]] == pytest.approx(numbers, rel=1e-3)
    held = next(row[5] for row in rows if row[:2] == ["1", "5"])
    assert '" Paris"' in held, "lists are JSON"
    assert "</script><img" in held


def test_what_is_missing_is_empty_and_intervals_have_columns(tab: Tab, page: Path, fake: dict[str, Any]) -> None:
    tab.open(page, "#/layers")
    _, text = saved(tab, "document.querySelector('.tally .save')")
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert [row["median_abs (unit)"] for row in rows] == ["0.25", "", ""]
    row = fake["tables"]["layers"].to_pylist()[1]
    for name in ("loss_skip_attn", "loss_skip_attn_lo", "loss_skip_attn_hi"):
        assert float(rows[1][f"{name} (unit)"]) == pytest.approx(row[name], rel=1e-5)
    tab.open(page, "#/layer/1")
    _, text = saved(tab, "document.querySelector('.saves .save')")
    told = {r["measure"]: r for r in csv.DictReader(io.StringIO(text, newline=""), strict=True)}
    assert float(told["loss_skip_attn"]["lower end"]) == pytest.approx(row["loss_skip_attn_lo"], rel=1e-5)
    assert told["loss_skip_attn"]["unit"] == "unit"
    assert told["median_abs"]["value"] == ""


def alone(text: str) -> ET.Element:
    """An SVG that needs nothing of the page it is from: parsed, and with its look on its elements."""
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert not re.search(r"class=|style=|var\(|currentColor|href=|<script|onclick", text)
    for node in root.iter():
        if node.tag == f"{SVG}text":
            assert node.get("font-family"), ET.tostring(node)
            assert node.get("fill"), ET.tostring(node)
        if node.tag in (f"{SVG}path", f"{SVG}rect"):
            assert node.get("fill") or node.get("stroke"), ET.tostring(node)
    ground = root.find(f"{SVG}rect")
    assert ground is not None
    assert ground.get("fill") == "#ffffff"
    return root


@pytest.mark.parametrize("dark", [False, True])
def test_a_chart_stands_alone_in_the_light_palette(tab: Tab, page: Path, dark: bool) -> None:
    tab.resize(1280, 900, dark)
    tab.open(page, "")
    chart = "[...document.querySelectorAll('.charts figure')].find((f) => f.innerText.startsWith('New together'))"
    name, text = saved(tab, f"{chart}.querySelector('.save')")
    assert name == "Fake-b-small-New-together.svg" or name == "Atlas-of-Fake-b-small-New-together.svg"
    words = [node.text for node in alone(text).iter(f"{SVG}text")]
    for expected in ("New together", "one", "one control", "other", "layer", "unit"):
        assert expected in words, words
    assert "rgb(29, 92, 158)" in text, "the first colour of the light palette"
    assert "rgb(130, 180, 238)" not in text
    assert tab.eval("document.querySelectorAll('.paper').length") == 0


def test_maps_keep_their_scale_and_tooltips(tab: Tab, page: Path, tmp_path: Path) -> None:
    tab.open(page, "")
    _, text = saved(tab, "document.querySelectorAll('.maps figure .save')[1]")
    root = alone(text)
    words = [node.text or "" for node in root.iter(f"{SVG}text")]
    assert "Induction" in words
    assert any(re.fullmatch(r"0 to 0\.\d+", word) for word in words), words
    titles = [node.text or "" for node in root.iter(f"{SVG}title")]
    assert len([t for t in titles if re.match(r"\d\.\d: ", t)]) == 12
    tab.open(write_page(tmp_path / "effects.html", effects.fake()))
    _, text = saved(tab, "document.querySelector('figure .save')")
    root = alone(text)
    assert 'fill="url(#hatch)"' in text
    assert root.find(f".//{SVG}pattern") is not None
    assert any("share of the gap" in (node.text or "") for node in root.iter(f"{SVG}text")), "its scale and unit"


def test_tables_of_results_are_saved_as_values(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.estimated()))
    _, text = saved(tab, "document.querySelector('.strongest .save')")
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    estimate = next(name for name in rows[0] if name.startswith("estimate"))
    assert float(rows[0][estimate]) == pytest.approx(0.87654, rel=1e-4)
    exact = next(name for name in rows[0] if name.startswith("exact"))
    assert float(rows[0][exact]) == 0.75
    tab.open(write_page(tmp_path / "b.html", effects.parts()))
    _, text = saved(tab, "document.querySelector('.parts .save')")
    assert list(csv.reader(io.StringIO(text, newline="")))[1][:2] == ["L0H0", "3"]
