"""Settings: where models open, what fits in memory, which seeds and budgets, and what is reported of progress."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt


def ids(rows: int = 4, length: int = 12) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def test_settings_hold_inside_their_block_and_nest() -> None:
    from microtome.context import current

    with mt.settings(seed=3, budget="1.5 GiB"):
        assert (current().seed, current().budget) == (3, 3 * 2**29)
        with mt.settings(seed=4):
            assert (current().seed, current().budget) == (4, 3 * 2**29)
        assert current().seed == 3
    assert (current().seed, current().budget) == (0, None)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": -1}, "seed must be an integer of 0 or more; got -1"),
        ({"seed": True}, "seed must be an integer of 0 or more; got True"),
        ({"budget": "lots"}, "budget must be a size in memory; got 'lots'"),
        ({"budget": -4}, "budget must be a size in memory; got -4"),
        ({"sede": 1}, 'no setting "sede"; allowed: seed, budget, progress'),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(mt.errors.ArgumentError) as refused, mt.settings(**change):
        pass
    assert text in str(refused.value)


def test_settings_are_checked_wherever_they_are_made_and_can_be_given_whole() -> None:
    from microtome.context import Settings, current

    kept = Settings(seed=3, budget="2 GiB")
    assert kept.budget == 2**31
    with mt.settings(seed=5), mt.settings(kept, seed=4):
        assert (current().seed, current().budget) == (4, 2**31)
    with pytest.raises(mt.errors.ArgumentError, match="seed must be an integer of 0 or more; got -1"):
        Settings(seed=-1)
    with pytest.raises(mt.errors.ArgumentError, match="budget must be a size in memory; got 'lots'"):
        Settings(budget="lots")


def test_progress_is_reported_by_stage_to_its_end(model: mt.Model) -> None:
    told: list[tuple[str, int, int]] = []
    with mt.settings(progress=lambda *report: told.append(report)):
        mt.measure(model, "stream", "neuron_weights", text=ids(), rows=2)
    assert told[0] == ("reading the text", 0, 2)
    assert ("reading the text", 2, 2) in told
    assert told[-1] == ("reading weights", 3, 3)


def test_the_budget_of_the_settings_bounds_runs_and_sweeps(model: mt.Model) -> None:
    cells = [mt.edit.Zero("1.mlp_out")]
    metric = mt.metric.LogProbability(11)
    with mt.settings(budget=64):
        with pytest.raises(mt.errors.BudgetError, match="allowed: 64 B"):
            model.run(ids(), capture="*.mlp.post")
        with pytest.raises(mt.errors.BudgetError, match="allowed: 64 B"):
            model.sweep(ids(1), cells, metric)
        assert model.sweep(ids(1), cells, metric, budget=2**30).run().done == 1  # a call's own budget comes first
    assert model.sweep(ids(1), cells, metric).run().done == 1


def test_the_device_of_the_settings_is_where_models_open(tmp_path: Any) -> None:
    families.build("llama-gqa").save_pretrained(tmp_path)
    with mt.settings(device="nowhere"):
        with pytest.raises(mt.errors.ModelError, match="cannot put a model on this device; got nowhere"):
            mt.open(tmp_path, prove=False)
        assert mt.open(tmp_path, prove=False, device="cpu").device.type == "cpu"  # a call's own device comes first
