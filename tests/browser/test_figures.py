"""The figures of an atlas, as a hand and a keyboard read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.browser.conftest import WORDS
from tests.browser.tab import Anew, Tab

from microtome.view import write_pages

pytestmark = pytest.mark.browser


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
    opened.hover(1, 1)
    yield opened
    assert opened.complaints == []


WEIGHTS = "[...document.querySelectorAll('.weight')].map((w) => w.textContent)"
SHADES = "[...document.querySelectorAll('.word-button')].map((w) => w.style.getPropertyValue('--share'))"
QUERY = "[...document.querySelectorAll('.word-button')].findIndex((w) => w.classList.contains('query'))"
READING = "document.querySelector('.reading').innerText"


def middle(tab: Tab, selector: str, number: int = 0) -> tuple[float, float]:
    box = tab.eval(
        f"(() => {{ const e = document.querySelectorAll({selector!r})[{number}]; e.scrollIntoView({{block: 'center'}});"
        " const { x, y, width, height } = e.getBoundingClientRect(); return [x + width / 2, y + height / 2]; })()"
    )
    return box[0], box[1]


def told(weights: np.ndarray) -> list[str]:
    """The weights of a row as its tokens say them: per cent of bytes, nothing below half a per cent."""
    shares = np.rint(255 * weights) / 2.55
    return ["" if s < 0.5 else f"{s:.1f}" if s < 9.95 else str(round(s)) for s in shares.tolist()]


@pytest.mark.parametrize(("layer", "head", "query"), [(0, 0, 8), (1, 2, 5), (1, 3, 0)])
def test_pointing_at_a_token_shades_what_it_attends_to(
    tab: Tab, page: Path, fake: dict[str, Any], layer: int, head: int, query: int
) -> None:
    tab.open(page, f"#/head/{layer}.{head}")
    weights = fake["patterns"].layers[layer][0][head]
    tab.hover(*middle(tab, ".word-button", query))
    assert tab.eval(QUERY) == query
    assert tab.eval(WEIGHTS) == told(weights[query])
    shares = [f"{round(78 * np.sqrt(np.rint(255 * w) / 255))}%" for w in weights[query].tolist()]
    assert tab.eval(SHADES) == shares
    strongest = float(np.rint(255 * weights[query].max()) / 2.55)
    assert f"(token {query}) attends to" in tab.eval(READING)
    assert (f"{strongest:.1f} %" if strongest < 9.95 else f"{round(strongest)} %") in tab.eval(READING)


def test_leaving_comes_back_to_the_chosen_token_and_a_click_chooses(tab: Tab, page: Path, fake: dict[str, Any]) -> None:
    tab.open(page, "#/head/1.1")
    weights = np.rint(255 * fake["patterns"].layers[1][0][1])
    weights[:, 0] = 0
    first = int(np.tril(weights, -1).max(1).argmax())
    assert tab.eval(QUERY) == first, "it begins at the token that attends most to another one"
    tab.hover(*middle(tab, ".word-button", 3))
    assert tab.eval(QUERY) == 3
    tab.hover(2, 2)
    assert tab.eval(QUERY) == first
    tab.eval("document.querySelectorAll('.word-button')[4].click()")
    tab.hover(*middle(tab, ".word-button", 6))
    tab.hover(2, 2)
    assert tab.eval(QUERY) == 4


def test_keys_move_from_token_to_token(tab: Tab, page: Path) -> None:
    tab.open(page, "#/head/0.1")
    begin = tab.eval(QUERY)
    for _ in range(20):
        tab.press("Tab", 9)
        if tab.eval("document.activeElement.classList.contains('word-button')"):
            break
    assert tab.eval("Number(document.activeElement.dataset.at)") == begin, "one stop of the Tab key"
    for key, code, at in (("Home", 36, 0), ("ArrowRight", 39, 1), ("End", 35, 8), ("ArrowRight", 39, 8)):
        tab.press(key, code)
        assert tab.eval(QUERY) == at
        assert tab.eval("Number(document.activeElement.dataset.at)") == at
    tab.press("Tab", 9)
    assert not tab.eval("document.activeElement.classList.contains('word-button')")


def test_the_map_reads_the_same_rows(tab: Tab, page: Path, fake: dict[str, Any]) -> None:
    tab.open(page, "#/head/1.2")
    middle(tab, ".attention-map")
    box = tab.eval("(() => { const b = document.querySelector('.attention-map .sheet').getBoundingClientRect();"
                   " return [b.x + b.width / 2, b.y, b.height]; })()")  # fmt: skip
    tab.hover(box[0], box[1] + box[2] * (7 + 0.5) / 9)
    assert tab.eval(QUERY) == 7
    assert tab.eval(WEIGHTS) == told(fake["patterns"].layers[1][0][2][7])
    levels = {round(24 * np.sqrt(w)) for w in (np.rint(255 * fake["patterns"].layers[1][0][2]) / 255).flat} - {0}
    assert tab.eval("document.querySelectorAll('.attention-map path').length") == len(levels)


def test_the_other_passage_and_what_is_missing(tab: Tab, page: Path, fake: dict[str, Any]) -> None:
    tab.open(page, "#/head/0.3")
    tab.eval("document.querySelectorAll('.choice input')[1].click()")
    words = tab.eval("[...document.querySelectorAll('.word-text')].map((w) => w.textContent)")
    assert words == ["·Paris", "·is", "·the", "·capital"]
    tab.hover(*middle(tab, ".word-button", 3))
    assert tab.eval(WEIGHTS) == told(fake["patterns"].layers[0][1][3][3])
    tab.open(page, "#/head/2.0")
    assert "No patterns of layer 2: no attention <here>." in tab.eval("document.body.innerText")
    assert tab.eval("document.querySelectorAll('.word-button').length") == 0


def test_hostile_tokens_of_a_passage_stay_text(tab: Tab, page: Path) -> None:
    tab.open(page, "#/head/0.0")
    assert WORDS[0] in tab.eval("document.querySelector('.word-text').textContent")
    assert tab.eval("document.querySelectorAll('main img').length") == 0


def test_a_layer_shows_its_heads_and_loads_only_its_own_patterns(tab: Tab, page: Path) -> None:
    assert data_of(tab, page, "#/layer/1", "patterns") == ["patterns/1.js"]
    assert tab.eval("[...document.querySelectorAll('.small-map')].map((a) => a.getAttribute('href'))") == [
        f"#/head/1.{head}" for head in range(4)
    ]
    for route in ("", "#/heads", "#/neuron/1.5"):
        assert data_of(tab, page, route, "patterns") == [], route


def data_of(tab: Tab, page: Path, route: str, room: str) -> list[str]:
    """The data files of a room that a page asks for when it is opened."""
    tab.call("Page.navigate", url="about:blank")
    tab.requests.clear()
    tab.open(page, route)
    asked = [url.split("/data/")[1] for url in tab.requests if "/data/" in url]
    assert asked
    return [name for name in asked if name.startswith(room)]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_heads_page_fits_its_window(tab: Tab, page: Path, width: int) -> None:
    tab.resize(width, 800)
    for route in ("#/head/1.1", "#/layer/1"):
        tab.open(page, route)
        assert tab.eval("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), route


KINDS = ["induction", "other", "first token (sink)", "induction", "delimiters", "duplicate token"] * 2
CLASSES = ["strong", "weak", "strong, atypical", "weak, atypical"]


@pytest.fixture(scope="module")
def kinds(fake: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """The same atlas with kinds of heads, and classes of neurons by layer [layer, class]."""
    tables = dict(fake["tables"])
    tables["heads"] = tables["heads"].append_column("kind", pa.array(KINDS))
    classes = np.random.default_rng(1).integers(0, 4, tables["neurons"].num_rows)
    tables["neurons"] = tables["neurons"].append_column("io_class", pa.array(classes, pa.int32()))
    told = {name: dict(table) for name, table in fake["manifest"]["tables"].items()}
    told["heads"]["columns"] = told["heads"]["columns"] | {"kind": {"meaning": "by <score>"}}
    told["neurons"]["columns"] = told["neurons"]["columns"] | {"io_class": {"meaning": "class", "names": CLASSES}}
    manifest = fake["manifest"] | {"tables": told}
    page = write_pages(tmp_path_factory.mktemp("kinds"), **(fake | {"manifest": manifest, "tables": tables}))
    layers = tables["neurons"].column("layer").to_numpy()
    return page, np.stack([np.bincount(classes[layers == layer], minlength=4) for layer in range(3)])


def test_kinds_of_heads_are_one_map_with_letters(tab: Tab, kinds: tuple[Path, np.ndarray]) -> None:
    tab.open(kinds[0], "")
    cells = "[...document.querySelectorAll('.kinds .heat a')]"
    assert tab.eval(f"{cells}.map((a) => a.getAttribute('aria-label'))") == [
        f"{i // 4}.{i % 4}: {kind}" for i, kind in enumerate(KINDS)
    ]
    assert tab.eval(f"{cells}[5].getAttribute('href')") == "#/head/1.1"
    letters = tab.eval(f"{cells}.slice(0, 6).map((a) => a.querySelector('text').textContent)")
    assert letters == ["I", "", "", "I", "D", "U"], "none twice, none of what is of no kind"
    fills = tab.eval(f"{cells}.slice(0, 6).map((a) => getComputedStyle(a.querySelector('rect')).fill)")
    assert fills[0] == fills[3]
    assert len({fills[i] for i in (0, 1, 2, 4, 5)}) == 5
    legend = tab.eval("[...document.querySelectorAll('.kinds .key')].map((k) => k.textContent)")
    assert legend[0] == "induction (I) 4"
    assert legend[-2:] == ["first token (sink) 2", "other 2"]
    assert "By kind: by <score>." in tab.eval("document.querySelector('.kinds').innerText")
    tab.hover(*middle(tab, ".kinds .heat a", 4))
    assert tab.eval("document.querySelector('.kinds output').textContent") == "1.0: delimiters"
    tab.open(kinds[0], "#/head/1.0")
    assert tab.eval("document.querySelector('.of-kind').textContent") == "delimiters"


def test_classes_of_neurons_are_stacked_by_layer(tab: Tab, kinds: tuple[Path, np.ndarray]) -> None:
    page, counts = kinds
    tab.open(page, "")
    columns = "[...document.querySelectorAll('.stacked a')].map((a) => [...a.querySelectorAll('.kind')])"
    tall = f"{columns}.map((parts) => parts.map((r) => Number(r.getAttribute('height'))))"
    order = [0, 2, 1, 3]  # each class and then its atypical one
    for drawn, row in zip(tab.eval(tall), counts, strict=True):
        assert drawn == pytest.approx([198 * row[k] / row.sum() for k in order])
    legend = "[...document.querySelectorAll('.stacked .key')].map((k) => k.textContent)"
    whole = counts.sum(0)
    assert tab.eval(legend) == [f"strong {whole[0] + whole[2]}", f"weak {whole[1] + whole[3]}"]
    rects = f"{1 * 4 + 2}"
    tab.hover(*middle(tab, ".stacked .kind", int(rects)))
    share = 100 * counts[1][1] / counts[1].sum()
    told = tab.eval("document.querySelector('.stacked output').textContent")
    assert told.startswith(f"layer 1: {counts[1][1]} of 70 weak ({share:.1f}")
    tab.open(page, "#/layer/2")
    assert tab.eval("document.querySelectorAll('.stacked .here-box').length") == 1
    assert tab.eval(legend) == [f"strong {counts[2][0] + counts[2][2]}", f"weak {counts[2][1] + counts[2][3]}"]


def test_a_neuron_names_its_class(tab: Tab, kinds: tuple[Path, np.ndarray]) -> None:
    tab.open(kinds[0], "#/neuron/1.5")
    rows = tab.eval(
        "[...document.querySelectorAll('.standing tbody tr')].map((r) => [r.cells[0].innerText, r.cells[1].innerText])"
    )
    assert dict(rows)["io class"] in CLASSES


def test_a_layer_is_marked_in_all_curves_and_read_out(tab: Tab, page: Path, fake: dict[str, Any]) -> None:
    tab.open(page, "#/layer/2")
    figures = tab.eval("document.querySelectorAll('.charts .lines').length")
    assert figures >= 4
    assert tab.eval("document.querySelectorAll('.charts .here-line').length") == figures
    chart = "[...document.querySelectorAll('.charts figure')].find((f) => f.innerText.startsWith('New together'))"
    legend = f"[...{chart}.querySelectorAll('.key')].map((k) => k.innerText)"
    row = fake["tables"]["layers"].to_pylist()[2]
    home = [f"one{row['new_measure']:.2f}", "one control1.25", "other1.50"]
    assert [text.replace("\n", "") for text in tab.eval(legend)] == home
    assert tab.eval(f"{chart}.querySelector('.where').textContent") == "layer 2, unit"
    tab.eval(f"{chart}.querySelector('.lines').id = 'chosen'")
    x, y = middle(tab, "#chosen")
    tab.hover(x - 0.38 * tab.eval("document.querySelector('#chosen').getBoundingClientRect().width"), y)
    assert tab.eval(f"{chart}.querySelector('.where').textContent") == "layer 0, unit"
    tab.hover(2, 2)
    assert [text.replace("\n", "") for text in tab.eval(legend)] == home
    bars = tab.eval("document.querySelector('.bars').getAttribute('aria-label')")
    assert re.match(r"Neurons by firing rate: (\d+) neurons", bars), bars


def test_curves_stand_under_their_subjects(tab: Tab, page: Path) -> None:
    tab.open(page, "")
    found = tab.eval("[...document.querySelectorAll('.charts')].map((c) => [c.previousElementSibling.textContent,"
                     " [...c.querySelectorAll('b')].map((b) => b.textContent)])")  # fmt: skip
    subjects = dict(found)
    assert list(subjects) == ["The residual stream", "Sinks and massive activations", "Further"]
    assert "Added" in subjects["The residual stream"]
    assert "New together" in subjects["Further"]


def test_the_signs_of_gate_and_input_have_examples(tab: Tab, fake: dict[str, Any], tmp_path: Path) -> None:
    neurons = fake["tables"]["neurons"]
    rows = neurons.num_rows
    shares = {"gate_pos_in_pos": 0.5, "gate_pos_in_neg": 0.125, "gate_neg_in_pos": 0.375, "gate_neg_in_neg": 0.0}
    for name, share in shares.items():
        neurons = neurons.append_column(name, pa.array([share] * rows))
    places = {"signs_value": [2.5, -1.25, -0.5, None], "signs_index": [33, 70, 40, -1], "signs_start": [32, 64, 32, -1]}
    for name, values in places.items():
        neurons = neurons.append_column(name, pa.array([values] * rows))
    page = write_pages(tmp_path, **(fake | {"tables": fake["tables"] | {"neurons": neurons}}))
    tab.open(page, "#/neuron/1.5")
    lines = tab.eval(
        "[...document.querySelectorAll('.signs tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    assert [line[:3] for line in lines] == [
        ["gate > 0, input > 0", "50.0 %", "2.50"], ["gate > 0, input ≤ 0", "12.5 %", "−1.25"],
        ["gate ≤ 0, input > 0", "37.5 %", "−0.500"], ["gate ≤ 0, input ≤ 0", "0.0 %", "–"],
    ]  # fmt: skip
    assert lines[3][3] == "never"
    marks = tab.eval("[...document.querySelectorAll('.signs mark')].map((m) => m.textContent)")
    assert len(marks) == 3
    plain = [fake["tokens"][place] for place in (33, 70, 40)]
    for mark, word in zip(marks, plain, strict=True):
        assert mark == word or word in (*WORDS, "\n"), (mark, word)
    context = tab.eval("document.querySelectorAll('.signs .context')[1].textContent")
    assert fake["tokens"][66].strip() in context
    assert "signs index" not in tab.eval("document.body.innerText"), "not listed once more"


def test_a_map_of_thousands_of_cells_is_few_elements_and_reads_the_same(tab: Tab, page: Path) -> None:
    tab.open(page, "#/layers")
    tab.eval(
        """(() => {
        const values = (i, j) => (i === 3 && j === 2 ? -1.5 : (i * 7 + j) % 11 / 11);
        const figure = atlas.chart.heat({
          title: "Large", columns: [...Array(64).keys()], rows: [...Array(32).keys()], across: "layer", down: "head",
          cell: (column, row, i, j) => ({ value: i === 5 && j === 5 ? null : values(i, j), text: `at ${column}.${row}`,
            href: `#/head/${column}.${row}` }),
        });
        figure.id = "large";
        document.querySelector("main").prepend(figure);
        })()"""
    )
    assert tab.eval("document.querySelectorAll('#large *').length") < 200
    tab.eval(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )  # its caption has settled
    box = tab.eval("(() => { const b = document.querySelector('#large .sheet-over').getBoundingClientRect();"
                   " return [b.x, b.y, b.width / 64, b.height / 32]; })()")  # fmt: skip
    for column, row in ((0, 0), (3, 2), (63, 31), (17, 9)):
        tab.hover(box[0] + (column + 0.5) * box[2], box[1] + (row + 0.5) * box[3])
        assert tab.eval("document.querySelector('#large output').textContent") == f"at {column}.{row}"
    strongest = "document.querySelector('#large path.cold')"
    assert tab.eval(f"{strongest}.getAttribute('d').match(/M/g).length") == 1
    assert tab.eval(f"{strongest}.getAttribute('fill-opacity')") == "1.000"
    assert tab.eval("document.querySelector('#large path.blank').getAttribute('d').match(/M/g).length") == 1
    for kind in ("mousePressed", "mouseReleased"):
        x, y = box[0] + 1.5 * box[2], box[1] + 2.5 * box[3]
        tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert tab.eval("location.hash") == "#/head/1.2"
