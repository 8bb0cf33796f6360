"""Exact edge effects find the circuit of every compiled program, and only with both corruptions."""

from __future__ import annotations

import pytest
import torch

import microtome as mt
from microtome import planted
from microtome.explain import auc

NAMES = list(planted.PROGRAMS)


@pytest.mark.parametrize("name", NAMES)
def test_exact_effects_tell_the_circuit_from_the_rest(name: str) -> None:
    it = planted.program(name)
    data = mt.circuit_recovery(it, pairs=6, seed=3)
    assert data.attrs["auc"] == 1.0
    assert int(data["true"].sum()) == len(it.truth["edges"])
    assert int((data["score"] == data["score"]).sum()) == len(planted.edges(it.model))


def test_tokens_alone_miss_what_positions_carry() -> None:
    it = planted.program("previous_token")
    data = mt.circuit_recovery(it, pairs=6, seed=3, corrupt=("tokens",))
    carried = data["score"].sel(sender="pos_embed").where(data["true"].sel(sender="pos_embed"), drop=True)
    assert carried.size > 0
    assert float(abs(carried).max()) < 1e-6
    assert data.attrs["auc"] < 1.0


def test_auc_counts_pairs() -> None:
    high, low = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
    assert auc(high, low) == (1 + 1 + 1 + 0.5) / 4
    assert auc(low, high) == 1 - auc(high, low)
