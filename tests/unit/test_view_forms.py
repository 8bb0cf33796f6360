"""Every form in the three places where it is seen: which axes call for it, and what terminal, figure and page hold."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console
from tests import effects

from microtome import view
from microtome.view import (
    EdgeGraph,
    HeatMap,
    LabelTable,
    NeuronMap,
    PartsList,
    Series,
    TokenMap,
    forms,
    html,
    terminal,
    write_page,
)
from microtome.view._page import page_text, page_values
from microtome.view._render import MOST_BYTES

Maker = Callable[[], xr.Dataset]
TAGS = {"div", "b", "code", "span", "table", "tr", "td", "th", "svg", "rect", "path", "g", "text", "title", "circle"}


def shown(data: xr.Dataset, width: int = 110, top: int = 5) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, highlight=False).print(terminal(data, width, top=top))
    return re.sub(" +", " ", stream.getvalue())


def one(values: np.ndarray, *dims: str) -> xr.Dataset:
    return xr.Dataset({"x": (dims, values)})


class Markup(HTMLParser):
    """The tags and texts of a fragment; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words = ""
        self.titles: list[str] = []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        else:
            self.words += data + " "


# --------------------------------------------------------------------------------------------------------- which form


@pytest.mark.parametrize(
    ("dims", "kind"),
    [
        (("layer", "pos"), "map"),
        (("layer", "head"), "map"),
        (("layer", "kv_head"), "map"),
        (("layer", "span"), "map"),
        (("layer", "component"), "map"),
        (("group", "other_group"), "map"),
        (("group", "group_2"), "map"),
        (("sender", "receiver"), "map"),
        (("component", "receiver"), "map"),
        (("q_pos", "k_pos"), "map"),
        (("layer", "neuron"), "neurons"),
        (("neuron", "layer"), "neurons"),
        (("layer",), "series"),
        (("pos",), "series"),
        (("head",), "series"),
        (("group",), "table"),
        (("site",), "table"),
        (("component",), "table"),
        ((), "facts"),
    ],
)
def test_axes_call_for_a_form(dims: tuple[str, ...], kind: str) -> None:
    found = forms(one(np.ones([3] * len(dims)), *dims))
    assert found.shown[0].kind == kind
    assert found.not_drawn == ()


@pytest.mark.parametrize("dims", [("colour",), ("layer", "colour"), ("layer", "pos", "d_model"), ("example", "layer")])
def test_unknown_axes_are_listed_and_no_error(dims: tuple[str, ...]) -> None:
    data = one(np.ones([2] * len(dims)), *dims)
    assert forms(data).not_drawn == (f"x over ({', '.join(dims)})",)
    assert f"not drawn: x over ({', '.join(dims)})" in shown(data)
    assert "xarray" in html(data), "what xarray shows"


def test_the_view_knows_no_method() -> None:
    """No sentence of the room compares a method's name."""
    for path in Path(view.__file__).parent.rglob("*"):
        if path.suffix in (".py", ".js"):
            names = r"causal tracing|activation patching|logit lens|knock-out|attribution"
            assert not re.search(names, path.read_text(encoding="utf-8"), flags=re.IGNORECASE), path.name
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    assert '["method"]' not in ast.unparse(node)


def test_a_batch_of_one_is_dropped_and_of_two_is_listed() -> None:
    data = effects.over_layers()
    assert "batch" in data.dims
    assert [form.kind for form in forms(data).shown] == ["series", "series", "facts"]
    two = xr.concat([data, data], "batch")
    assert "change over (batch, layer)" in forms(two).not_drawn


def test_what_belongs_to_a_variable_is_no_form_of_its_own() -> None:
    assert [form.names for form in forms(effects.over_layers()).shown] == [("change",), ("gain",), ("loss", "rows")]
    assert [form.names for form in forms(effects.words()).shown] == [("word",), ("entropy",)]
    assert forms(effects.words()).not_drawn == ("ids over (layer, pos, rank)",)


