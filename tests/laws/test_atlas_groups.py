"""An atlas of a text in groups: its tables say of each group what a measurement of that group alone says."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from tests import families
from tests.cli.conftest import TEXT, tokenizer

import microtome as mt
from microtome.atlas import Atlas, measures_of
from microtome.atlas._groups import chosen_neurons, damage_table, kept_by_group, whole_lists, with_names
from microtome.atlas._relations import pairs_of, relations_table
from microtome.atlas._tables import joined_columns
from microtome.atlas._texts import reading_of
from microtome.edit import Zero
from microtome.errors import ArgumentError, MicrotomeWarning, OutputError
from microtome.measurements import token_loss
from microtome.method.runner import run_measures
from microtome.stream import Corpus, TokenBatches
from microtome.view import write_labels

OPTIONS: dict[str, Any] = {"length": 20, "rows": 4}
TOKENS = 960
WORDS = "sun sun barn barn red the old"
GROUPS = {
    "plain": [TEXT] * 20,
    "it's <b>": [" ".join(reversed(TEXT.split())), WORDS] * 20,
    "few": ["the cat sat on the mat"],
    "gone": ["cat"],
}
MEASURES = [
    "stream",
    "loss",
    "effective_rank",
    "massive",
    "firing",
    "top_examples",
    "group_neurons",
    "lens_groups",
    "damage",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> mt.Model:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer(folder)
    return mt.open(families.build("llama-gqa"), tokenizer=AutoTokenizer.from_pretrained(folder), prove=False)


@pytest.fixture(scope="module")
def folder(model: mt.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlas") / "atlas"
    with pytest.warns(MicrotomeWarning, match=r'^group "gone" has fewer than 2 tokens: nothing is known of it'):
        mt.atlas.write_atlas(model, folder, text=GROUPS, measures=MEASURES, tokens=TOKENS, share=0.1, **OPTIONS)
    return folder


@pytest.fixture
def atlas(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Atlas:
    monkeypatch.setenv("MICROTOME_DATA", str(tmp_path / "data"))
    return mt.atlas.open(folder)


def rows_of(model: mt.Model, name: str) -> TokenBatches:
    """The rows that the atlas read of a group."""
    return TokenBatches(Corpus.of(name, GROUPS[name]), model.tokenizer, tokens=TOKENS // len(GROUPS), **OPTIONS)


def test_each_group_has_what_a_measurement_of_it_alone_gives(atlas: Atlas, model: mt.Model) -> None:
    groups: Any = atlas.table("groups")
    layers: Any = atlas.table("group_layers")
    assert list(groups.index) == list(GROUPS)
    assert list(groups["tokens"]) == [240, 240, 6, 0]
    assert list(groups["documents"]) == [10, 15, 1, 0]
    assert atlas.manifest["text"]["documents"].startswith("joined within a group"), "as rows_of joins them"
    for name in ("plain", "it's <b>"):
        alone = mt.measure(model, "stream", "loss", "massive", text=rows_of(model, name))
        assert groups.loc[name, "loss"] == pytest.approx(float(alone["loss"]), rel=1e-6)
        assert groups.loc[name, "loss_lo"] == pytest.approx(float(alone["loss_lo"]), rel=1e-6)
        for column in ("resid_post_norm", "attn_cos_lo", "max_abs"):
            np.testing.assert_allclose(layers.loc[name][column], alone[column], rtol=1e-5)
    assert atlas.where("resid_post_norm > 0").index.names == ["layer"], "a condition is of units, where these have it"
    assert atlas.where("damage > -9").index.names == ["neurons_of", "group_name"]
    assert groups.loc["plain", "loss"] != groups.loc["it's <b>", "loss"]


def test_of_each_group_as_many_rows_are_read_as_where_groups_are_reported(model: mt.Model) -> None:
    rows = torch.cat([rows_of(model, name)[0].tokens for name in ("plain", "it's <b>")])
    text = {f"{k}": rows.roll(k, 0)[:5] for k in range(8)}  # 16 rows are read of a text: two of each of eight groups
    reported = mt.measure(model, "massive_tokens", text=text, groups=True)
    shares = mt.measure(model, "massive_tokens", text={name: some[:2] for name, some in text.items()}, groups=True)
    alone = mt.measure(model, "massive_tokens", "effective_rank", text=text)
    measured = run_measures(model, ["massive_tokens", "effective_rank"], text=text, by_group=["massive_tokens"])
    (found,) = measured.by_group.values()
    differs: list[str] = []
    for column in reported.data_vars:
        np.testing.assert_allclose(found[column], reported[column], rtol=1e-6, err_msg=str(column))
        differs += [] if np.allclose(shares[column], reported[column], equal_nan=True) else [str(column)]
    assert "massive_ratio" in differs, "so that it matters how many rows are read"
    for data in measured.datasets.values():  # and the whole is as if no groups were kept
        for column, values in data.data_vars.items():
            np.testing.assert_allclose(values, alone[column], rtol=1e-6, err_msg=str(column))


def test_what_is_of_the_whole_text_is_as_if_no_groups_were_kept(atlas: Atlas, model: mt.Model) -> None:
    text = {name: rows_of(model, name) for name in GROUPS if name != "gone"}
    whole = mt.measure(model, "stream", "loss", "effective_rank", "firing", text=text)
    assert atlas.manifest["loss"] == pytest.approx(float(whole["loss"]), rel=1e-9)
    layers = atlas.table("layers")
    for column in ("resid_post_norm", "resid_post_norm_hi", "effective_rank"):
        np.testing.assert_allclose(layers[column], whole[column], rtol=1e-5)
    np.testing.assert_allclose(atlas.table("neurons")["firing_rate"].unstack(), whole["firing_rate"], rtol=1e-6)
    words = [word for part in text.values() for word in model.to_words(part.flat)]
    assert list(atlas.words) == words
    for layer, neuron in ((0, 3), (2, 41)):  # a place of an example is a place in the joined text
        for example in atlas.neuron(layer, neuron).examples():
            assert example.words[example.peak] == words[example.token]


def test_a_group_of_too_few_tokens_is_undecided(atlas: Atlas) -> None:
    groups: Any = atlas.table("groups")
    layers: Any = atlas.table("group_layers")
    for name in ("few", "gone"):
        assert groups.loc[name].drop(["documents", "tokens"]).isna().all()
        assert layers.loc[name].isna().all().all()
        assert name not in {*atlas.sql("SELECT group_name FROM damage")["group_name"]}
    of: Any = atlas.sql("SELECT * FROM group_neurons WHERE group_name IN ('few', 'gone')")
    assert len(of) == 2 * 3 * families.D_MLP
    assert of[["firing", "effect", "ap", "selected"]].isna().all().all()
    assert groups.loc["plain"].notna().all()


def test_neurons_know_their_groups_in_sql_as_in_a_measurement(atlas: Atlas, model: mt.Model) -> None:
    known = {name: rows_of(model, name) for name in GROUPS if name != "gone"}
    found = mt.measure(model, "group_neurons", text=known, share=0.1)
    rows: Any = atlas.sql("SELECT * FROM group_neurons ORDER BY layer, neuron").set_index(
        ["group_name", "layer", "neuron"]
    )
    for name in ("plain", "it's <b>"):
        for column in ("firing", "firing_elsewhere", "effect", "ap", "selected"):
            expected = found[f"group_{column}"].sel(group=name).values.ravel()
            np.testing.assert_allclose(rows.loc[name][column].astype(float), expected, rtol=1e-5, err_msg=column)
        assert rows.loc[name]["selected"].sum() == atlas.table("groups").loc[name, "neurons"] > 0
    lape = found["lape"].values.ravel()
    np.testing.assert_allclose(atlas.table("neurons")["lape"].astype(float), lape, rtol=1e-5)
    for (layer, neuron), names in atlas.where("of_group IS NOT NULL")["of_group"].items():
        chosen = [n for n in ("plain", "it's <b>") if rows.loc[(n, layer, neuron)]["selected"] == 1]
        assert names == ", ".join(chosen)


def test_what_compares_groups_layer_by_layer_stands_by_group_and_layer(atlas: Atlas, model: mt.Model) -> None:
    found = mt.measure(model, "lens_groups", text={name: rows_of(model, name) for name in GROUPS if name != "gone"})
    groups: Any = atlas.table("groups")
    layers: Any = atlas.table("group_layers")
    for name in ("plain", "it's <b>"):
        np.testing.assert_allclose(layers.loc[name]["lens_share"], found["lens_share"].sel(group=name), rtol=1e-5)
        assert groups.loc[name, "text_share"] == pytest.approx(float(found["text_share"].sel(group=name)), rel=1e-5)
    assert layers.loc["it's <b>"]["lens_share"].notna().all()
    assert layers.loc["few"]["lens_share"].isna().all()


def test_damage_is_the_loss_without_the_neurons_of_a_group(atlas: Atlas, model: mt.Model) -> None:
    table = atlas.table("damage")
    sql = "SELECT layer, neuron FROM group_neurons WHERE selected = 1 AND group_name = '{}'"
    for of in ("plain", "it's <b>"):
        own: Any = atlas.sql(sql.format(of.replace("'", "''")))
        edits = [Zero(f"{int(i)}.mlp.post[{','.join(map(str, part['neuron']))}]") for i, part in own.groupby("layer")]
        for name in ("plain", "it's <b>"):
            every = list(rows_of(model, name))
            tokens = np.concatenate([batch.tokens.numpy() for batch in every])
            picked = tokens[np.linspace(0, len(tokens) - 1, 8).round().astype(int)].tolist()
            base, cut = (token_loss(model.run(picked, edits=e).logits, model.run(picked).tokens) for e in ([], edits))
            row = table.loc[(of, name)]
            assert row["damage"] == pytest.approx(float((cut - base).double().mean()), abs=1e-6)
            assert row["damage_diff"] == pytest.approx(row["damage"] - row["damage_random"], abs=1e-6)
            assert row["damage_lo"] <= row["damage"] <= row["damage_hi"]
            assert row["neurons"] == len(own)


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ({"a": [TEXT] * 9, "b": [TEXT] * 9}, {"least": 1000}, "no group of the text has 1000 tokens or more"),
        ({"a": [TEXT] * 9, "b": ["the cat sat on the mat"]}, {}, "no neuron was chosen for any group"),
    ],
)
def test_an_atlas_stands_though_there_is_no_damage_to_measure(
    model: mt.Model, tmp_path: Path, text: dict[str, list[str]], options: dict[str, Any], why: str
) -> None:
    place = tmp_path / "atlas"
    mt.atlas.write_atlas(model, place, text=text, measures=["loss", "damage"], tokens=240, **OPTIONS, **options)
    atlas = mt.atlas.open(place)
    assert len(atlas.table("damage")) == 0
    assert atlas.manifest["tables"]["damage"]["columns"]["damage_diff"]["unit"] == "nats"
    assert why in atlas.manifest["left_out"]["damage"]
    assert "damage" not in atlas.manifest["measures"]
    assert len(atlas.sql("SELECT * FROM damage")) == 0
    assert json.dumps(why)[1:-1] in (place / "assets" / "data" / "model.js").read_text(), "the pages say why"


def test_without_neurons_to_draw_controls_from_there_is_no_damage(model: mt.Model) -> None:
    reading = reading_of({"a": [TEXT] * 9, "b": GROUPS["it's <b>"]}, model.tokenizer, tokens=240, **OPTIONS)
    every: dict[str, Any] = {"layer": [0] * families.D_MLP, "neuron": [*range(families.D_MLP)]}
    table, why = damage_table(model, reading, pa.table(every | {"group_selected": [[1.0, 0.0]] * families.D_MLP}), 30)
    assert table.num_rows == 0
    assert why.startswith("layer 0 has too few neurons outside of the sets to draw controls from")


def test_what_is_said_of_the_damage_is_said_of_its_last_run(model: mt.Model, tmp_path: Path) -> None:
    place, text = tmp_path / "atlas", {"a": [TEXT] * 9, "b": GROUPS["it's <b>"]}
    mt.atlas.write_atlas(model, place, text=text, measures=["damage"], tokens=240, least=1000, **OPTIONS)
    mt.atlas.add_to_atlas(model, place, ["group_neurons", "damage"], text=text, share=0.1)
    manifest = mt.atlas.open(place).manifest
    assert "damage" in manifest["measures"]
    assert manifest["left_out"] == {}
    assert len(mt.atlas.open(place).table("damage")) > 0
    mt.atlas.add_to_atlas(model, place, ["group_neurons", "damage"], text=text, least=1000)
    manifest = mt.atlas.open(place).manifest
    assert "damage" not in manifest["measures"]
    assert list(manifest["left_out"]) == ["damage"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:group .gone. has fewer")
def test_what_is_added_later_is_as_if_measured_at_once(folder: Path, model: mt.Model, tmp_path: Path) -> None:
    place = tmp_path / "atlas"
    mt.atlas.write_atlas(model, place, text=GROUPS, measures=["firing"], tokens=TOKENS, **OPTIONS)
    mt.atlas.add_to_atlas(model, place, ["loss", "stream"], text=GROUPS)
    mt.atlas.add_to_atlas(model, place, ["damage"], text=GROUPS, share=0.1)
    added, whole = mt.atlas.open(place), mt.atlas.open(folder)
    assert "group_neurons" in added.manifest["measures"], "which damage needs"
    for name in ("groups", "damage"):
        same: Any = whole.table(name)[list(added.table(name))]
        pd.testing.assert_frame_equal(added.table(name), same)
    expected: Any = whole.table("group_layers")[list(added.table("group_layers"))]
    pd.testing.assert_frame_equal(added.table("group_layers"), expected)


def test_one_text_has_the_group_of_its_own(model: mt.Model, tmp_path: Path) -> None:
    mt.atlas.write_atlas(model, tmp_path / "a", text=[TEXT] * 20, measures=["loss"], tokens=240, **OPTIONS)
    atlas = mt.atlas.open(tmp_path / "a")
    groups = atlas.table("groups")
    assert groups["loss"].tolist() == pytest.approx([atlas.manifest["loss"]])
    assert list(atlas.manifest["tables"]) == ["layers", "heads", "neurons", "groups"]
    with pytest.raises(ArgumentError, match=r'"group_neurons" compares groups, and this text has one'):
        mt.atlas.add_to_atlas(model, tmp_path / "a", ["damage"], text=[TEXT] * 20)


def test_groups_are_measured_where_there_are_several(model: mt.Model) -> None:
    assert not {"group_neurons", "damage"} & {*measures_of("full"), *measures_of("quick", 3)}
    assert "group_neurons" in measures_of("default", 3)
    assert measures_of("full", 3)[-2:] == ["group_neurons", "damage"]
    kept = kept_by_group(model, measures_of("default", 3))
    assert {"loss", "stream", "massive"} <= {*kept}
    assert not {"activations", "group_neurons", "neuron_weights", "induction"} & {*kept}


def test_every_column_of_the_new_tables_says_what_it_is(atlas: Atlas) -> None:
    for name in ("groups", "group_layers", "damage"):
        for column, told in atlas.manifest["tables"][name]["columns"].items():
            assert told["unit"], (name, column)
            assert told["meaning"] or column.endswith(("_lo", "_hi")), (name, column)


def test_a_neuron_of_which_nothing_was_measured_belongs_to_no_group() -> None:
    keys = {"layer": pa.array([0, 0, 1], pa.int32()), "neuron": pa.array([0, 1, 0], pa.int32())}
    old = pa.table(keys | {"max": [1.0, 2.0, 3.0]})
    new = pa.table({k: v[1:] for k, v in keys.items()} | {"group_selected": [[0.0, 1.0], [1.0, 0.0]]})
    joined = whole_lists(joined_columns(old, new), ["a", "b"])
    assert joined["group_selected"].to_pylist() == [[None, None], [0.0, 1.0], [1.0, 0.0]]
    assert chosen_neurons(joined, ["a", "b"]) == {"a": [(1, 0)], "b": [(0, 1)]}
    assert with_names(joined, ["a", "b"])["of_group"].to_pylist() == [None, "b", "a"]


def heads_with(**columns: list[float]) -> Any:
    keys = {"layer": pa.array([0, 0, 1, 1], pa.int32()), "head": pa.array([0, 1, 0, 1], pa.int32())}
    return pa.table(keys | {name: pa.array(values, pa.float32()) for name, values in columns.items()})


def test_relations_are_the_columns_of_heads_as_rows() -> None:
    heads = heads_with(
        maps_capital=[0.1, 0.9, 0.3, 0.4], maps_capital_shuffled=[0.0, 0.1, 0.0, 0.2], suppress_capital=[0, 0, 0.5, 0],
        suppress_capital_shuffled=[0, 0, 0.25, 0], successor=[0.5, 0.25, 0, 1], successor_shuffled=[0, 0, 0.125, 0],
    )  # fmt: skip
    pairs = {"capital": [("France", "Paris")] * 7, "successor": [("one", "two")] * 3, "plural": [("cat", "cats")]}
    table = relations_table(heads, pairs)
    assert table is not None
    found = table.to_pandas().set_index(["relation", "layer", "head"])
    assert len(found) == 8
    assert found.loc[("capital", 0, 1)].tolist() == pytest.approx([7, 0.9, 0.1, 0, 0])
    assert found.loc[("capital", 1, 0), "suppress"] == 0.5
    assert found.loc[("successor", 1, 1), "maps"] == 1
    assert found.loc["successor"]["suppress"].isna().all()
    assert relations_table(heads_with(induction=[0, 0, 0, 0]), pairs) is None


def test_the_pairs_that_were_tried_are_those_of_the_run_that_tried_them(model: mt.Model, tmp_path: Path) -> None:
    place, text = tmp_path / "atlas", [TEXT] * 20
    mt.atlas.write_atlas(model, place, text=text, measures=["head_functions"], tokens=240, **OPTIONS)
    before = mt.atlas.open(place)
    with mt.settings(seed=5):
        assert pairs_of(model) != {k: [(a, b) for a, b in v] for k, v in before.manifest["relations"].items()}
        mt.atlas.add_to_atlas(model, place, ["loss"], text=text)
        after = mt.atlas.open(place)
        assert after.manifest["relations"] == before.manifest["relations"]
        pd.testing.assert_frame_equal(after.table("relations"), before.table("relations"))
        assert (after.manifest["seed"], after.manifest["added"][0]["seed"]) == (0, 5)
        mt.atlas.add_to_atlas(model, place, ["head_functions"], text=text)
        assert {k: [(a, b) for a, b in v] for k, v in mt.atlas.open(place).manifest["relations"].items()} == pairs_of(
            model
        )


def test_the_file_of_labels_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets" / "data").mkdir(parents=True)
    place = write_labels(tmp_path, {"1.mlp.post[5]": {"label": "kept"}})
    before, seen = place.read_bytes(), list[bytes]()

    def full(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[:9])
        seen.append(place.read_bytes())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="cannot write the labels to .*labels.js; got No space left"):
        write_labels(tmp_path, {})
    assert seen == [before]
    assert place.read_bytes() == before
    assert [p.name for p in place.parent.iterdir()] == ["labels.js"]


def test_labels_reach_the_pages_of_the_atlas_and_only_those(
    atlas: Atlas, folder: Path, model: mt.Model, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tables = {p.name: p.read_bytes() for p in copy.glob("*.parquet")}
    own, hostile = mt.atlas.open(copy), "</script><b>\u2028é"
    own.neuron(1, 5).label(hostile, note="a </script> note")
    told = (copy / "assets/data/labels.js").read_text(encoding="ascii")
    assert told.count("<") == 0
    name, _, value = told.removeprefix("atlas.receive(").removesuffix(");\n").partition(", ")
    assert json.loads(name) == "labels"
    assert json.loads(value) == {"1.mlp.post[5]": {"label": hostile, "note": "a </script> note"}}
    assert "labels" not in (folder / "assets/data/labels.js").read_text().replace('"labels"', ""), (
        "the other is as it was"
    )
    assert {p.name: p.read_bytes() for p in copy.glob("*.parquet")} == tables
    mt.atlas.write_atlas(model, copy, text=[TEXT] * 20, measures=["firing"], tokens=240, **OPTIONS)
    assert (
        hostile
        in json.loads((copy / "assets/data/labels.js").read_text().split(", ", 1)[1][:-3])["1.mlp.post[5]"]["label"]
    )
    mt.atlas.open(copy).neuron(1, 5).label("")
    assert (copy / "assets/data/labels.js").read_text() == 'atlas.receive("labels", {});\n'


def test_a_label_is_kept_though_the_pages_cannot_show_it(atlas: Atlas, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "assets/data/labels.js").unlink()
    (copy / "assets/data/labels.js").mkdir()  # no file can be written there, whoever runs this
    own = mt.atlas.open(copy)
    with pytest.warns(MicrotomeWarning, match=r"do not show the label, which is kept; got .*atlas\.labels\.show\(\)"):
        own.layer(1).label("kept")
    assert own.labels.read()["1.resid_post"]["label"] == "kept"
