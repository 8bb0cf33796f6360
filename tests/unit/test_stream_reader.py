"""Reading a harvest: any token, in any order, and shuffled so that each comes once."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tests.harvests import made, opened

from microtome.errors import ArgumentError, DataError, SiteError
from microtome.stream import Harvest


@pytest.fixture(scope="module", params=["float32", "int8"])
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    folder = tmp_path_factory.mktemp("harvest") / "h"
    made(opened(), folder, dtype=request.param)
    return Harvest(folder)


def test_tokens_are_read_in_any_order_across_shards(held: Harvest) -> None:
    x = held["1.attn.z"]
    whole = x[:]
    assert whole.shape == x.shape == (len(held), 4, 10)
    assert len(held.shards) > 2
    assert torch.equal(torch.cat([held.shard(i).take("1.attn.z", slice(None)) for i in range(len(held.shards))]), whole)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    assert torch.equal(x[order], whole[order])
    assert torch.equal(x[[3, -1, 3]], whole[[3, -1, 3]])
    assert torch.equal(x[5], whole[5])
    assert torch.equal(x[-9::2], whole[-9::2])
    assert x[3:3].shape == (0, 4, 10)
    with pytest.raises(DataError, match=rf"no such token in this harvest; got {len(held)}; allowed: 0 to"):
        x[[0, len(held)]]
    with pytest.raises(SiteError, match=re.escape('no "1.attn.zz" in this harvest. Did you mean "1.attn.z"?')):
        held["1.attn.zz"]


def test_what_was_read_can_be_changed_without_changing_the_harvest(held: Harvest) -> None:
    before = held["1.attn.z"][:]
    held["1.attn.z"][:].zero_()
    for batch in held.shuffled("1.attn.z", batch=16, buffer=64):
        batch.zero_()
    assert torch.equal(held["1.attn.z"][:], before)


@pytest.mark.parametrize(("batch", "buffer"), [(1, 2), (8, 32), (7, 50), (4096, 2**17)])
def test_a_shuffled_pass_gives_every_token_once(held: Harvest, batch: int, buffer: int) -> None:
    found = list(held.shuffled("0.resid_post", "1.attn.z", batch=batch, buffer=buffer, seed=3, numbers=True))
    numbers = torch.cat([n for n, _ in found])
    assert sorted(numbers.tolist()) == list(range(len(held)))
    for n, values in found:
        for site, x in values.items():
            assert torch.equal(x, held[site][n])
    assert all(len(n) == batch for n, _ in found[:-1])
    again = [n for n, _ in held.shuffled("1.attn.z", batch=batch, buffer=buffer, seed=3, numbers=True)]
    assert torch.equal(torch.cat(again), numbers)
    if batch > 1:
        other = [n for n, _ in held.shuffled("1.attn.z", batch=batch, buffer=buffer, seed=4, numbers=True)]
        assert not torch.equal(torch.cat(other), numbers)


def test_neighbours_come_apart(held: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full buffer shuffles as well as a permutation: ranks of places before and after do not correlate."""
    from microtome.stream import _shuffle

    monkeypatch.setattr(_shuffle, "BLOCK", 8)
    rhos = []
    for seed in range(20):
        order = torch.cat([n for n, _ in held.shuffled("1.attn.z", batch=16, buffer=128, seed=seed, numbers=True)])
        rhos.append(np.corrcoef(np.arange(len(order)), order.numpy())[0, 1])
    assert abs(np.mean(rhos)) < 4 / np.sqrt(20 * len(held))
    assert np.std(rhos) < 3 / np.sqrt(len(held))


def test_a_reader_without_room(held: Harvest) -> None:
    for given in ({"batch": 0}, {"batch": 8, "buffer": 15}):
        with pytest.raises(ArgumentError, match="the shuffled reader needs room"):
            next(held.shuffled(**given))
