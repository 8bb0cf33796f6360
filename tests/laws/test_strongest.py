"""The strongest token of each unit is that of a plain look, in any split and order of merges, ties included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from microtome.errors import DataError
from microtome.stream import Strongest


def taken(rows: slice, seed: int = 0) -> Strongest:
    """Whole numbers, so that many are equal."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, (40, 6), generator=g).float()
    counts = torch.rand(40, 6, generator=g) < 0.6
    counts[:, 5] = False
    index = torch.arange(0, 400, 10)
    held = Strongest(6)
    held.update(values[rows], index[rows], index[rows] // 100 * 100, counts[rows])
    return held


def test_it_is_what_a_plain_look_finds() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randint(-4, 5, (40, 6), generator=g).float().double().numpy()
    counts = (torch.rand(40, 6, generator=g) < 0.6).numpy()
    found = taken(slice(None)).result()
    for unit in range(5):
        there = np.flatnonzero(counts[:, unit])
        first = there[np.abs(values[there, unit]).argmax()]
        assert (float(found.value[unit]), int(found.index[unit])) == (values[first, unit], 10 * first)
        assert int(found.start[unit]) == 10 * first // 100 * 100
    assert found.value[5].isnan()
    assert (int(found.index[5]), int(found.start[5])) == (-1, -1)


@pytest.mark.parametrize("backwards", [False, True])
def test_parts_merge_to_the_whole(backwards: bool, tmp_path: Path) -> None:
    whole = taken(slice(None)).state()
    parts = [taken(slice(i, i + 7)) for i in range(0, 40, 7)]
    parts = parts[::-1] if backwards else parts
    merged = Strongest(6)
    for part in parts:
        merged.merge(Strongest.from_state(part.state()))
    for name, expected in whole.items():
        assert torch.equal(merged.state()[name].nan_to_num(9e9), expected.nan_to_num(9e9)), name
    again = Strongest.load(merged.save(tmp_path / "held.safetensors"))
    assert torch.equal(again.result().index, merged.result().index)


def test_what_does_not_fit_is_refused() -> None:
    held, index = Strongest(2), torch.arange(3)
    with pytest.raises(DataError, match="the shapes do not fit"):
        held.update(torch.ones(3, 2), index, index, torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(DataError):
        held.update(torch.full((3, 2), torch.nan), index, index, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(DataError):
        held.merge(Strongest(3))
