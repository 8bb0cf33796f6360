"""The damage matrix against losses of plain runs, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.edit import Zero
from microtome.measurements import damage, token_loss
from microtome.measurements._damage import matched

SETS: dict[str, list[tuple[int, int]]] = {"some": [(0, 3), (0, 9), (2, 1)], "none": []}


def ids(rows: int, seed: int) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def test_it_is_the_loss_without_the_neurons_minus_the_loss(model: mt.Model) -> None:
    text = {"a": ids(8, 0), "b": ids(9, 1)}
    data = damage(model, SETS, text)
    assert (data["damage"].dims, data["loss"].dims) == (("set", "group"), ("group",))
    for group, rows in text.items():
        edits = [Zero("0.mlp.post[3,9]"), Zero("2.mlp.post[1]")]
        base, cut = (token_loss(model.run(rows, edits=e).logits, rows).double().mean() for e in ([], edits))
        own = data.sel(group=group)
        assert float(own["loss"]) == pytest.approx(float(base), abs=1e-6)
        assert float(own["damage"].sel(set="some")) == pytest.approx(float(cut - base), abs=1e-6)
        for name in ("damage", "damage_random", "damage_diff", "damage_lo", "damage_hi"):
            assert float(own[name].sel(set="none")) == 0, name
    np.testing.assert_allclose(data["damage_diff"], data["damage"] - data["damage_random"], atol=1e-12)
    assert (data["damage_diff_lo"] <= data["damage_diff"]).all()
    assert (data["damage_diff"] <= data["damage_diff_hi"]).all()
    assert data["damage"].attrs["unit"] == "nats"


def test_controls_are_of_the_same_layers_and_sizes_and_in_no_set(model: mt.Model) -> None:
    sizes = {i: torch.rand(56, generator=torch.Generator().manual_seed(i)).double() ** 4 for i in range(3)}
    own = [(0, int(sizes[0].argmax())), (0, 5), (1, int(sizes[1].argmin()))]
    drawn = matched(sizes, own, {*own, (0, 6)}, torch.Generator().manual_seed(0))
    assert [layer for layer, _ in drawn] == [0, 0, 1]
    assert not {*own, (0, 6)} & set(drawn)
    for (layer, neuron), (_, other) in zip(own, drawn, strict=True):
        apart = (sizes[layer].log() - sizes[layer][neuron].log()).abs()
        assert int((apart < apart[other]).sum()) <= 8 + 3


def test_without_controls_there_is_no_difference(model: mt.Model) -> None:
    data = damage(model, SETS, ids(2, 0), controls=0)
    assert "damage" in data
    assert not {"damage_random", "damage_diff"} & set(data)
    assert np.isnan(data["damage_lo"]).all()  # of two rows


def test_a_group_without_tokens_to_predict_has_no_value(model: mt.Model) -> None:
    whole = damage(model, SETS, {"a": ids(8, 0)}, controls=0)
    for text in ({"a": ids(8, 0), "b": ids(1, 1)[:, :1]}, {"b": ids(1, 1)[:, :1], "a": ids(8, 0)}):
        data = damage(model, SETS, text)
        assert data["loss"].sel(group="b").isnull()
        for name in ("damage", "damage_random", "damage_diff"):
            assert data[name].sel(group="b").isnull().all()
            assert data[name].sel(group="a").notnull().all()
        np.testing.assert_allclose(data["damage"].sel(group="a"), whole["damage"][:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ({}, "no set of neurons is given"),
        ({"x": [(0, 56)]}, 'the set "x" holds a neuron that the model has not; got (0, 56)'),
        ({"x": [(9, 0)]}, 'the set "x" holds a neuron that the model has not'),
        ({"x": [(0, 1), (0, 1)]}, 'the set "x" holds a neuron twice; got (0, 1)'),
        ({"x": [(0, n) for n in range(40)]}, "layer 0 has too few neurons outside of the sets"),
    ],
)
def test_what_is_no_set_is_refused_in_one_line(model: mt.Model, sets: Any, told: str) -> None:
    with pytest.raises(mt.errors.ArgumentError) as refused:
        damage(model, sets, ids(2, 0))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_dataset_without_a_choice_is_refused(model: mt.Model) -> None:
    with pytest.raises(mt.errors.ArgumentError, match="the dataset has no group_selected"):
        damage(model, mt.measure(model, "firing", text=ids(2, 0)), ids(2, 0))
