"""An atlas that is read again says what a run of its model gives, and what is added to it is as if made at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from tests import families
from tests.cli.conftest import TEXT, tokenizer

import microtome as mt
from microtome.atlas import PROFILES, Atlas, measures_of
from microtome.errors import ArgumentError, DataError, SiteError

OPTIONS: dict[str, Any] = {"length": 20, "rows": 4}
TEXTS = [TEXT, TEXT[::-1], TEXT.title()] * 7
MEASURES = ("activations", "firing", "top_examples", "distribution", "head_norms", "induction", "loss")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> mt.Model:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer(folder)
    return mt.open(families.build("llama-gqa"), tokenizer=AutoTokenizer.from_pretrained(folder), prove=False)


@pytest.fixture(scope="module")
def folder(model: mt.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlas") / "atlas"
    mt.atlas.write_atlas(model, folder, text=TEXTS, measures=MEASURES, tokens=240, **OPTIONS)
    return folder


@pytest.fixture
def atlas(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Atlas:
    monkeypatch.setenv("MICROTOME_DATA", str(tmp_path / "data"))
    return mt.atlas.open(folder)


def test_tables_and_conditions_give_rows(atlas: Atlas, folder: Path) -> None:
    heads = pq.read_table(folder / "heads.parquet").to_pandas().set_index(["layer", "head"])
    pd.testing.assert_frame_equal(atlas.table("heads"), heads, check_dtype=False)
    limit = float(heads["induction"].median())
    found = atlas.where(f"induction > {limit} AND layer < 2")
    expected = heads[(heads["induction"] > limit) & (heads.index.get_level_values("layer") < 2)]
    assert 0 < len(found) < len(heads)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert atlas.head(1, 2)["induction"] == heads.loc[(1, 2), "induction"]
    assert atlas.sql("SELECT loss FROM model")["loss"][0] == pytest.approx(atlas.manifest["loss"])
    assert len(atlas.sql("SELECT * FROM tokens")) == 240


def test_what_cannot_be_asked_is_refused(atlas: Atlas) -> None:
    with pytest.raises(DataError, match=r"this query cannot be run; got .*nosuch.*; allowed: the tables layers, heads"):
        atlas.sql("SELECT nosuch FROM heads")
    with pytest.raises(DataError, match=r'no table has the columns of .*Did you mean "induction"'):
        atlas.where("inducton > 1")
    with pytest.raises(DataError, match=r"are in several tables; got layers, heads, neurons"):
        atlas.where("layer = 1")
    with pytest.raises(DataError, match=r'no table "units"; allowed: layers, heads, neurons, groups'):
        atlas.table("units")
    with pytest.raises(
        DataError, match=r'no table "relations"; .*make it with `microtome atlas .* --add head_functions`'
    ):
        atlas.table("relations")
    with pytest.raises(DataError, match=r"relations does not exist.*--add head_functions`"):
        atlas.sql("SELECT * FROM relations")
    with pytest.raises(DataError, match=r'no table "damage"; .*--add damage`, which needs a text of several groups'):
        atlas.table("damage")
    with pytest.raises(SiteError, match=r"no neuron 1\.999"):
        atlas.neuron(1, 999)
    with pytest.raises(DataError, match=r'a head has no column "entropie"'):
        _ = atlas.head(0, 0)["entropie"]
    with pytest.raises(DataError, match="only neurons have examples"):
        atlas.head(0, 0).examples()


def test_examples_are_words_with_the_activations_of_a_run(atlas: Atlas, model: mt.Model) -> None:
    from microtome.stream import Corpus, TokenBatches

    batches = TokenBatches(Corpus.of("text", TEXTS), model.tokenizer, length=20, rows=4, tokens=240)
    checked = uneven = 0
    for layer, neuron in ((0, 3), (2, 41)):
        unit = atlas.neuron(layer, neuron)
        found = unit.examples()
        assert [one.kind for one in found] == ["top"] * 5 + ["drawn"] * 4
        values = {kind: [one.value for one in found if one.kind == kind] for kind in ("top", "drawn")}
        assert all(one == sorted(one, reverse=True) for one in values.values())
        for one in found:
            row = next(b for b in batches if one.token in range(int(b.start[0]), int(b.start[0]) + b.tokens.numel()))
            place = one.token - int(row.start[0])
            run = model.run(row.tokens, capture=f"{layer}.mlp.post")
            x = run[f"{layer}.mlp.post"][place // 20, :, neuron]
            first = place % 20 - one.peak
            assert one.words == tuple(model.to_words(row.tokens[place // 20][first : first + len(one.words)]))
            expected = x[first : first + len(one.words)].numpy()
            np.testing.assert_allclose(one.activations, expected, rtol=4e-3, atol=1e-6)
            uneven += bool(np.ptp(expected) > 0.05)
            assert one.value == pytest.approx(float(x.max()), rel=1e-5)
            checked += 1
    assert checked == 18
    assert uneven > 12  # passages that show a place from another
    assert "[" in str(found[0])


def test_what_stands_out_on_a_prompt_is_furthest_from_the_mean(atlas: Atlas, model: mt.Model) -> None:
    prompt = "the dog saw the barn"
    found = atlas.on(prompt, model, top=10_000)
    run = model.run(prompt, capture="*.mlp.post")
    table = atlas.table("neurons")
    best: dict[str, float] = {}
    for layer in range(3):
        usual = table.loc[layer]
        x = run[f"{layer}.mlp.post"][0].double().numpy()
        z = (x - usual["mean"].to_numpy(dtype=float)) / usual["std"].to_numpy(dtype=float)
        place = 1 + np.abs(z[1:]).argmax(0)
        best |= {f"{layer}.mlp.post[{n}]": float(z[place[n], n]) for n in range(z.shape[1])}
    neurons = found[found["unit"] == "neuron"].set_index("site")
    assert set(neurons.index) == set(best)
    np.testing.assert_allclose(neurons["z"], [best[site] for site in neurons.index], rtol=1e-5, atol=1e-6)
    assert list(found["z"].abs()) == sorted(found["z"].abs(), reverse=True)
    assert len(found[found["unit"] == "head"]) == 12
    assert len(atlas.on(prompt, model, top=7)) == 7
    with pytest.raises(DataError, match="the atlas is of another model"):
        atlas.on(prompt, mt.open(families.build("gpt2"), tokenizer=model.tokenizer, prove=False))


def test_labels_outlive_the_atlas(atlas: Atlas, folder: Path) -> None:
    unit = atlas.neuron(1, 5)
    unit.label("animals", note="fires on dog, cat")
    again = mt.atlas.open(folder)
    assert repr(again.neuron(1, 5)).endswith("'animals'")
    row = again.sql("SELECT * FROM labels").iloc[0]
    assert (row["site"], row["label"], row["note"]) == ("1.mlp.post[5]", "animals", "fires on dog, cat")
    assert [p.name for p in folder.rglob("*label*")] == ["labels.js"], "the pages have a copy, the tables none"
    unit.label("")
    assert mt.atlas.open(folder).labels.read() == {}
    with pytest.raises(SiteError):
        atlas.labels.write("1.nosuch[5]", "x")


def test_measures_that_are_added_are_as_if_measured_at_once(model: mt.Model, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "atlas"
    mt.atlas.write_atlas(model, place, text=TEXTS, measures=["firing", "loss"], tokens=240, **OPTIONS)
    mt.atlas.add_to_atlas(model, place, ["activations", "top_examples", "head_norms"], text=TEXTS)
    whole, added = mt.atlas.open(folder), mt.atlas.open(place)
    for name in ("neurons", "heads"):
        shared = [c for c in added.table(name).columns if c in whole.table(name).columns]
        assert len(shared) > 2
        pd.testing.assert_frame_equal(added.table(name)[shared], whole.table(name)[shared])
    assert set(added.manifest["measures"]) == {"firing", "loss", "activations", "top_examples", "head_norms"}
    assert added.manifest["added"][0]["measures"] == ["activations", "top_examples", "head_norms"]
    assert added.manifest["loss"] == whole.manifest["loss"]
    assert "activations" in (place / "assets/data/model.js").read_text()
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"loss": 99.0}))
    mt.atlas.add_to_atlas(model, place, ["loss"], text=TEXTS)
    assert mt.atlas.open(place).manifest["loss"] == whole.manifest["loss"], "what is measured anew replaces what was"
    with pytest.raises(DataError, match="made of another text"):
        mt.atlas.add_to_atlas(model, place, ["kurtosis"], text=[TEXT.upper()] * 40)
    other = mt.open(families.build("gpt2"), tokenizer=model.tokenizer, prove=False)
    with pytest.raises(DataError, match="the atlas is of another model"):
        mt.atlas.add_to_atlas(other, place, ["kurtosis"], text=TEXTS)


def test_an_atlas_that_is_damaged_or_newer_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "text.parquet").unlink()
    with pytest.raises(DataError, match=r"is not whole; got no text\.parquet"):
        mt.atlas.open(copy)
    shutil.copy(folder / "text.parquet", copy / "text.parquet")
    whole = (copy / "neurons.parquet").read_bytes()
    for kept in (len(whole) // 2, len(whole) - 3, 0):
        (copy / "neurons.parquet").write_bytes(whole[:kept])
        with pytest.raises(
            DataError, match=r"neurons\.parquet\" is damaged, perhaps cut short; .*copy it again"
        ) as told:
            mt.atlas.open(copy)
        assert "\n" not in str(told.value)
    shutil.copy(folder / "heads.parquet", copy / "neurons.parquet")
    with pytest.raises(
        DataError, match=r"is not the one that the atlas was written with; got 12 rows; allowed: 168 rows"
    ):
        mt.atlas.open(copy)
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(DataError, match=r"by a newer version; got format 99; allowed: format 1"):
        mt.atlas.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="no atlas in"):
        mt.atlas.open(copy)


def test_a_profile_runs_what_the_smaller_one_does_and_more() -> None:
    quick, default, full = (set(measures_of(name)) for name in PROFILES)
    assert quick < default <= full
    assert "ablation_loss" in default - quick
    assert {"activations", "induction", "stream"} <= quick


def test_an_unknown_profile_is_refused(model: mt.Model, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such profile; got huge; allowed: quick, default, full"):
        mt.atlas.write_atlas(model, tmp_path / "a", profile="huge")


def test_a_mixture_has_an_atlas_with_the_neurons_of_its_experts(model: mt.Model, tmp_path: Path) -> None:
    mixture = mt.open(families.build("mixtral"), tokenizer=model.tokenizer, prove=False)
    measures = ["expert_neurons", "stream"]
    mt.atlas.write_atlas(mixture, tmp_path / "a", text=TEXTS, measures=measures, tokens=240, **OPTIONS)
    atlas = mt.atlas.open(tmp_path / "a")
    assert atlas.table("expert_neurons").index.names == ["layer", "expert", "neuron"]
    assert len(atlas.where("expert = 1")) * mixture.anatomy.n_layers > 0
