"""Results go to pandas as they are: one row a unit, with its coordinates and the number that the result holds there."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tests import families

import microtome as mt

MODEL = mt.open(families.build("llama-gqa"), prove=False)
IDS = torch.randint(5, families.VOCAB, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "name", ["induction", "head_norms", "stream", "activations", "neuron_weights", "ablation_loss"]
)
def test_a_measure_is_a_table_with_a_row_a_unit(name: str) -> None:
    data = mt.measure(MODEL, name, text=IDS)
    frame = data.to_dataframe()
    assert list(frame.index.names) == list(data.dims)
    assert len(frame) == np.prod(list(data.sizes.values()))
    for column in data.data_vars:
        assert np.array_equal(frame[column].to_numpy(), data[column].values.reshape(-1), equal_nan=True), column


def test_one_head_is_one_row() -> None:
    data = mt.measure(MODEL, "induction", text=IDS)
    row = data.sel(layer=1, head=3).to_pandas()
    assert isinstance(row, pd.Series)
    assert row["induction"] == data["induction"].values[1, 3]
    assert data.to_dataframe().loc[(1, 3), "entropy"] == data["entropy"].values[1, 3]


def test_the_cells_of_a_patch_and_the_pattern_of_a_head_are_tables() -> None:
    clean, corrupt = IDS[:1, :6], IDS[1:2, :6]
    cells = mt.explain.patch(MODEL, clean, corrupt, answer=7, foil=9, sites=["resid_pre"])
    frame = cells["resid_pre"].to_dataframe().reset_index()
    assert len(frame) == cells["resid_pre"].size
    assert {"layer", "pos", "resid_pre"} <= set(frame.columns)
    strongest = frame.loc[frame["resid_pre"].abs().idxmax()]
    assert abs(strongest["resid_pre"]) == abs(cells["resid_pre"]).max()
    run = MODEL.run(clean, capture=["1.attn.pattern[3]", "*.resid_post"])
    pattern = run.dataset()["attn.pattern"].squeeze(drop=True).to_pandas()
    assert isinstance(pattern, pd.DataFrame)
    assert (pattern.index.name, pattern.columns.name) == ("q_pos", "k_pos")
    assert np.array_equal(pattern.to_numpy(), run["1.attn.pattern[3]"][0, 0].numpy())
