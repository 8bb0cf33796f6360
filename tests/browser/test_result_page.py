"""The page of a result, as a browser draws it from disk and as a hand and a keyboard read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tests import effects
from tests.browser.tab import Tab

from microtome.view import html, write_page

pytestmark = pytest.mark.browser

Opened = Callable[..., Tab]
TIP = "document.querySelector('.tip').hidden ? '' : document.querySelector('.tip').innerText"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "effects.html", effects.fake())


@pytest.fixture
def tab(browser: str) -> Iterator[Tab]:
    opened = Tab(browser)
    yield opened
    opened.close()


def cell(tab: Tab, number: int, row: int, column: int) -> tuple[float, float]:
    """The middle of a cell of a map, in pixels of the window, read off the sheet that the cells lie on."""
    box: dict[str, Any] = tab.eval(
        f"""(() => {{
        const svg = document.querySelectorAll('.cells')[{number}];
        svg.scrollIntoView({{block: 'center'}});
        const {{ x, y, width, height }} = svg.querySelector('.sheet').getBoundingClientRect();
        return {{ x, y, width, height }};
        }})()"""
    )
    rows, columns = (len(effects.CLEAN), effects.HEADS)[number], effects.LAYERS
    return box["x"] + (column + 0.5) * box["width"] / columns, box["y"] + (row + 0.5) * box["height"] / rows


def signed(value: float) -> str:
    return f"{value:+#.4g}".replace("-", "−")


def test_opens_from_disk_without_a_request_or_a_complaint(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert tab.requests == [page.as_uri()]
    assert tab.complaints == []
    assert tab.eval("document.querySelectorAll('.cells').length") == 2
    assert tab.eval("document.title") == "Activation patching: <b>Paris rather than Rome"


def test_the_policy_of_the_page_forbids_requests_and_foreign_scripts(tab: Tab, page: Path) -> None:
    """The two lists above can fill: what the page may not do is seen and refused."""
    tab.open(page)
    tab.eval("fetch('http://127.0.0.1:9/x').catch(() => 0)")
    tab.eval("document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=1'}))")
    assert len([c for c in tab.complaints if "Content Security Policy" in c]) >= 2, tab.complaints
    assert tab.eval("document.title") != "1"


def test_hostile_prompts_stay_text(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert tab.eval("document.scripts.length") == 2
    words = tab.eval("document.querySelector('.prompts').innerText")
    assert effects.SCRIPT in words
    assert "\\u202eis" in words
    assert "\\u001b[31m↵" in words
    assert tab.eval("document.querySelectorAll('h1 b, .facts i').length") == 0


@pytest.mark.parametrize(("number", "row", "column"), [(0, 1, 1), (0, 4, 3), (1, 1, 2), (1, 0, 0)])
def test_pointing_at_a_cell_tells_its_place_and_value(tab: Tab, page: Path, number: int, row: int, column: int) -> None:
    tab.open(page)
    tab.hover(*cell(tab, number, row, column))
    told = tab.eval(TIP)
    data = effects.fake()
    value = float(data[("resid_pre", "attn.z[head]")[number]].values[column, row])
    assert f"{signed(value)} share of the gap" in told
    if number == 0:
        assert f"[{signed(value - 0.125)}, {signed(value + 0.125)}]" in told
        assert f"layer {column}, position {row}" in told
        assert f"{column}.resid_pre@{row}" in told
    else:
        assert f"layer {column}, head {row}" in told
        assert f"{column}.attn.z[{row}]" in told
    if (number, row) == (0, 1):
        assert "clean ·Paris" in told
        assert "corrupt ·Rome" in told
    tab.hover(2, 2)
    assert tab.eval(TIP) == ""


def test_what_was_not_measured_is_hatched_and_said(tab: Tab, page: Path) -> None:
    tab.open(page)
    tab.hover(*cell(tab, 0, 2, 0))
    assert tab.eval(TIP).startswith("not measured")
    tab.hover(*cell(tab, 1, 2, 3))
    assert tab.eval(TIP).startswith("not measured"), "an infinite value"
    holes = tab.eval(
        "document.querySelectorAll('.cells')[0].querySelector('.missing').getAttribute('d').match(/M/g).length"
    )
    assert holes == len(effects.CLEAN)
    assert "not measured" in tab.eval("document.querySelector('.scale').innerText")


def test_keys_read_the_maps(tab: Tab, page: Path) -> None:
    data = effects.fake()["resid_pre"].values
    tab.open(page)
    reached = []
    for _ in range(8):
        tab.press("Tab", 9)
        reached.append(tab.eval("document.activeElement.getAttribute('class') || document.activeElement.tagName"))
        if reached[-1] == "cells":
            break
    assert reached[-1] == "cells", reached
    assert signed(data[1, 1]) in tab.eval(TIP), "it begins at the strongest cell"
    tab.press("ArrowRight", 39)
    assert signed(data[2, 1]) in tab.eval(TIP)
    tab.press("ArrowDown", 40)
    tab.press("End", 35)
    assert signed(data[3, 2]) in tab.eval(TIP)
    tab.press("ArrowRight", 39)
    assert signed(data[3, 2]) in tab.eval(TIP), "it stays inside"
    tab.press("Escape", 27)
    assert tab.eval(TIP) == ""


def shades(tab: Tab, number: int, kind: str) -> list[float]:
    path = f"document.querySelectorAll('.cells')[{number}].querySelectorAll('path.{kind}')"
    return tab.eval(f"[...{path}].map((p) => Number(p.getAttribute('fill-opacity')))")


def test_colours_share_one_symmetric_scale_or_take_each_map_its_own(tab: Tab, page: Path) -> None:
    tab.open(page)
    words = tab.eval("document.querySelector('.scale').innerText")
    assert "−1.23" in words
    assert "+1.23 share of the gap" in words
    assert max(shades(tab, 0, "cold")) == 1.0
    assert max(shades(tab, 1, "hot")) == pytest.approx(0.87654 / 1.2346, abs=1 / 60)
    tab.eval("document.querySelectorAll('input[name=scale]')[1].click()")
    assert max(shades(tab, 1, "hot")) == 1.0
    assert tab.eval("document.querySelectorAll('.ends')[1].textContent") == "−0.877 to +0.877"


SITES = "[...document.querySelectorAll('.strongest tbody tr')].map((r) => r.cells[0].innerText)"
VALUES = "[...document.querySelectorAll('.strongest tbody tr')].map((r) => r.cells[4].innerText.split(' ')[0])"


def test_the_table_sorts_filters_and_leads_to_the_map(tab: Tab, page: Path) -> None:
    tab.open(page)
    numbers = lambda: [float(v.replace("−", "-")) for v in tab.eval(VALUES)]  # noqa: E731
    first = numbers()
    assert len(first) == 12
    assert first[0] == -1.235
    assert [abs(v) for v in first] == sorted((abs(v) for v in first), reverse=True)
    head = "document.querySelectorAll('.strongest th button')"
    tab.eval(f"{head}[4].click()")
    assert numbers() == sorted(first, reverse=True)
    assert tab.eval("document.querySelector('.strongest th[aria-sort]').getAttribute('aria-sort')") == "descending"
    tab.eval(f"{head}[4].click()")
    assert numbers() == sorted(first)
    tab.eval("document.querySelector('.more').click()")
    assert len(numbers()) == 15 + 11
    tab.eval("(() => { const s = document.querySelector('select'); s.value = 'attn.z[head]';"
             " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    sites = tab.eval(SITES)
    assert len(sites) == 11
    assert all(re.fullmatch(r"\d\.attn\.z\[\d\]", site) for site in sites)
    tab.eval(f"{head}[5].click()")
    tab.eval("document.querySelector('.strongest tbody button').click()")
    assert tab.eval("document.activeElement.getAttribute('class')") == "cells"
    assert "+0.8765 share of the gap" in tab.eval(TIP)


def test_estimates_show_their_exact_values(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.estimated()))
    assert tab.complaints == []
    heads = tab.eval("[...document.querySelectorAll('.strongest th')].map((t) => t.innerText)")
    assert [h for h in heads if h in ("estimate", "exact", "value")] == ["estimate", "exact"]
    first = tab.eval("[...document.querySelector('.strongest tbody tr').cells].map((c) => c.innerText)")
    assert first[:5] == ["2.attn.z[1]", "2", "1", "+0.8765", "+0.7500"], "heads have no token"
    assert "not measured" in tab.eval("document.querySelector('.strongest tbody').innerText")
    assert "attn.z[head]\t0.875\t2" in tab.eval("document.querySelector('.checks').innerText")
    tab.eval("document.querySelector('.strongest tbody button').click()")
    assert "exact: +0.7500" in tab.eval(TIP)


def test_edges_are_named_by_their_ends_and_drawn_by_layer(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.edges()))
    assert tab.complaints == []
    assert tab.eval("[...document.querySelectorAll('figcaption b')].map((b) => b.innerText)") == [
        "score", "strongest score between two layers"
    ]  # fmt: skip
    assert tab.eval("[...document.querySelectorAll('.strongest th')].map((t) => t.innerText)") == [
        "site",
        "value",
        "size",
    ]
    assert tab.eval(SITES)[0] == "embed → 1.mlp.in"
    assert "no edge" in tab.eval("document.querySelector('.scale').innerText")
    tab.eval("document.querySelector('.strongest tbody button').click()")
    assert tab.eval(TIP).startswith("−4.000 logits")


def test_a_traced_fact_marks_its_subject(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.traced()))
    assert tab.complaints == []
    assert tab.eval("[...document.querySelectorAll('.prompts .hit')].length") == 2
    assert tab.eval("document.querySelector('.prompts').innerText").split()[-1] == "0.2500"
    assert tab.eval("document.querySelector('h1').innerText") == "Causal tracing: Seattle"


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_leaves_the_window(tab: Tab, page: Path, tmp_path: Path, width: int, height: int, dark: bool) -> None:
    tab.resize(width, height, dark)
    tab.open(page)
    assert tab.eval("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    spread = tab.eval("[...document.querySelectorAll('.cells')].map((c) => c.getBoundingClientRect().right)")
    assert max(spread) <= width
    ground = tab.eval("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(21, 23, 26)" if dark else "rgb(253, 253, 252)")
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert tab.complaints == []


def test_a_long_prompt_of_a_deep_model_fits_too(tab: Tab, tmp_path: Path) -> None:
    values = np.random.default_rng(3).normal(size=(80, 200))
    coords = {"layer": range(80), "token": ("pos", [f" word{i}" for i in range(200)])}
    data = xr.Dataset({"mlp_out": (("layer", "pos"), values, {"unit": "logits"})}, coords=coords)
    tab.resize(390, 844)
    tab.open(write_page(tmp_path / "long.html", data))
    assert tab.complaints == []
    assert tab.eval("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.eval("document.querySelectorAll('.cells *').length") < 600, "cells of one shade are one element"


@pytest.mark.parametrize("make", effects.EVERY, ids=lambda make: make.__name__)
def test_every_form_is_drawn_in_its_window(tab: Tab, tmp_path: Path, make: Callable[[], xr.Dataset]) -> None:
    place = write_page(tmp_path / "a.html", make())
    for width in (1280, 390):
        tab.resize(width, 800)
        tab.open(place)
        assert tab.eval("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
    assert tab.complaints == []
    assert tab.eval("document.scripts.length") == 2
    assert tab.eval("document.querySelectorAll('main i').length") == 0, "no name became markup"


def test_a_line_is_read_with_its_interval_and_its_control(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.over_layers()))
    assert tab.eval("document.querySelector('figcaption b').textContent") == "change of the loss (change)"
    assert tab.eval("document.querySelectorAll('.line.control').length") == 1
    tab.eval("document.querySelector('.lines').focus()")
    for _ in range(2):
        tab.press("ArrowRight", 39)
    told = tab.eval("document.querySelector('.legend').innerText")
    assert "measured−1.50 [−1.63, −1.38]" in told.replace("\n", "")
    assert "control0.0625" in told.replace("\n", "")
    assert tab.eval("document.querySelector('.where').textContent") == "layer 1, nats"
    assert "12,000 tokens" in tab.eval("document.querySelector('.facts').innerText")


def test_neurons_are_listed_beside_their_distribution(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.over_neurons()))
    first = tab.eval("[...document.querySelector('.neurons tbody tr').cells].map((c) => c.innerText)")
    assert first[:3] == ["L3N17", "+2.500", "+0.3125"]
    assert tab.eval("document.querySelectorAll('.neurons .heat a').length") == 4 * 24


def test_tokens_stand_in_cells_from_the_last_layer_down(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.words()))
    rows = tab.eval("[...document.querySelectorAll('.word-map tbody tr')].map((r) => r.innerText.split(/\\s+/))")
    assert [row[0] for row in rows] == ["1", "0", "embed"]
    assert rows[0][-2:] == ["·<i>Paris", "↵"]
    share = "[...document.querySelectorAll('.word')].map((w) => w.style.getPropertyValue('--share'))"
    assert tab.eval(share)[8:10] == ["72%", "75%"]
    assert tab.eval("document.querySelector('.word-map tbody td:last-child').title") == "·<i>Paris 0.966\n↵ 1.00"


def test_a_slider_shows_one_layer_as_a_line_and_the_pointer_reads_a_cell(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.words()))
    layer, told = (f"document.querySelector('{of}').innerText" for of in (".layer-line output", ".told"))
    said = "[...document.querySelectorAll('.running .said')].map((w) => w.innerText)"
    first = "[...r.cells].slice(1).map((c) => c.querySelector('.word').innerText)"
    rows = tab.eval(f"[...document.querySelectorAll('.word-map tbody tr')].map((r) => {first})")
    assert (tab.eval(layer), tab.eval(said)) == ("layer 1", rows[0]), "it begins at the last layer"
    slider, table, cell = ".layer-line input", ".word-map", '.word-map td[data-row="1"][data-column="2"]'

    def send(place: str, event: str) -> None:
        tab.eval(f"document.querySelector('{place}').dispatchEvent({event})")

    tab.eval(f"document.querySelector('{slider}').value = '0'")
    send(slider, "new Event('input')")
    assert (tab.eval(layer), tab.eval(said)) == ("embed", rows[2])
    assert tab.eval("document.querySelector('.word-map tr.on th').innerText") == "embed"
    send(cell, "new Event('pointerover', {bubbles: true})")
    assert tab.eval(layer) == "layer 0"
    assert tab.eval(told).startswith("layer 0, position 2, ")
    assert rows[1][2] in tab.eval(told)
    send(table, "new KeyboardEvent('keydown', {key: 'ArrowUp', bubbles: true})")
    assert tab.eval(layer) == "layer 1"
    assert tab.complaints == []


def test_parts_end_in_their_sum(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.parts()))
    words = tab.eval("document.querySelector('.parts').innerText")
    assert "L0H0\t+3.000" in words
    assert "·France +2.25, <i> +0.75" in words
    assert re.search(r"sum\s+\+1\.875\s+logit as measured \+1\.875", words)


def test_a_circuit_is_followed_by_a_click_and_cut_by_a_slider(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "a.html", effects.circuit()))
    lines = "document.querySelectorAll('.circuit .edge').length"
    assert tab.eval(lines) == 6
    assert tab.eval("document.querySelector('.graph tbody tr').innerText").split() == [
        "embed",
        "→",
        "1.mlp_out",
        "−4.00",
        "−3.50",
    ]
    tab.eval("document.querySelector('.circuit .node[aria-label=\"1.mlp_out\"]').dispatchEvent(new Event('click'))")
    assert tab.eval(lines) == 2, "the embedding and the head write to it"
    told = tab.eval("document.querySelector('.graph .note').innerText")
    assert told.startswith("the 6 strongest of 6 edges")
    slider = "document.querySelector('.graph input')"
    tab.eval(f"{slider}.value = 0")
    tab.eval(f"{slider}.dispatchEvent(new Event('input'))")
    assert tab.eval(lines) == 1
    assert tab.complaints == []
    assert tab.requests == [(tmp_path / "a.html").as_uri()]


def test_a_fragment_fits_a_notebook_in_light_and_dark(tab: Tab, tmp_path: Path) -> None:
    place = tmp_path / "a.html"
    for colours in ("background:#fff;color:#111", "background:#111;color:#ddd"):
        place.write_text(f'<!doctype html><meta charset="utf-8"><body style="{colours}">{html(effects.fake())}')
        tab.resize(900, 700)
        tab.open(place)
        assert tab.requests[-1] == place.as_uri()
        assert tab.eval("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        fill = tab.eval("getComputedStyle(document.querySelector('svg text')).fill")
        assert fill == ("rgb(17, 17, 17)" if "#fff" in colours else "rgb(221, 221, 221)")
    assert tab.complaints == []
    assert len(set(tab.requests)) == 1


def test_exact_effects_stand_out_from_estimates(tab: Tab, tmp_path: Path) -> None:
    """An exact effect three times as strong as its estimate has the colour of the effect, and a frame."""
    data = effects.estimated()
    data["attn.z[head]"][1, 2], data["attn.z[head]_exact"][1, 2] = 0.5, 1.5
    tab.open(write_page(tmp_path / "a.html", data))
    assert "1.50" in tab.eval("document.querySelector('.scale').innerText"), "exact values are on the scale"
    assert "measured exactly, in the colour of that value" in tab.eval("document.querySelector('.scale').innerText")
    frames = tab.eval("document.querySelector('.grids .cells .exact').getAttribute('d')")
    assert frames.count("M") == 3
    assert max(shades(tab, 0, "hot")) == 1.0
    assert 0.75 / 1.5 in shades(tab, 0, "hot"), "the exact value of the strongest estimate"
    first = tab.eval("[...document.querySelector('.strongest tbody tr').cells].map((c) => c.innerText)")
    assert first[:5] == ["1.attn.z[2]", "1", "2", "+0.5000", "+1.500"], "and it is listed first"
    assert tab.complaints == []


def test_provenance_is_in_words_and_code_is_no_backtick(tab: Tab, tmp_path: Path) -> None:
    told = {"known": 1, "noise": 3.0, "samples": 10, "direction": "noise", "reading": "Over `window` layers, <b>."}
    tab.open(write_page(tmp_path / "a.html", effects.traced().assign_attrs(told)))
    facts = tab.eval("document.querySelector('footer').innerText")
    for words in (
        "is the answer the model's own\nyes", "size of the noise\n3 standard deviations of the embeddings",
        "draws of the noise\n10", "direction\ncorrupt values are put into the clean run",
    ):  # fmt: skip
        assert words in facts, facts
    assert tab.eval("document.querySelector('.lede').innerHTML") == "Over <code>window</code> layers, &lt;b&gt;."
    fragment = html(effects.traced().assign_attrs(told))
    assert "Over <code>window</code> layers, &lt;b&gt;." in fragment
    assert "`" not in tab.eval("document.body.innerText")
