"""Measures with values of different layers share one table: each value in its own row, missing where there is none."""

from __future__ import annotations

import numpy as np
import xarray as xr
from tests import families

import microtome as mt
from microtome.atlas._tables import tables


def test_a_value_stands_in_the_row_of_its_layer_where_measures_have_other_layers() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    methods = mt.measures()
    some = xr.Dataset(
        {"kurtosis": (("layer", "neuron"), [[1.0, 2.0], [3.0, 4.0]])}, coords={"layer": [0, 2], "neuron": [0, 1]}
    )
    others = xr.Dataset({"out_norm": (("layer", "neuron"), [[5.0, 6.0]])}, coords={"layer": [1], "neuron": [0, 1]})
    table = tables(model, [(methods["kurtosis"], some), (methods["neuron_weights"], others)])["neurons"]
    assert table.column("layer").to_pylist() == [0, 0, 1, 1, 2, 2]
    assert table.column("neuron").to_pylist() == [0, 1, 0, 1, 0, 1]
    assert table.column("kurtosis").to_pylist() == [1.0, 2.0, None, None, 3.0, 4.0]
    np.testing.assert_array_equal(table.column("out_norm").to_pylist(), [None, None, 5.0, 6.0, None, None])


def test_no_column_has_the_name_of_an_axis() -> None:
    """Results of measures are merged into one dataset, in which a name is a variable or an axis."""
    measures = [one for one in mt.methods().values() if one.kind == "measure"]
    columns = {column.name for one in measures for column in one.columns}
    axes = {axis for one in measures for column in one.columns for axis in (*(column.dims or ()), *column.extra)}
    assert {"layer", "class"} <= axes
    assert not columns & axes