def kept_by_group(dims: tuple[str, ...], groups: int) -> xr.Dataset:
    """Values with their interval and control, another number in every group, and groups whose names are markup."""
    size = (groups, *(3 for _ in dims))
    values = np.arange(np.prod(size), dtype=np.float64).reshape(size) + 1
    axes = ("group", *dims)
    told = {"title": "Firing", "unit": "share", "control": "even", "meaning": "how often"}
    data = xr.Dataset({"rate": (axes, values, told), "even": (axes, values / 4)})
    data["rate_lo"], data["rate_hi"] = data["rate"] - 0.5, data["rate"] + 0.5
    return data.assign_coords(group=[f"<b>{i}" for i in range(groups)])


@pytest.mark.parametrize(("axis", "kind"), [("neuron", NeuronMap), ("head", HeatMap)])
def test_what_is_kept_by_group_has_a_form_a_group(axis: str, kind: type, tmp_path: Path) -> None:
    data = kept_by_group(("layer", axis), 2)
    found = forms(data)
    assert found.not_drawn == ()
    assert [form.title for form in found.of(kind)] == ["Firing, <b>0", "Firing, <b>1"]
    assert [form.names for form in found.shown] == [("rate, <b>0",), ("rate, <b>1",)]
    for i, form in enumerate(found.shown):
        assert isinstance(form, kind)
        plain = forms(data.isel(group=i, drop=True)).of(kind)[0]
        for held in ("values", "low", "high"):
            np.testing.assert_array_equal(getattr(form, held), getattr(plain, held))
        np.testing.assert_array_equal(form.beside["control"], plain.beside["control"])
        assert float(np.max(form.values)) == float(data["rate"][i].max())
    text = shown(data)
    page = page_values(data)
    told = [part["title"] for part in page["maps" if kind is HeatMap else "sections"]]
    for title in ("Firing, <b>0", "Firing, <b>1"):
        assert title in text
        assert title in Markup(html(data)).words
        assert title in told
    assert "not drawn" not in text
    assert write_page(tmp_path / "a.html", data).exists()


@pytest.mark.parametrize(("groups", "more"), [(6, None), (7, "1 more group"), (9, "3 more groups")])
def test_of_many_groups_the_first_six_are_drawn_and_the_rest_counted(groups: int, more: str | None) -> None:
    data = kept_by_group(("layer", "head"), groups)
    assert [form.title for form in forms(data).shown] == [f"Firing, <b>{i}" for i in range(6)]
    left = () if more is None else (f"rate of {more}",)
    assert forms(data).not_drawn == page_values(data)["not_drawn"] == left
    for text in (shown(data), html(data)):
        assert ("not drawn" in text) == (more is not None)
        assert more is None or f"not drawn: rate of {more}" in text


def test_groups_by_layer_are_one_map_and_groups_alone_a_table() -> None:
    (by_layer,) = forms(kept_by_group(("layer",), 9)).shown
    assert isinstance(by_layer, HeatMap)
    assert (by_layer.down, by_layer.across, by_layer.values.shape) == ("group", "layer", (9, 3))
    assert by_layer.rows == tuple(f"<b>{i}" for i in range(9))
    data = kept_by_group((), 9)
    (table,) = forms(data).shown
    assert isinstance(table, LabelTable)
    assert [column.name for column in table.columns] == ["rate", "rate, control"]
    for text in (shown(data), Markup(html(data)).words, str(page_values(data))):
        assert "<b>8" in text
    colours = xr.Dataset({"x": (("group", "layer", "colour"), np.ones((2, 2, 2)))})
    assert forms(colours).not_drawn == ("x over (group, layer, colour)",)


# ------------------------------------------------------------------------------------------------------------ each form


