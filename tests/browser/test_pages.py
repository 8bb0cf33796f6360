"""The pages of an atlas, as a browser draws them from disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.browser.tab import Tab

from microtome.view import write_pages

pytestmark = pytest.mark.browser

Reader = Callable[[Path, str], str]


@pytest.fixture(scope="module")
def page(fake: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(tmp_path_factory.mktemp("pages"), **fake)


def addresses(document: str, unit: str) -> list[str]:
    """The units that a list shows, in order."""
    return re.findall(rf'class="address"[^>]*><a href="#/{unit}/([\d.]+)"', document)


def test_overview_shows_shape_charts_maps_and_provenance(page: Path, dom: Reader, text: Reader) -> None:
    words = text(page, "")
    for expected in (
        "Fake <b>& small", "12,345 parameters", "4 heads of 4, 2 key/value", "16 → 70 → 16", "× 3 blocks", "12 min",
        "3.00 GiB", "made up", "loss – nats per token", "New together", "Previous token",
    ):  # fmt: skip
        assert expected in words, expected
    document = dom(page, "#/")
    assert 'href="#/head/2.3"' in document
    assert 'href="#/layer/2?q=firing_rate' in document
    assert document.count('class="lines"') >= 4
    assert "max abs dim" not in words, "an index is not drawn as a quantity"


CHARTS = """[...document.querySelectorAll(".charts figure")].map((f) => [
  f.querySelector("b").textContent,
  [...f.querySelectorAll(".key")].map((k) => k.textContent),
  f.querySelectorAll(".line:not(.control)").length,
  f.querySelectorAll(".line.control").length,
])"""
MAPS = "[...document.querySelectorAll('.maps figcaption b')].map((b) => b.textContent)"


def test_columns_that_no_page_has_heard_of_come_to_their_place(page: Path, browser: str, fake: dict[str, Any]) -> None:
    """The manifest says which columns share a chart, what they are called there, and what their control is."""
    tab = Tab(browser)
    try:
        tab.open(page)
        charts = tab.eval(CHARTS)
        assert ["New together", ["one", "one control", "other"], 2, 1] in charts
        assert ["Added", [""], 1, 0] in charts, "a chart of one column"
        assert ["Mlp share", [""], 1, 0] in charts, "a column without a chart has its own"
        titles = [title for title, *_ in charts]
        assert titles.index("Added") < titles.index("New together"), "in the order in which the columns stand"
        assert not [title for title in titles if "random" in title], "a control has no chart of its own"
        assert tab.eval(MAPS) == ["Previous token", "Induction", "Entropy", "New <i>score", "Firing rate"]
        row = fake["tables"]["heads"].slice(5, 1).to_pylist()[0]
        cells = "[...document.querySelectorAll('.maps figure')][3].querySelectorAll('a')"
        told = tab.eval(f"[...{cells}].map((a) => a.getAttribute('aria-label')).find((t) => t.startsWith('1.1:'))")
        number = lambda x: f"{x:.3g}" if x >= 0.1 else f"{x:.4f}" if x >= 0.001 else f"{x:.1e}"  # noqa: E731
        assert told == f"1.1: {number(row['new_head'])}, control {number(row['new_head_random'])}"
        assert tab.complaints == []
    finally:
        tab.close()


def test_layer_page_shows_its_row_with_intervals_and_its_units(
    page: Path, dom: Reader, text: Reader, fake: dict[str, Any]
) -> None:
    words = text(page, "#/layer/1")
    row = fake["tables"]["layers"].slice(1, 1).to_pylist()[0]
    lo, hi = row["loss_skip_attn_lo"], row["loss_skip_attn_hi"]
    assert f"loss skip attn {row['loss_skip_attn']:.2f} [{lo:.2f}, {hi:.2f}]" in words
    assert re.search(r"median abs –", words), "what was not measured is a dash"
    document = dom(page, "#/layer/1")
    assert addresses(document, "head") == ["1.0", "1.1", "1.2", "1.3"]
    neurons = fake["tables"]["neurons"].slice(70, 70).sort_by([("max", "descending")])
    assert addresses(document, "neuron") == [f"1.{n}" for n in neurons["neuron"].to_pylist()[:50]]


def test_infinite_value_is_a_dash(page: Path, text: Reader) -> None:
    assert re.search(r"median abs –", text(page, "#/layer/2"))


def test_head_page_shows_scores_and_siblings(page: Path, text: Reader, fake: dict[str, Any]) -> None:
    words = text(page, "#/head/2.1")
    row = fake["tables"]["heads"].slice(9, 1).to_pylist()[0]
    assert "Head 2.1" in words
    assert "2.attn.z[1]" in words
    assert "role 9" in words
    assert f"entropy {row['entropy']:.3g}" in words
    assert "Shares its keys and values with 2.0" in words
    assert "meaning of induction (unit)" in words


def test_neuron_page_opens_from_its_permalink(page: Path, dom: Reader, text: Reader) -> None:
    words = text(page, "#/neuron/1.5")
    for expected in ("Neuron 1.5", "1.mlp.post[5]", "·Paris", "↵", "\\u2028", "percentile", "Promotes", "Suppresses"):
        assert expected in words, expected
    document = dom(page, "#/neuron/1.5")
    assert 'href="#/neuron/1.4"' in document
    assert 'href="#/neuron/1.6"' in document
    assert document.count("<mark") == 2


def test_neighbours_cross_layers(page: Path, dom: Reader) -> None:
    assert 'href="#/layer/2" rel="next"' in dom(page, "#/neuron/1.69")


def test_context_stays_inside_its_sequence(page: Path, dom: Reader) -> None:
    first, last = re.findall(r'<p class="context">(.*?)</p>', dom(page, "#/neuron/1.5"), flags=re.S)
    assert first.startswith("<mark"), "the first token of a sequence has nothing before it"
    assert last.endswith("</mark>"), "the last token of a sequence has nothing after it"
    assert "… " in last


def test_hostile_tokens_stay_text(page: Path, dom: Reader, text: Reader, fake: dict[str, Any]) -> None:
    document = dom(page, "#/neuron/1.5")
    assert "<img" not in document
    assert "<title>Neuron 1.5" in document
    words = text(page, "#/neuron/1.5")
    assert fake["vocab"][0] in words
    assert fake["vocab"][1] in words


def test_list_sorts_by_permalink(page: Path, dom: Reader, fake: dict[str, Any]) -> None:
    order = fake["tables"]["neurons"].sort_by([("max", "descending")]).select(["layer", "neuron"]).to_pylist()
    expected = [f"{row['layer']}.{row['neuron']}" for row in order]
    document = dom(page, "#/neurons?sort=max&desc=1")
    assert addresses(document, "neuron") == expected[:50]
    assert 'aria-sort="descending"' in document
    assert addresses(dom(page, "#/neurons?sort=max&desc=1&page=2"), "neuron") == expected[50:100]
    assert addresses(dom(page, "#/neurons?sort=max&desc=0"), "neuron") == expected[::-1][:50]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Paris", ["1.5"]),
        ("1.5", ["1.5"]),
        ("1.mlp.post[5]", ["1.5"]),
        ("2.*%20max%3E999", []),
        ("paris%20max>=0", ["1.5"]),
    ],
)
def test_list_filters_by_permalink(page: Path, dom: Reader, query: str, expected: list[str]) -> None:
    document = dom(page, f"#/neurons?q={query}")
    assert addresses(document, "neuron") == expected
    assert f"{len(expected)} of 210 neurons" in document
    assert document.count("token hit") == (1 if "paris" in query.lower() else 0), "what was searched for is marked"


def test_lists_filter_by_layer_number_and_name(page: Path, dom: Reader, fake: dict[str, Any]) -> None:
    assert addresses(dom(page, "#/heads?q=2.*"), "head") == ["2.0", "2.1", "2.2", "2.3"]
    assert addresses(dom(page, "#/heads?q=role%2011"), "head") == ["2.3"]
    assert addresses(dom(page, "#/heads?q=ROLE%20induction>0.5&sort=induction&desc=1"), "head") == [
        f"{row['layer']}.{row['head']}"
        for row in fake["tables"]["heads"].sort_by([("induction", "descending")]).to_pylist()
        if row["induction"] > 0.5
    ]
    assert addresses(dom(page, "#/layers?q=1"), "layer") == ["1"]


@pytest.mark.parametrize(
    ("route", "told"),
    [
        ("#/nowhere", 'There is no page "/nowhere".'),
        ("#/layer/31", "This atlas has no layer 31: its layers are 0 to 2."),
        ("#/head/1.9", "This atlas has no head 1.9: its heads are 0 to 3 in layers 0 to 2."),
        ("#/neuron/1.999", "This atlas has no neuron 1.999: the neurons of layer 1 are 0 to 69."),
        ("#/neuron/9.1", "This atlas has no neuron 9.1: layers with neurons are 0 to 2."),
        ("#/neurons?q=colour>1", 'No column "colour" here. Columns: layer, neuron, firing_rate, mean, max.'),
        ("#/heads?sort=colour", 'There is no column "colour" to sort by.'),
    ],
)
def test_what_is_not_there_is_said(page: Path, text: Reader, route: str, told: str) -> None:
    assert told in text(page, route)


def test_missing_or_damaged_data_file_is_named(page: Path, text: Reader, tmp_path: Path) -> None:
    shutil.copytree(page.parent, tmp_path, dirs_exist_ok=True)
    data = tmp_path / "assets" / "data"
    (data / "details" / "1.js").unlink()
    assert "The file assets/data/details/1.js is missing" in text(tmp_path / "index.html", "#/neuron/1.5")
    (data / "neurons" / "2.js").write_text("atlas.receive(")
    assert "The file assets/data/neurons/2.js is damaged" in text(tmp_path / "index.html", "#/neurons")


def test_no_page_asks_the_network_complains_or_leaves_the_window(page: Path, browser: str) -> None:
    tab = Tab(browser)
    try:
        for width, height in ((1280, 800), (390, 844)):
            tab.resize(width, height)
            for route in ("", "#/layers", "#/heads", "#/neurons", "#/layer/1", "#/head/2.1", "#/neuron/1.5"):
                tab.open(page, route)
                fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
                assert tab.eval(fits), (route, width)
        assert tab.complaints == []
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}
    finally:
        tab.close()


DRIVER = """
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const report = {};
(async () => {
  await wait(500);
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "/", bubbles: true }));
  const box = document.activeElement;
  box.value = "Paris";
  box.dispatchEvent(new Event("input"));
  report.typed = location.hash;
  report.kept = document.activeElement === box;
  report.rows = document.querySelectorAll("tbody tr").length;
  box.value = "";
  box.dispatchEvent(new Event("input"));
  document.getElementById("by-max").focus();
  document.getElementById("by-max").click();
  await wait(300);
  report.sorted = location.hash;
  report.focus = document.activeElement.id;
  location.hash = "#/neuron/1.5";
  await wait(300);
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
  await wait(300);
  report.next = document.querySelector("h1").textContent;
  report.title = document.title;
  document.querySelector("main").textContent = JSON.stringify(report);
})();
"""


def test_typing_sorting_and_keys(page: Path, text: Reader, tmp_path: Path) -> None:
    shutil.copytree(page.parent, tmp_path, dirs_exist_ok=True)
    driven = tmp_path / "index.html"
    driven.write_text(page.read_text().replace("</head>", '<script defer src="driver.js"></script></head>'))
    (tmp_path / "driver.js").write_text(DRIVER)
    told = text(driven, "#/neurons")
    for expected in (
        '"typed":"#/neurons?q=Paris"', '"kept":true', '"rows":1', '"sorted":"#/neurons?sort=max&desc=1"',
        '"focus":"by-max"', '"next":"Neuron 1.6"', '"title":"Neuron 1.6 · Fake <b>& small"',
    ):  # fmt: skip
        assert expected in told, told
