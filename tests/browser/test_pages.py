"""The pages of an atlas, as a browser draws them from disk."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from tests.browser.conftest import LENGTH
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


def test_a_thin_atlas_says_so_on_every_page(fake: dict[str, Any], text: Reader, dom: Reader, tmp_path: Path) -> None:
    few = fake | {"manifest": fake["manifest"] | {"thin": ["640 tokens were read: <few>."]}}
    page = write_pages(tmp_path, **few)
    assert "Thin: 640 tokens were read: <few>." in text(page, "")
    for route in ("", "#/neurons", "#/head/2.1", "#/nowhere"):
        assert re.search(r'<a class="thin complaint"[^>]*>thin: 640 tokens</a>', dom(page, route))


def test_measures_are_a_table_and_not_raw_json(fake: dict[str, Any], text: Reader, tmp_path: Path) -> None:
    told = {
        "question": "Which heads <look> back?",
        "source": "A & B",
        "looked_at": "text, 8 rows",
        "check": "tests/x.py",
    }
    page = write_pages(tmp_path, **(fake | {"manifest": fake["manifest"] | {"measures": {"look_back": told}}}))
    words = text(page, "")
    assert "measure what it asks read on from" in re.sub(r"\s+", " ", words)
    assert "look back Which heads <look> back? text, 8 rows A & B" in re.sub(r"\s+", " ", words)
    assert '{"' not in words


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


def with_word(fake: dict[str, Any], word: str) -> list[str]:
    """Neurons that promote or suppress a token with a word in it, or show it in an example, by a plain look.

    First those that have it at the peak of an example.
    """
    tokens, vocab = fake["tokens"], fake["vocab"]
    peak: list[str] = []
    other: list[str] = []
    for row in fake["tables"]["neurons"].to_pylist():
        found = [word in vocab[i].lower() for i in (*row["promoted"], *row["suppressed"])]
        at_peak = False
        for at, start in zip(row["example_index"], row["example_start"], strict=True):
            first, end = max(start, at - 16), min(start + LENGTH, at + 9)
            before, whole = ("".join(tokens[first:to]).lower() for to in (at, end))
            ends = len(before) + len(tokens[at])
            places = [i for i in range(len(whole)) if whole.startswith(word, i)]
            found += [bool(places)]
            at_peak |= any(i < ends and i + len(word) > len(before) for i in places)
        if any(found):
            (peak if at_peak else other).append(f"{row['layer']}.{row['neuron']}")
    return peak + other


@pytest.mark.parametrize("query", ["1.5", "1.mlp.post[5]", "1.5 max > 0", "1.5 MAX>=0"])
def test_list_filters_by_permalink(page: Path, dom: Reader, query: str) -> None:
    document = dom(page, f"#/neurons?q={quote(query)}")
    assert addresses(document, "neuron") == ["1.5"]
    assert "1 of 210 neurons" in document
    assert "found in" not in document


@pytest.mark.parametrize("word", ["Paris", "paris", "word7", "word19", '"4 word1"', "nowhere"])
def test_words_are_found_in_tokens_and_in_examples(page: Path, dom: Reader, fake: dict[str, Any], word: str) -> None:
    """Also words that several tokens write together, and in quotes a space."""
    expected = with_word(fake, word.strip('"').lower())
    promoting = [n for n in expected if n in with_word(fake | {"tokens": [""] * 640}, word.strip('"').lower())]
    if word != "nowhere":
        assert 0 < len(expected) < 210
        assert len(expected) > len(promoting), "examples count for this word"
    document = dom(page, f"#/neurons?q={quote(word)}")
    assert addresses(document, "neuron") == expected[:50]
    assert f"{len(expected)} of 210 neurons" in document
    ordered = addresses(dom(page, f"#/neurons?q={quote(word)}&sort=address&desc=0"), "neuron")
    assert ordered == sorted(expected, key=lambda n: [int(part) for part in n.split(".")])[:50]
    found = re.findall(r'<td class="found">(.*?)</td>', document, flags=re.S)
    assert len(found) == min(50, len(expected))
    for cell in found:
        plain = html.unescape(re.sub(r"<[^>]*>", "", cell))
        marked = html.unescape("".join(re.findall(r"<mark>(.*?)</mark>", cell)))
        assert word.strip('"').lower() in marked.lower() or "promotes" in plain or "suppresses" in plain
    own = [n for n in expected if n[0] == "1"]
    layer = addresses(dom(page, f"#/layer/1?q={quote(word)}"), "neuron")
    assert len(layer) == min(50, len(own))
    assert set(layer) <= set(own)


def test_words_and_comparisons_combine(page: Path, dom: Reader, fake: dict[str, Any]) -> None:
    top = {f"{r['layer']}.{r['neuron']}" for r in fake["tables"]["neurons"].to_pylist() if r["max"] > 100}
    both = [n for n in with_word(fake, "paris") if n in top]
    assert 0 < len(both) < len(with_word(fake, "paris"))
    document = dom(page, f"#/neurons?q={quote('paris max>100')}")
    assert addresses(document, "neuron") == both[:50]
    assert addresses(dom(page, f"#/neurons?q={quote('2.* max>999')}"), "neuron") == []


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
        ("#/neurons?q=max>", 'Cannot read the number "" of "max>"; write it like 5, 0.01 or 1e-3.'),
        ("#/neurons?q=max>0,5", 'Cannot read the number "0,5" of "max>0,5"'),
        ("#/neurons?q=max!=5", 'Cannot read "max!=5": write a column, one of < <= > >= =, and a number, as in max>5.'),
        ("#/neurons?q=>5", 'Cannot read ">5": write a column'),
        ("#/neurons?q=9.5", "There is no 9.5 in this list."),
        ("#/layer/1?q=2.5", "There is no 2.5 in this list."),
        ("#/neurons?q=%22Paris", "A quotation mark is not closed."),
        ("#/heads?q=label>3", 'The column "label" holds words, not numbers: type the words alone.'),
        ("#/heads?q=induction", '"induction" is a column: sort by it , or compare it, as in induction>1.'),
        ("#/layers?q=colour", 'Cannot read "colour": this list has no words. Write an address, or a column with a'),
        ("#/layers?q=1.5", "Layers have no units to name: write 1 instead of 1.5."),
        ("#/neurons?page=99", "There is no page 99: this is the last of 5."),
        ("#/neurons?page=x", 'Cannot read the page "x": this is the first.'),
        ("#/neurons?sort=max&desc=yes", 'Cannot read desc="yes": it is 0 or 1.'),
        (
            "#/neurons?filter=max",
            'The address says "filter", which no list here knows; it may say q, sort, desc, page.',
        ),
    ],
)
def test_what_is_not_there_is_said(page: Path, text: Reader, route: str, told: str) -> None:
    assert told in text(page, route)


def test_missing_or_damaged_data_file_is_named(page: Path, text: Reader, tmp_path: Path) -> None:
    shutil.copytree(page.parent, tmp_path, dirs_exist_ok=True)
    data = tmp_path / "assets" / "data"
    (data / "details" / "1" / "0.js").unlink()
    assert "The file assets/data/details/1/0.js is missing" in text(tmp_path / "index.html", "#/neuron/1.5")
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
  await wait(300);
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


def test_typing_sorting_and_keys(page: Path, text: Reader, tmp_path: Path, fake: dict[str, Any]) -> None:
    shutil.copytree(page.parent, tmp_path, dirs_exist_ok=True)
    driven = tmp_path / "index.html"
    driven.write_text(page.read_text().replace("</head>", '<script defer src="driver.js"></script></head>'))
    (tmp_path / "driver.js").write_text(DRIVER)
    told = text(driven, "#/neurons")
    rows = min(50, len(with_word(fake, "paris")))
    for expected in (
        '"typed":"#/neurons?q=Paris"', '"kept":true', f'"rows":{rows}', '"sorted":"#/neurons?sort=max&desc=0"',
        '"focus":"by-max"', '"next":"Neuron 1.6"', '"title":"Neuron 1.6 · Fake <b>& small"',
    ):  # fmt: skip
        assert expected in told, told