def test_a_line_shows_its_interval_and_control() -> None:
    data = effects.over_layers()
    text = shown(data)
    assert "change of the loss change nats" in text
    assert re.search(r"1 -1\.500 \[-1\.62, -1\.38\] █{16} \+0\.062", text)
    assert re.search(r"2 – \+0\.000", text), "what was not measured has no bar"
    assert "rows 12,000 tokens" in text
    (line,) = [x for x in page_values(data)["sections"] if x.get("name") == "change"]
    assert line["values"] == [0.25, -1.5, None, 0.75]
    assert line["lo"] == [0.125, -1.625, None, 0.625]
    assert line["beside"] == {"control": [0.0, 0.0625, 0.0, -0.03125]}
    assert (line["axis"], line["places"]) == ("layer", ["0", "1", "2", "3"])
    found = Markup(html(data))
    assert "1: -1.500 [-1.62, -1.38], control 0.062" in found.titles
    assert "dashed: control" in found.words


def test_intervals_that_are_missing_say_why() -> None:
    data = effects.over_layers().assign_attrs(interval="95 % of a kind; none below 8 examples")
    why = "too few examples for intervals: none below 8 examples"
    assert why not in shown(data)
    assert why not in html(data)
    bare = data.assign({f"change_{end}": data[f"change_{end}"] * np.nan for end in ("lo", "hi")})
    assert why in shown(bare)
    assert why in html(bare)
    assert why not in shown(bare.assign(change=bare["change"] * np.nan)), "nothing was measured"


def test_neurons_show_the_strongest_and_the_distribution_of_each_layer() -> None:
    data = effects.over_neurons()
    (form,) = forms(data).of(NeuronMap)
    edges, counts = form.distribution()
    values = data["selectivity"].values
    assert counts.sum(1).tolist() == np.isfinite(values).sum(1).tolist()
    assert (edges[0], edges[-1]) == (-1.25, 2.5)
    assert form.strongest(2) == [(3, 17), (0, 4)]
    text = shown(data)
    assert re.search(r"L3N17 \+2\.500 \+0\.312", text)
    least, median, most = form.quantiles()[3]
    assert f"3 {least:.3f} {median:.3f} {most:.3f}" in text
    (section,) = page_values(data)["sections"]
    assert section["strongest"][0] == ["3", "17", 2.5, None, None, 0.3125]
    assert section["beside"] == ["control"]
    assert np.asarray(section["counts"]).tolist() == counts.tolist()
    data = data.assign({f"selectivity_{end}": data["selectivity"] + x for end, x in (("lo", -0.25), ("hi", 0.5))})
    turned = forms(data.transpose("neuron", "layer")).of(NeuronMap)[0]
    np.testing.assert_array_equal(turned.values, form.values)
    np.testing.assert_array_equal(turned.low, form.values - 0.25)
    np.testing.assert_array_equal(turned.high, form.values + 0.5)
    np.testing.assert_array_equal(turned.beside["control"], form.beside["control"])
    assert f"layer 3: {counts[3, -1]:,} neurons from" in " ".join(Markup(html(data)).titles)


def test_a_matrix_reads_from_its_rows_to_its_columns() -> None:
    data = effects.over_groups()
    data["similarity"][0, 2] = -0.9
    (matrix,) = forms(data).of(HeatMap)
    assert (matrix.down, matrix.across) == ("group", "other_group")
    assert matrix.values[0, 2] == -0.9
    text = shown(data, top=1)
    assert "group code, other_group news -0.900" in text
    assert re.search(r"code \.75 -\.25 -\.90", text)
    assert re.search(r"code +3 +0\.500", text)
    (table,) = forms(data).of(LabelTable)
    assert [column.name for column in table.columns] == ["count", "mean"]
    assert page_values(data)["sections"][0]["rows"][2] == ["news", [5.0], [None]]
    assert page_values(data)["not_drawn"] == ("spread over (group, colour)",)


