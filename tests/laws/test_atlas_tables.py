"""The tables of an atlas hold what its measures give, each value in the row of its layer, head or neuron."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr
from tests import families
from tests.cli.conftest import TEXT, tokenizer

import microtome as mt
from microtome.atlas import measures_of
from microtome.atlas._manifest import thin
from microtome.atlas._tables import flat, table_of
from microtome.atlas._write import LEAST_TOKENS
from microtome.cli._atlas import atlas

OPTIONS = {"tokens": 240, "length": 20, "rows": 4}
MEASURES = (
    "stream",
    "massive",
    "head_norms",
    "activations",
    "firing",
    "top_examples",
    "neuron_weights",
    "loss",
    "kurtosis",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[mt.Model, Path]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("made")
    tokenizer(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    model = mt.open(families.build("llama-gqa"), tokenizer=reader, prove=False)
    mt.atlas.write_atlas(model, folder / "atlas", text=[TEXT] * 20, measures=MEASURES, **OPTIONS)
    return model, folder / "atlas"


@pytest.mark.parametrize(
    ("name", "axes"), [("layers", ("layer",)), ("heads", ("layer", "head")), ("neurons", ("layer", "neuron"))]
)
def test_every_row_holds_the_values_of_its_unit(made: tuple[mt.Model, Path], name: str, axes: tuple[str, ...]) -> None:
    model, folder = made
    table = pq.read_table(folder / f"{name}.parquet")
    data = mt.measure(model, *MEASURES, text=[TEXT] * 20, **OPTIONS)
    places = list(zip(*(table.column(axis).to_pylist() for axis in axes), strict=True))
    sizes = {"layer": 3, "head": 4, "neuron": families.D_MLP}
    assert sorted(places) == sorted(np.ndindex(*(sizes[axis] for axis in axes)))
    columns = [c for c in table.column_names if c not in (*axes, "kv_head")]
    assert columns
    for column in columns:
        assert data[column].dims[: len(axes)] == axes
        for place, value in zip(places, table.column(column).to_pylist(), strict=True):
            expected = data[column].values[place]
            assert np.allclose(np.array(value, float), expected, rtol=1e-6, equal_nan=True), (column, place)
        flat = np.stack([np.asarray(data[column].values[place], dtype=float) for place in places])
        assert column.startswith(("example_", "drawn_", "max_abs_dim")) or np.ptp(flat.astype(np.float32)) > 1e-6, (
            column
        )
    if name == "heads":
        assert table.column("kv_head").to_pylist() == [head // 2 for _, head in places]


def test_the_schema_says_of_each_column_what_its_measure_declares(made: tuple[mt.Model, Path]) -> None:
    _, folder = made
    manifest = json.loads((folder / "manifest.json").read_text())
    declared = {c.name: c for name in MEASURES for c in mt.measures()[name].columns}
    for name, told in manifest["tables"].items():
        schema: pa.Schema = pq.read_schema(folder / f"{name}.parquet")
        assert list(told["columns"]) == schema.names
        for column in set(schema.names) & declared.keys():
            stored = schema.field(column).metadata
            assert stored[b"unit"].decode() == declared[column].unit == told["columns"][column]["unit"]
            assert stored[b"meaning"].decode() == declared[column].meaning
            assert told["columns"][column].get("range", [None, None]) == list(declared[column].range)
    assert manifest["loss"] == pytest.approx(float(mt.measure(made[0], "loss", text=[TEXT] * 20, **OPTIONS)["loss"]))
    assert set(manifest["measures"]) == set(MEASURES)


@pytest.mark.slow
def test_the_full_profile_writes_an_atlas_of_all_its_measures(made: tuple[mt.Model, Path], tmp_path: Path) -> None:
    mt.atlas.write_atlas(made[0], tmp_path / "atlas", text=[TEXT] * 20, profile="full", **OPTIONS)
    manifest = json.loads((tmp_path / "atlas" / "manifest.json").read_text())
    assert list(manifest["left_out"]) == ["expert_neurons"], "which a model without experts lacks"
    assert {*manifest["measures"], "expert_neurons"} == {*measures_of("full")}
    schema: pa.Schema = pq.read_schema(tmp_path / "atlas" / "heads.parquet")
    assert pa.types.is_list(schema.field("lag_attention_diff").type)
    assert '"kind":["' in (tmp_path / "atlas" / "assets" / "data" / "model.js").read_text()


def test_a_value_of_a_list_keeps_its_place_though_nothing_is_known_of_one_before_it() -> None:
    nan = np.nan
    values = xr.DataArray([[1, nan, 3, nan], [4, nan, nan, nan]], dims=("layer", "token_class"))
    assert np.array_equal(flat(values, ("layer",)), np.float32([[1, nan, 3], [4, nan, nan]]), equal_nan=True)
    places = xr.DataArray([[-1, 7, -1], [-1, 9, -1]], dims=("layer", "sign"))
    assert flat(places, ("layer",)).tolist() == [[-1, 7], [-1, 9]]
    around = xr.DataArray([[[nan, nan], [1, nan], [nan, nan]]], dims=("layer", "example", "offset"))
    assert flat(around, ("layer",)).shape == (1, 2, 2)


def test_lists_of_which_nothing_is_known_are_empty_in_every_row() -> None:
    nothing = flat(xr.DataArray(np.full((3, 2, 2), np.nan), dims=("layer", "example", "offset")), ("layer",))
    table = table_of({"layer": np.arange(3), "x": nothing}, {"layer": {}, "x": {}})
    assert table.column("x").to_pylist() == [[], [], []]


def test_what_a_model_lacks_the_sites_for_is_left_out_and_said(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer(tmp_path)
    reader = AutoTokenizer.from_pretrained(tmp_path)
    model = mt.open(families.build("mixtral"), tokenizer=reader, prove=False)
    mt.atlas.write_atlas(model, tmp_path / "atlas", text=[TEXT] * 20, measures=["stream", "firing"], **OPTIONS)
    manifest = json.loads((tmp_path / "atlas" / "manifest.json").read_text())
    assert list(manifest["measures"]) == ["stream"]
    assert "needs mlp.post, which MixtralForCausalLM has in no layer" in manifest["left_out"]["firing"]
    assert pq.read_table(tmp_path / "atlas" / "neurons.parquet").num_rows == 0


def test_too_few_tokens_make_no_atlas_and_few_are_marked_as_thin(made: tuple[mt.Model, Path], tmp_path: Path) -> None:
    model, folder = made
    with pytest.raises(mt.errors.ArgumentError, match="an atlas reads too few tokens; got 99; allowed: 100 or more"):
        mt.atlas.write_atlas(model, tmp_path / "a", text=[TEXT] * 20, tokens=99)
    with pytest.raises(mt.errors.DataError, match="has too few tokens for an atlas; got 2; allowed: 100 or more"):
        mt.atlas.write_atlas(model, tmp_path / "a", text=["the cat"])
    assert not list(tmp_path.iterdir())
    told = json.loads((folder / "manifest.json").read_text())["thin"]
    assert told[0].startswith("240 tokens were read: a share of them, such as a firing rate, is known to within 0.063")
    assert told[1].startswith("12 rows were read: intervals over so few examples are rough")
    assert 'thin":["240 tokens were read' in (folder / "assets" / "data" / "model.js").read_text()


@pytest.mark.parametrize(
    ("tokens", "rows", "marks"), [(20_000, 79, 0), (10_000, 30, 0), (9_999, 30, 1), (10_000, 29, 1), (100, 1, 2)]
)
def test_what_is_thin(tokens: int, rows: int, marks: int) -> None:
    assert len(thin(tokens, rows)) == marks


def test_the_command_asks_for_as_many_tokens_as_an_atlas_needs() -> None:
    (option,) = inspect.get_annotations(atlas, eval_str=True)["tokens"].__metadata__
    assert option.min == LEAST_TOKENS
