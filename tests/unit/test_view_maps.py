"""Heat maps: what is in them, in a terminal of any width and in the text of a page."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console
from tests import effects

from microtome.errors import DataError, OutputError
from microtome.view import HeatMap, forms, terminal, write_page
from microtome.view._heat_cells import MOST_ROWS, NEGATIVE, NEUTRAL, POSITIVE
from microtome.view._heat_map import MOST_CELLS
from microtome.view._page import page_text, page_values
from microtome.view._text import short_number


def drawn(data: xr.Dataset, width: int, colours: bool = False, top: int = 3) -> str:
    stream = io.StringIO()
    system = "truecolor" if colours else None
    console = Console(file=stream, width=width, color_system=system, force_terminal=colours, highlight=False)
    console.print(terminal(data, width, top=top))
    return stream.getvalue()


def maps_of(data: xr.Dataset) -> list[HeatMap]:
    return forms(data).of(HeatMap)


def line(text: str, label: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(label))


# ---------------------------------------------------------------------------------------------------------------- maps


def test_maps_name_their_rows_columns_and_bounds() -> None:
    data = effects.fake()
    by_position, by_head = maps_of(data)
    assert (by_position.across, by_position.down, by_head.down) == ("layer", "pos", "head")
    assert by_position.columns == ("0", "1", "2", "3")
    assert by_head.low is None
    low, high = by_position.low, by_position.high
    assert low is not None
    assert high is not None
    np.testing.assert_allclose(high - low, np.where(np.isnan(low), np.nan, 0.25))
    np.testing.assert_array_equal(by_position.values, data["resid_pre"].values.T)
    assert np.isinf(data["attn.z[head]"].values[3, 2])
    assert np.isnan(by_head.values[2, 3]), "an infinite value is missing"


def test_strongest_has_both_signs_and_leaves_out_what_is_missing_or_zero() -> None:
    data = xr.Dataset({"x": (("layer", "pos"), [[0.0, np.nan, 2.0], [-3.0, 1.0, 0.0]])})
    assert maps_of(data)[0].strongest(9) == [(0, 1), (2, 0), (1, 1)]
    assert maps_of(data)[0].strongest(1) == [(0, 1)]


def test_maps_of_one_unit_share_a_scale_and_another_unit_has_its_own() -> None:
    data = effects.fake()
    data["score"] = (("layer", "pos"), np.full((4, 5), -40.0), {"unit": "logits"})
    assert forms(data).limits == {"share of the gap": pytest.approx(1.23456789), "logits": 40.0}
    nothing = xr.Dataset({"x": (("layer", "pos"), np.full((2, 2), np.nan))})
    assert forms(nothing).limits == {"x": 1.0}


def test_senders_stand_at_the_left_and_receivers_above() -> None:
    data = effects.edges()
    edges, layers = maps_of(data)
    assert edges.rows == ("embed", "0.attn.z[1]", "0.mlp_out")
    assert edges.columns == ("1.attn.q[0]", "1.mlp.in", "final")
    assert (layers.rows, layers.columns) == (("embed", "0"), ("1", "final"))
    np.testing.assert_array_equal(layers.values, [[-4.0, 0.5], [2.0, -3.0]])
    text = drawn(data, 100)
    assert "embed → 1.mlp.in" in text
    assert text.count("embed → 1.mlp.in") == 1, "a map that sums another up is not listed"
    assert "strongest score between two layers" in text
    assert [len(one["strongest"]) for one in told(page_text(data))["maps"]] == [6, 0]
    assert told(page_text(data))["maps"][0]["size"] == 6, "of 9 pairs: where there is no edge, there is no cell"


def test_a_dataset_with_nothing_to_draw_has_no_page() -> None:
    data = xr.Dataset({"x": (("a", "b"), [[1.0]])})
    with pytest.raises(DataError, match=re.escape("nothing to draw on a page; got x over (a, b); allowed: numbers")):
        page_text(data)
    assert "not drawn: x over (a, b)" in drawn(data, 80)


# ------------------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for data in (effects.fake(), at_least_float32(80)):
        plain = drawn(data, width)
        assert max(len(row) for row in plain.splitlines()) <= width
        assert "\x1b" not in plain
        assert "\u202e" not in plain


def at_least_float32(layers: int, rows: int = 6) -> xr.Dataset:
    values = np.zeros((layers, rows))
    values[layers - 1, rows - 1] = -1.0
    return xr.Dataset({"mlp_out": (("layer", "pos"), values, {"unit": "logits"})}, coords={"layer": range(layers)})


def test_wide_terminal_shows_the_values() -> None:
    text = drawn(effects.fake(), 200)
    values = effects.fake()["resid_pre"].values[:, 1]
    row = line(text, "1 ·Paris/·Rome").split()
    assert row[2] == "–", "what was not measured is not a zero"
    assert row[3] == "-1.2"
    assert float(row[4]) == pytest.approx(values[2], abs=0.006)
    assert "counts tenths" not in text


def test_narrow_terminal_shows_signed_tenths_of_the_scale() -> None:
    text = drawn(at_least_float32(30), 80)
    assert line(text, "pos 5").endswith("-9")
    assert line(text, "pos 4").strip() == "pos 4"
    assert "a digit alone counts tenths of the scale" in text
    assert "was not measured" not in text


def test_layers_that_do_not_fit_share_a_column_by_the_strongest() -> None:
    text = drawn(at_least_float32(100), 80)
    assert "a column holds the strongest of 3 layers" in text
    assert line(text, "pos 5").endswith("-9")


def test_weak_rows_of_a_long_prompt_are_left_out_and_counted() -> None:
    text = drawn(at_least_float32(4, rows=100), 80)
    assert "pos 99" in text
    assert f"{100 - MOST_ROWS} rows left out, in which nothing is beyond ±0" in text


def test_the_scale_is_symmetric_and_its_colours_run_through_neutral() -> None:
    text = drawn(effects.fake(), 80, colours=True)
    assert "-1.23" in text
    assert "+1.23 share of the gap" in text
    for r, g, b in (NEGATIVE, NEUTRAL, POSITIVE):
        assert f"48;2;{r};{g};{b}m" in text


def test_strongest_cells_are_listed_with_their_values_and_intervals() -> None:
    text = drawn(effects.fake(), 200)
    assert "L1 @1 ·Paris/·Rome -1.235 [-1.36, -1.11]" in re.sub(" +", " ", text)
    assert "L2H1 +0.877" in re.sub(" +", " ", text)
    assert "strongest" not in drawn(effects.fake(), 200, top=0)


def test_prompts_metric_and_reading_stand_above() -> None:
    text = drawn(effects.fake(), 80)
    assert "logit difference 3.250" in text
    assert "logit difference -2.500" in text
    assert "1 fully restores the clean one" in " ".join(text.split())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.934, ".93"), (-0.28, "-.28"), (1.018, "1.02"), (-1.018, "-1.0"), (0.9951, "1.00"), (-0.9951, "-1.0"),
     (12.34, "12.3"), (9.996, "10.0"), (-99.96, "-100"), (0.004, ""), (-0.004, ""), (0.0, "")],
)  # fmt: skip
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text
    assert len(text) <= 4


def test_a_traced_fact_shows_its_subject_and_both_probabilities() -> None:
    data = effects.traced()
    text = drawn(data, 120)
    assert [one.name for one in maps_of(data)] == ["resid", "mlp"], "samples are no maps"
    assert re.search(r"^clean +probability of the answer 0\.900$", text, flags=re.M)
    assert re.search(r"^corrupt +probability of the answer 0\.250$", text, flags=re.M)
    assert re.search(r"^answer +·Seattle$", text, flags=re.M)
    assert "By how much a state given back raises it." in text
    page = told(page_text(data))
    assert page["marked"] == [1, 2]
    assert [(p["role"], p["value"]) for p in page["prompts"]] == [("prompt", None), ("clean", 0.9), ("corrupt", 0.25)]


def test_estimates_stand_beside_what_was_measured_and_how_far_they_hold() -> None:
    data = effects.estimated()
    text = re.sub(" +", " ", drawn(data, 120))
    assert "attn.z[head] estimate exact" in text
    assert "L2H1 +0.877 +0.750" in text
    assert re.search(r"L\dH\d [+-]0\.\d+ –", text), "what was not measured is not a zero"
    assert "rank correlation measured" in text
    assert "attn.z[head] 0.875 2" in text
    assert "An estimate, from one gradient." in text
    page = told(page_text(data))
    assert page["maps"][0]["strongest"][0] == [1, 2, 0.87654, None, None, 0.75]
    assert page["maps"][0]["beside"]["exact"][0] == [-0.0625, None, None, None]
    (table,) = page["sections"]
    assert (table["heads"], table["rows"]) == (
        ["site", "rank correlation", "measured"],
        [["attn.z[head]", [0.875], [2.0]]],
    )
    assert not {"clean ids", "sites"} & {name for name, _ in page["facts"]}
    unchecked = effects.estimated().drop_vars(["rank_correlation", "measured", "site", "attn.z[head]_exact"])
    assert "exact" not in drawn(unchecked, 120)
    assert told(page_text(unchecked))["sections"] == []


# ---------------------------------------------------------------------------------------------------------------- page


def told(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    assert found is not None
    return json.loads(found[1])


def test_values_of_the_page_are_those_of_the_dataset_to_four_digits() -> None:
    data = effects.fake()
    maps = {one["name"]: one for one in told(page_text(data))["maps"]}
    for name, key, variable in (
        ("resid_pre", "values", "resid_pre"), ("resid_pre", "lo", "resid_pre_lo"), ("resid_pre", "hi", "resid_pre_hi"),
        ("attn.z[head]", "values", "attn.z[head]"),
    ):  # fmt: skip
        held, true = maps[name][key], data[variable].values.T
        for row, column in np.ndindex(true.shape):
            if np.isfinite(true[row, column]):
                assert held[row][column] == pytest.approx(true[row, column], rel=5e-5)
            else:
                assert held[row][column] is None, "missing is null, never zero"
    assert maps["attn.z[head]"]["lo"] is None
    assert maps["resid_pre"]["strongest"][0] == [1, 1, -1.2346, -1.3596, -1.1096]
    assert len(maps["resid_pre"]["strongest"]) == 15


def test_scale_of_the_page_is_the_largest_value_of_either_sign() -> None:
    held = told(page_text(effects.fake()))
    assert held["limits"] == {"share of the gap": {"most": 1.2346, "signed": True}}
    positive = effects.fake().assign({"attn.z[head]": abs(effects.fake()["attn.z[head]"])})[["attn.z[head]"]]
    assert told(page_text(positive))["limits"] == {"share of the gap": {"most": 0.87654, "signed": False}}
    assert [one["limit"] for one in held["maps"]] == [1.2346, 1.2346]
    assert [one["own"] for one in held["maps"]] == [1.2346, 0.87654]


def test_sites_of_the_page_are_addresses() -> None:
    data = effects.fake()
    data["resid"] = data["resid_pre"]
    sites = {one["name"]: one["site"] for one in page_values(data)["maps"]}
    assert sites == {"resid_pre": "{column}.resid_pre@{row}", "attn.z[head]": "{column}.attn.z[{row}]", "resid": None}


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    page = page_text(effects.fake())
    head, body = page.split("<body>")
    assert "<title>Activation patching: &lt;b&gt;Paris rather than Rome</title>" in head
    data = re.search(r'id="data">(.*?)</script>', body, flags=re.S)
    assert data is not None
    assert data[1].isascii()
    assert "<" not in data[1]
    assert body.count("<script") == body.count("</script>") == 2
    assert effects.SCRIPT in told(page)["prompts"][0]["tokens"]
    named = page_text(effects.fake(), title=effects.SCRIPT)
    assert f"<title>{html.escape(effects.SCRIPT)}</title>" in named


def test_the_page_is_one_file_that_may_load_nothing(tmp_path: Path) -> None:
    page = page_text(effects.fake())
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in page
    assert "unsafe" not in page
    assert set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bfetch\(|@import|XMLHttpRequest|WebSocket|<link rel=\"style|<script src", page)
    write_page(tmp_path / "a.html", effects.fake())
    write_page(tmp_path / "a.html", effects.fake())
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page


def test_a_large_map_is_listed_and_not_drawn() -> None:
    values = np.random.default_rng(1).normal(size=(250, 250))
    page = page_text(xr.Dataset({"score": (("sender", "receiver"), values)}))
    one = told(page)["maps"][0]
    assert values.size > MOST_CELLS
    assert one["values"] is None
    assert len(one["strongest"]) == 100
    assert len(page) < 120_000


def test_provenance_stands_in_the_page() -> None:
    facts = dict(told(page_text(effects.fake()))["facts"])
    assert facts["fingerprint"] == "ab" * 8
    assert facts["seed"] == "7"
    assert facts["foil"] == '" Rome"'


def test_a_page_that_cannot_be_written_is_said_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.html"
    place.write_text("kept")

    def full(self: Path, text: str, **kwargs: object) -> None:
        self.write_bytes(text[:99].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"cannot write .*a\.html; got .*No space left.* To do: check the folder"):
        write_page(place, effects.fake())
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    assert place.read_text() == "kept"