def test_tokens_are_coloured_by_their_shade_and_hold_a_line_a_rank() -> None:
    data = effects.words()
    (form,) = forms(data).of(TokenMap)
    assert form.layers == ("embed", "0", "1")
    np.testing.assert_array_equal(form.values, data["probability"].values)
    text = shown(data)
    lines = [row.strip() for row in text.splitlines()]
    (at,) = [i for i, row in enumerate(lines) if row.startswith("1 ·w")]
    assert lines[at].startswith("1 ·w200 .69")
    assert lines[at].endswith("·<i>Paris .97")
    assert lines[at + 1].endswith("↵ 1.0")
    assert lines.index(next(row for row in lines if row.startswith("embed ·w000"))) > at, "the last layer stands first"
    section = page_values(data)["sections"][0]
    assert section["layers"] == ["1", "0", "embed"]
    assert section["cells"][0][4] == [[" <i>Paris", 0.96552, 0.96552], ["\n", 1.0, 1.0]]
    assert "·<i>Paris 0.966, ↵ 1" in html_titles(data)
    assert forms(data.isel(layer=[1, 2])).of(TokenMap)[0].layers == ("0", "1")
    turned = forms(data.transpose("pos", "rank", "layer")).of(TokenMap)[0]
    assert (turned.words == form.words).all()
    narrow = shown(data[["word", "probability"]], width=30)
    assert "earlier positions left out" in narrow
    assert "@4" in narrow
    assert "@0" not in narrow


def test_tokens_of_heads_stand_under_their_numbers() -> None:
    data = effects.words().isel(pos=slice(0, 3)).rename(pos="head").drop_vars("token").assign_coords(head=[0, 1, 2])
    data = data.assign_coords(prompt=("pos", ["a", "b"]))  # an axis that the tokens do not have
    (form,) = forms(data).of(TokenMap)
    assert (form.across, form.places) == ("head", ("0", "1", "2"))
    assert "head 0" in shown(data)
    assert "@" not in shown(data)
    assert page_values(data)["sections"][0]["across"] == "head"


def html_titles(data: xr.Dataset) -> str:
    return " | ".join(re.findall(r'title="([^"]*)"', html(data))).replace("&lt;", "<").replace("&gt;", ">")


def test_a_shade_takes_its_range_from_its_variable() -> None:
    data = effects.words()
    data["probability"].attrs["range"] = [0.5, 1.0]
    (form,) = forms(data).of(TokenMap)
    assert form.shades is not None
    np.testing.assert_allclose(form.shades, np.clip(2 * data["probability"].values - 1, 0, 1))
    data["probability"].attrs["range"] = [0.0, np.inf]  # open: to the largest value, or to 1
    np.testing.assert_allclose(forms(data).of(TokenMap)[0].shades, data["probability"].values)


def test_parts_are_listed_largest_first_with_their_sum() -> None:
    data = effects.parts()
    (form,) = forms(data).of(PartsList)
    named = {part.name: part.value for part in form.parts}
    assert named == {"L0H0": 3.0, "L0 MLP": -2.0, "L1H1": 1.0, "L0H1": -0.5, "embedding": 0.25, "L1 MLP": 0.125}
    assert [part.name for part in form.parts] == list(named), "largest first, and what adds nothing is left out"
    assert form.total == form.whole == 1.875
    assert form.parts[0].reads == ((" France", 2.25), ("<i>", 0.75), (" is", 0.0))
    text = shown(data, top=2)
    assert re.search(r"L0H0 \+3\.000 █{24} ·France \+2\.25, <i> \+0\.75", text)
    assert "4 more +0.875" in text
    assert "sum +1.875" in text
    assert "logit as measured +1.875" in text
    assert "answer ·Paris" in text
    assert text.count("L0 MLP") == 1, "the parts are not drawn again"
    page = page_values(data)
    first, second = page["sections"][0]["parts"][:2]
    assert first == ["L0H0", 3.0, "·France +2.25, <i> +0.75, ·is +0.00"]
    assert second == ["L0 MLP", -2.0, ""]
    assert [one["name"] for one in page["maps"]] == ["attn"]
    assert page["title"] == "Attribution: Paris"


