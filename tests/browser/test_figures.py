"""The figures of an atlas, as a hand and a keyboard read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.browser.conftest import WORDS
from tests.browser.tab import Tab

from microtome.view import write_pages

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(fake: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(tmp_path_factory.mktemp("pages"), **fake)


@pytest.fixture(scope="module")
def opened(browser: str) -> Iterator[Tab]:
    tab = Tab(browser)
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
