"""The pages of groups and relations, and what a user called units, as a browser draws them from disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.browser.conftest import HEADS, IMAGE, LAYERS, LENGTH, NEURONS
from tests.browser.tab import Tab

from microtome.view import write_labels, write_pages

pytestmark = pytest.mark.browser

SLASHED = "a/b 100%?#"
GROUPS = ["plain", IMAGE, SLASHED, "few"]
"""The last one is undecided."""
CHOSEN = {"plain": [75, 3], IMAGE: [140], SLASHED: []}
RELATIONS = {"capital": [["France", " Paris"], ["Italy", " Rome"]], "successor": [["one", "two"]]}
LABELS = {
    "1.mlp.post[5]": {"label": f"animals {IMAGE}", "note": "fires on <dog>"},
    "2.attn.z[1]": {"label": "a head of mine", "note": ""},
}
MAIN = "document.querySelector('main').textContent"
LINKS = "[...document.querySelectorAll('main a')].map((a) => a.getAttribute('href'))"


def of_neurons(neurons: pa.Table) -> pa.Table:
    """The neurons with a value a group, and the groups that each is chosen for."""
    g = np.random.default_rng(3)
    rows = len(neurons)
    lists: dict[str, np.ndarray] = {name: g.random((rows, len(GROUPS))) for name in (
        "group_firing", "group_firing_elsewhere", "group_effect", "group_effect_elsewhere", "group_ap")}  # fmt: skip
    lists["group_selected"] = np.zeros((rows, len(GROUPS)))
    for name, own in CHOSEN.items():
        lists["group_selected"][own, GROUPS.index(name)] = 1
    neurons = neurons.append_column("lape", pa.array(np.linspace(1.5, 0.5, rows)))
    named = {row: name for name, own in CHOSEN.items() for row in own}
    neurons = neurons.append_column("of_group", pa.array([named.get(row) for row in range(rows)], pa.string()))
    around: list[list[list[float | None]]] = [[[None] * 4 + [1.0, 0.5, 0.25] + [None] * 2] * 2] * rows
    neurons = neurons.append_column("example_around", pa.array(around, pa.list_(pa.list_(pa.float64()))))
    for name, values in lists.items():
        held = [[None if i == len(GROUPS) - 1 else float(x) for i, x in enumerate(row)] for row in values]
        neurons = neurons.append_column(name, pa.array(held, pa.list_(pa.float64())))
    return neurons


def of_groups() -> dict[str, pa.Table]:
    loss = [3.25, 4.5, 5.0, None]
    groups = pa.table({
        "group_name": GROUPS, "documents": [3, 2, 1, 1], "tokens": [300, 200, 100, 4], "loss": loss,
        "loss_lo": [3.0, 4.0, 4.5, None], "loss_hi": [3.5, 5.0, 5.5, None], "group_ap_chance": [0.5, 0.25, 0.25, None],
        "neurons": [2, 1, 0, None],
    })  # fmt: skip
    layers = pa.table({
        "group_name": np.repeat(np.array(GROUPS), LAYERS), "layer": np.tile(np.arange(LAYERS), len(GROUPS)),
        "attn_share": pa.array([*np.linspace(0.5, 0.9, 3 * LAYERS), *[None] * LAYERS], pa.float64()),
    })  # fmt: skip
    pairs = [(of, group) for of in GROUPS[:2] for group in GROUPS[:3]]
    value = np.array([0.75, 0.01, -0.02, 0.03, 0.5, 0.25])
    columns: dict[str, Any] = {"neurons_of": [p[0] for p in pairs], "group_name": [p[1] for p in pairs]}
    columns |= {"neurons": [2, 2, 2, 1, 1, 1], "damage": value, "damage_random": value / 5}
    columns |= {"damage_lo": value - 0.1, "damage_hi": value + 0.1, "damage_diff": value * 0.8}
    return {"groups": groups, "group_layers": layers, "damage": pa.table(columns)}


@pytest.fixture(scope="module")
def page(fake: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = np.random.default_rng(1)
    tables = dict(fake["tables"])
    for column in ("maps_capital", "maps_capital_shuffled", "successor", "successor_shuffled"):
        tables["heads"] = tables["heads"].append_column(column, pa.array(g.permutation(LAYERS * HEADS) / 16))
    tables |= {"neurons": of_neurons(tables["neurons"]), **of_groups()}
    told = {
        name: {"columns": {c: {"unit": "unit", "meaning": f"meaning of {c}"} for c in table.column_names}}
        for name, table in tables.items()
    }
    manifest = fake["manifest"] | {"relations": RELATIONS, "tables": told}
    manifest |= {"text": manifest["text"] | {"groups": GROUPS, "examples": [4, 4]}}
    folder = tmp_path_factory.mktemp("grouped")
    given: dict[str, Any] = fake | {"manifest": manifest, "tables": tables}
    found = write_pages(folder, **given)
    write_labels(folder, LABELS)
    return found


@pytest.fixture(scope="module")
def tab(browser: str) -> Iterator[Tab]:
    found = Tab(browser)
    yield found
    found.close()


def show(tab: Tab, page: Path, route: str = "") -> None:
    """Open a page anew: of a mere change of the route the tab would not say when it was drawn."""
    tab.call("Page.navigate", url="about:blank")
    tab.open(page, route)


def page_heads(page: Path) -> dict[str, list[float]]:
    """The columns of the heads that the pages hold."""
    raw = (page.parent / "assets/data/model.js").read_text()
    held, _ = json.JSONDecoder().raw_decode(raw, raw.index('"heads":{"rows"') + len('"heads":'))
    return held["columns"]


def path_of(tab: Tab, kind: str, name: str) -> str:
    return "#" + tab.eval(f"atlas.paths.{kind}({name!r})")


def test_the_overview_shows_groups_the_matrix_relations_and_labels(tab: Tab, page: Path) -> None:
    show(tab, page)
    words = tab.eval(MAIN)
    assert "plain33003.25 [3.00, 3.50]" in words
    assert "Relations that heads compute" in words
    assert f"neuron 1.5animals {IMAGE}fires on <dog>" in words
    texts = "[...c.querySelectorAll('text')].map((t) => t.textContent)"
    cells = f"[...document.querySelectorAll('.matrix-cell')].map((c) => {texts})"
    assert tab.eval(cells) == [
        ["0.750", "0.150"], ["0.0100", "0.0020"], ["−0.0200", "−0.0040"],
        ["0.0300", "0.0060"], ["0.500", "0.100"], ["0.250", "0.0500"],
    ]  # fmt: skip
    framed = "[...document.querySelectorAll('.matrix-cell')].map((c) => Boolean(c.querySelector('.own')))"
    assert tab.eval(framed) == [True, False, False, False, True, False], "a group without its own neurons"
    told = "(r) => [r.getAttribute('class'), +r.getAttribute('fill-opacity')]"
    colours = f"[...document.querySelectorAll('.matrix-cell rect:first-child')].map({told})"
    shades = tab.eval(colours)
    assert [kind for kind, _ in shades] == ["hot", "hot", "cold", "hot", "hot", "hot"]
    assert np.argsort([-strength for _, strength in shades]).tolist()[:3] == [0, 4, 5], "one scale for all cells"
    rooms = tab.eval("[...document.querySelectorAll('header nav a')].map((a) => a.textContent)")
    assert rooms == ["Overview", "Layers", "Heads", "Neurons", "Groups", "Relations"]


@pytest.mark.parametrize("name", GROUPS[:3])
def test_each_group_has_a_page_with_its_neurons_first_those_chosen_for_it(tab: Tab, page: Path, name: str) -> None:
    show(tab, page, path_of(tab, "group", name))
    assert tab.eval("document.querySelector('h1').textContent") == f"Group {name}"
    words = tab.eval(MAIN)
    assert "Across the layers" in words
    addresses = tab.eval("[...document.querySelectorAll('.list tbody th a')].map((a) => a.textContent)")
    own = sorted(CHOSEN[name], reverse=True)  # lape falls with the number of the row
    assert addresses[: len(own)] == [f"{row // NEURONS}.{row % NEURONS}" for row in own]
    assert f"{len(own)} neuron{'' if len(own) == 1 else 's'} chosen for it" in words
    hrefs = tab.eval(LINKS)
    assert all(path_of(tab, "group", other) in hrefs for other in GROUPS)


def test_damage_stands_by_row_and_by_column_on_the_page_of_a_group(tab: Tab, page: Path) -> None:
    show(tab, page, path_of(tab, "group", "plain"))
    tables = tab.eval("[...document.querySelectorAll('.halves table')].map((t) => [...t.rows].map((r) => r.innerText))")
    assert [len(table) for table in tables] == [4, 3]
    assert re.match(r"plain\s+0\.750 \[0\.650, 0\.850\]\s+0\.150\s+0\.600", tables[0][1]), tables[0][1]
    assert re.match(rf"{re.escape(IMAGE)}\s+0\.0300", tables[1][2]), tables[1][2]


def test_an_undecided_group_says_so_and_has_no_numbers(tab: Tab, page: Path) -> None:
    show(tab, page, "#/group/few")
    words = tab.eval(MAIN)
    assert "Undecided: 4 tokens of this group were read" in words
    assert tab.eval("document.querySelectorAll('.list').length") == 0
    assert re.search(r"few\s*1\s*4\s*–\s*–", words)


def test_each_relation_has_a_page_with_its_pairs_and_its_heads(tab: Tab, page: Path, fake: dict[str, Any]) -> None:
    show(tab, page, "#/relation/capital")
    words = tab.eval(MAIN)
    assert "France → ·Paris" in words
    assert "2 pairs of words" in words
    head = tab.eval("[...document.querySelectorAll('.list tbody th a')].map((a) => a.textContent)")
    values = tab.eval(
        "[...document.querySelectorAll('.list tbody tr')].map((r) => +r.querySelector('td.float').textContent)"
    )
    assert len(head) == LAYERS * HEADS
    row = "[...document.querySelector('.list tbody tr').querySelectorAll('td.float')].map((c) => +c.textContent)"
    heads = page_heads(page)
    best = heads["maps_capital"].index(max(heads["maps_capital"]))
    expected = [heads["maps_capital"][best], heads["maps_capital_shuffled"][best]]
    assert tab.eval(row) == pytest.approx(expected, abs=0.006)
    assert values == sorted(values, reverse=True)
    show(tab, page, f"#/head/{head[0]}")
    assert "#/relation/capital" in tab.eval(LINKS)
    assert "Relations, by its weights" in tab.eval(MAIN)
    show(tab, page, "#/relations")
    assert {"#/relation/capital", "#/relation/successor", f"#/head/{head[0]}"} <= {*tab.eval(LINKS)}


def test_a_neuron_links_to_the_groups_that_it_is_chosen_for(tab: Tab, page: Path) -> None:
    show(tab, page, "#/neuron/1.5")
    row = "[...document.querySelectorAll('table.groups tr.here')].map((r) => r.textContent)"
    (told,) = tab.eval(row)
    assert told.startswith("plain")
    assert told.endswith("chosen for it")
    assert "#/group/plain" in tab.eval(LINKS)
    assert "group firing" not in tab.eval(MAIN), "lists of groups are not shown as bare numbers too"


def test_an_example_of_a_row_that_is_shorter_than_the_others_ends_where_the_row_does(
    tab: Tab, page: Path, fake: dict[str, Any]
) -> None:
    index, tokens = fake["tables"]["neurons"]["example_index"].to_pylist(), fake["tokens"]
    fits = lambda place: 4 <= place % LENGTH < LENGTH - 4 and tokens[place].strip()  # noqa: E731
    neuron = next(row for row in range(NEURONS) if fits(index[row][0]))
    place = index[neuron][0]
    show(tab, page, f"#/neuron/0.{neuron}")
    shown = tab.eval(f"{json.dumps(tokens[place : place + 3])}.map(atlas.inText).join('')")
    assert tab.eval("document.querySelector('.examples .context').textContent") == f"… {shown}"


@pytest.mark.parametrize(("unit", "site"), [("neuron/1.5", "1.mlp.post[5]"), ("head/2.1", "2.attn.z[1]")])
def test_a_label_stands_on_the_page_of_its_unit_as_text(tab: Tab, page: Path, unit: str, site: str) -> None:
    show(tab, page, f"#/{unit}")
    told = tab.eval("document.querySelector('.your-label').textContent")
    assert told == f"Your label {LABELS[site]['label']} {LABELS[site]['note']}".rstrip()
    assert tab.eval("document.querySelectorAll('main img').length") == 0
    assert tab.eval("document.title") != "broken"
    show(tab, page, "#/neuron/1.6")
    assert tab.eval("document.querySelector('.your-label')") is None


@pytest.mark.parametrize(
    ("route", "found", "link"),
    [
        ("#/neurons?q=animals", ["1.5"], "#/neuron/1.5"),
        ("#/neurons?q=plain", ["0.3", "1.5"], "#/group/plain"),
        ("#/heads?q=mine", ["2.1"], "#/head/2.1"),
        ("#/layers?q=capital", None, "#/relation/capital"),
        ("#/heads?q=successor", None, "#/relation/successor"),
    ],
)
def test_search_finds_labels_groups_and_relations(
    tab: Tab, page: Path, route: str, found: list[str] | None, link: str
) -> None:
    show(tab, page, route)
    assert link in tab.eval("[...document.querySelectorAll('.named a')].map((a) => a.getAttribute('href'))")
    assert tab.eval("document.querySelectorAll('.complaint').length") == 0
    if found is not None:
        assert sorted(tab.eval("[...document.querySelectorAll('.list tbody th a')].map((a) => a.textContent)")) == found


@pytest.mark.parametrize(
    ("route", "told"),
    [
        ("#/group/nosuch", 'has no group "nosuch": its groups are plain'),
        ("#/relation/nosuch", 'has no relation "nosuch": its relations are capital, successor'),
        ("#/group/%", "is no name"),
    ],
)
def test_what_is_not_there_is_said(tab: Tab, page: Path, route: str, told: str) -> None:
    show(tab, page, route)
    assert told in tab.eval("document.querySelector('main .complaint').textContent")


def test_an_atlas_without_labels_groups_or_relations_is_as_before(
    tab: Tab, fake: dict[str, Any], tmp_path: Path
) -> None:
    page = write_pages(tmp_path, **fake)
    (tmp_path / "assets/data/labels.js").unlink()  # of an earlier version
    show(tab, page)
    assert tab.eval("document.querySelectorAll('header nav a').length") == 4
    show(tab, page, "#/relations")
    assert "`microtome atlas --add head_functions` adds them" in tab.eval(MAIN)
    show(tab, page, "#/neuron/1.5")
    assert "In the groups of the text" not in tab.eval(MAIN)


def test_nothing_leaves_the_window_of_a_phone(tab: Tab, page: Path) -> None:
    tab.complaints.clear()
    tab.resize(360, 640)
    try:
        for route in (
            "",
            "#/groups",
            path_of(tab, "group", IMAGE),
            "#/relations",
            "#/relation/capital",
            "#/neuron/1.5",
            "#/head/2.1",
        ):
            show(tab, page, route)
            assert tab.eval("document.documentElement.scrollWidth") <= 360, route
    finally:
        tab.resize(1280, 800)
    assert tab.complaints == []


@pytest.mark.parametrize(
    "route", ["", "#/layer/1", "#/head/1.1", "#/neuron/1.5", "#/heads", "#/groups", "#/group/plain", "#/relations"]
)
def test_every_figure_and_every_table_can_be_saved(tab: Tab, page: Path, route: str) -> None:
    """A table has its button in its heading, beside it, or in the line above or below it."""
    tab.open(page, route)
    assert tab.eval("document.querySelectorAll('main figure, main table').length") > 0
    bare = tab.eval("[...document.querySelectorAll('main figure')].filter((f) => f.querySelector('svg') &&"
                    " ![...f.querySelectorAll('.save')].some((b) => b.textContent === 'SVG')).length")  # fmt: skip
    assert bare == 0
    tables = tab.eval(
        """[...document.querySelectorAll('main table:not(.labels)')].filter((t) => {
        const scope = t.closest('.list, section, main');
        return ![...scope.querySelectorAll('.save')].some((b) => b.textContent === 'CSV');
        }).map((t) => t.className)"""
    )
    assert tables == []
