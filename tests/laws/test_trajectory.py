"""Laws of the path of the stream: closed forms of steps, a stack that ignores what it reads, runs by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.edit import Add
from microtome.measurements._trajectory import accelerations, noise

LAYERS = script("tools/planted_cases/layers.py")


def ids(rows: int = 8, length: int = 14, vocab: int = families.VOCAB) -> Tensor:
    return torch.randint(5, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


def test_equal_steps_do_not_turn_and_a_way_back_turns_most() -> None:
    way = torch.tensor([[0.0, 0], [1, 0], [2, 0], [1, 0], [1, 1], [1, 4]]).reshape(6, 1, 1, 2)
    turns, square = accelerations(list(way))
    half = 0.5**0.5
    np.testing.assert_allclose(turns.flatten(), [0, 0, 1, half, 2 / 4], atol=1e-7)
    np.testing.assert_allclose(square.flatten(), [0, half, half, half, 10**0.5 / 4], atol=1e-7)


def test_a_stack_that_adds_nothing_keeps_the_distance() -> None:
    data = mt.measure(mt.open(LAYERS.tiny(), prove=False), "trajectory", text=ids(vocab=60))
    upper = np.triu(np.ones((3, 3), dtype=bool))
    assert np.allclose(data["pushed"].values[upper], 1, atol=1e-5)
    assert np.allclose(data["pushed_inert"].values[upper], 1, atol=1e-5)
    assert np.isnan(data["pushed"].values[~upper]).all()
    assert np.isnan(data["acceleration"].values[0])


def test_it_is_the_distance_of_two_runs() -> None:
    model = mt.open(families.build("llama-gqa").double(), prove=False)
    data = mt.measure(model, "trajectory", text=ids(), push=0.3)
    run = model.run(ids(), capture=["*.resid_post", "0.resid_pre"])
    for layer in range(2):
        x = run[f"{layer}.resid_post"]
        push = 0.3 * x.norm(dim=-1, keepdim=True) * noise(x, torch.arange(8) * 14)
        push[:, 0] = 0
        other = model.run(ids(), capture="*.resid_post", edits=Add(f"{layer}.resid_post", value=push))
        for later in range(layer + 1, 3):
            y = run[f"{later}.resid_post"]
            far = (other[f"{later}.resid_post"] - y).norm(dim=-1) / y.norm(dim=-1) / 0.3
            assert float(data["pushed"][layer, later]) == pytest.approx(float(far[:, 1:].mean()), rel=1e-6)
            inert = (x.norm(dim=-1) / y.norm(dim=-1))[:, 1:].mean()
            assert float(data["pushed_inert"][layer, later]) == pytest.approx(float(inert), rel=1e-6)
    a, b, c = run["0.resid_pre"], run["0.resid_post"], run["1.resid_post"]
    turn = ((c - 2 * b + a).norm(dim=-1) / ((c - b).norm(dim=-1) + (b - a).norm(dim=-1)))[:, 1:].mean()
    assert float(data["acceleration"][1]) == pytest.approx(float(turn), rel=1e-6)


def test_a_layer_that_draws_the_stream_back_is_found() -> None:
    told = LAYERS.attractor()
    assert (told["found"], told["false"]) == ("3 of 3", "0 of 44")


def test_it_does_not_depend_on_how_rows_come_in_batches() -> None:
    model: Any = mt.open(families.build("gpt2"), prove=False)
    one, other = (mt.measure(model, "trajectory", text=ids(), rows=rows) for rows in (8, 3))
    for name in one.data_vars:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=str(name))