def test_a_circuit_is_a_graph_of_its_nodes() -> None:
    data = effects.circuit()
    (form,) = forms(data).of(EdgeGraph)
    assert [node[0] for node in form.nodes] == [
        "embed",
        "1.mlp_out",
        "0.attn.z[1]",
        "final",
        "0.mlp_out",
        "1.attn.z[0]",
    ]
    assert form.nodes[1][1:] == (1, 2), "behind the heads of its layer"
    named = [(form.nodes[u][0], form.nodes[v][0], slot, value, exact) for u, v, slot, value, exact in form.edges]
    assert named[0] == ("embed", "1.mlp_out", "in", -4.0, -3.5)
    assert named[1] == ("0.attn.z[1]", "final", "in", -3.0, 0.25)
    assert ("embed", "1.attn.z[0]", "q", 1.0, None) in named
    assert form.size == len(form.edges) == 6
    text = shown(data, top=2)
    assert re.search(r"embed → 1\.mlp_out\s+−4\S*\s+−3\.5", text.replace("-", "−"))
    assert "4 more edges" in text
    assert html(data).count("<circle") == 6
    assert page_values(data)["sections"][0]["kind"] == "graph"


def test_the_control_of_a_map_stands_beside_its_cells() -> None:
    data = effects.fake()
    data["attn.z[head]"].attrs["control"] = "random"
    data["random"] = ("layer", [0.5, 0.25, 0.125, 0.0625])
    data["attn.z[head]_p"] = (("layer", "head"), np.full((4, 3), 0.03125))
    by_head = forms(data).of(HeatMap)[1]
    assert by_head.name == "attn.z[head]"
    assert by_head.beside["control"][:, 2].tolist() == [0.125] * 3, "one number a layer stands for all its heads"
    assert "L2H1 +0.877 +0.125 +0.031" in shown(data)
    section = page_values(data)["maps"][1]
    assert section["strongest"][0] == [1, 2, 0.87654, None, None, 0.125, 0.03125]
    assert list(section["beside"]) == ["control", "p"]
    assert "L2H1: +0.877, control 0.125, p 0.031" in Markup(html(data)).titles
    assert [form.name for form in forms(data).of(Series)] == []


def test_maps_without_a_unit_share_no_scale() -> None:
    data = xr.Dataset({n: (("layer", "head"), np.full((2, 2), v)) for n, v in (("rank", 900.0), ("share", 0.5))})
    assert forms(data).limits == {"rank": 900.0, "share": 0.5}


# ------------------------------------------------------------------------------------------------- all of them together


@pytest.mark.parametrize("make", effects.EVERY, ids=lambda make: make.__name__)
def test_every_form_has_all_three(make: Maker, tmp_path: Path) -> None:
    data = make()
    text = shown(data, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "\u202e" not in text
    page = page_text(data)
    held = re.search(r'id="data">(.*?)</script>', page, flags=re.S)
    assert held is not None
    told = json.loads(held[1])
    assert len(told["maps"]) + len(told["sections"]) == len(forms(data).shown)
    assert write_page(tmp_path / "a.html", data).read_text(encoding="utf-8") == page
    assert len(html(data)) < MOST_BYTES


@pytest.mark.parametrize("make", effects.EVERY, ids=lambda make: make.__name__)
def test_a_fragment_runs_nothing_loads_nothing_and_takes_no_markup(make: Maker) -> None:
    text = html(make())
    found = Markup(text)
    assert found.tags <= TAGS, "nothing of a prompt or a name became a tag"
    assert not [name for name in found.attributes if name.startswith("on") or name in ("href", "src")]
    assert not re.search(r"url\(|@import|<script|<style", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_a_fragment_stays_small_whatever_it_holds() -> None:
    g = np.random.default_rng(0)
    big = {f"site_{i}": (("layer", "pos"), g.normal(size=(120, 300))) for i in range(12)}
    text = html(xr.Dataset(big))
    assert len(text) < 200_000
    assert "not drawn: site_" in text
    assert "each column holds the strongest of 2 layers" in text
    assert "260 weaker rows left out" in text


def test_a_fragment_falls_back_to_xarray_even_for_a_subclass() -> None:
    """A result whose `_repr_html_` is this function would else call itself for ever."""

    class Result(xr.Dataset):
        __slots__ = ()

        def _repr_html_(self) -> str:
            return html(self)

    assert "xarray" in Result({"loss": 1.0})._repr_html_()
    assert "heat map" in Result({"x": (("layer", "head"), np.ones((2, 2)))})._repr_html_()
