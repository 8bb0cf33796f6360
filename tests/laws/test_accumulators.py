"""Laws of the accumulators: however data is split, and in whatever order parts are merged, the answer is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microtome.stream import (
    Accumulator,
    Cooccurrence,
    Counter,
    Covariance,
    CrossCovariance,
    DrawnExamples,
    Firing,
    Histogram,
    Moments,
    Quantiles,
    TopExamples,
    merged,
)

TIGHT = 1e-12
EDGES = [-4.0, -1.0, 0.0, 0.5, 3.0, 1e6]
EVERY = ("normal", "ties", "far", "constant", "outlier", "wide")
GROUPS = ("prose", "code", "empty")
laws = settings(max_examples=40, deadline=None)


@dataclass(frozen=True)
class Data:
    """Rows of activations, with where they start, which positions count, and their groups."""

    values: Tensor
    start: Tensor
    mask: Tensor
    group: Tensor

    def part(self, rows: list[int]) -> Data:
        return Data(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def table(self) -> np.ndarray:
        """What counts, as [row, unit]."""
        return self.values[self.mask].numpy()


def values_of(kind: str, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Ordinary and adversarial activations."""
    normal = rng.standard_normal(shape)
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(float)
    if kind == "far":
        return 1e6 + 1e-3 * normal
    if kind == "constant":
        return np.broadcast_to(rng.standard_normal(shape[2]), shape).copy()
    if kind == "outlier":
        normal *= 1e-3
        normal[0, 0] = 1e6
    if kind == "wide":
        return normal * 10.0 ** rng.integers(-12, 12, shape)
    return normal


@st.composite
def data(draw: st.DrawFn, least: int = 1, kinds: tuple[str, ...] = EVERY) -> Data:
    batch, pos, units = draw(st.integers(least, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = values_of(kind, (batch, pos, units), rng)
    start = rng.permutation(batch) * (pos if draw(st.booleans()) else 1)  # rows that overlap make equal indices
    mask = rng.random((batch, pos)) < draw(st.sampled_from([0.5, 2.0]))
    mask[0, 0] = True
    group = rng.integers(0, 2, (batch, pos))
    return Data(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (values, start, mask, group)))


KINDS: dict[str, tuple[Callable[[int], Any], Callable[[Any, Data], None]]] = {
    "moments": (Moments, lambda a, d: a.update(d.values, d.mask)),
    "firing": (lambda units: Firing(units, 1.0), lambda a, d: a.update(d.values, d.mask)),
    "covariance": (Covariance, lambda a, d: a.update(d.values, d.mask)),
    "cross": (lambda units: CrossCovariance(units, units), lambda a, d: a.update(d.values, d.values.flip(-1), d.mask)),
    "histogram": (lambda units: Histogram(units, EDGES), lambda a, d: a.update(d.values, d.mask)),
    "quantiles": (Quantiles, lambda a, d: a.update(d.values, d.mask)),
    "counter": (lambda units: Counter(GROUPS, units), lambda a, d: a.update(d.values > 0, d.group, d.mask)),
    "cooccurrence": (Cooccurrence, lambda a, d: a.update(d.values > 0, d.mask)),
    "top": (lambda units: TopExamples(units, 3), lambda a, d: a.update(d.values, d.start, d.mask)),
    "top in context": (lambda units: TopExamples(units, 2, (2, 1)), lambda a, d: a.update(d.values, d.start, d.mask)),
    "drawn": (lambda units: DrawnExamples(units, 2, (1, 0)), lambda a, d: a.update(d.values, d.start, d.mask)),
}


def fed(kind: str, seen: Data) -> Any:
    make, feed = KINDS[kind]
    accumulator = make(seen.values.shape[2])
    feed(accumulator, seen)
    return accumulator


def outcome(accumulator: Any) -> dict[str, Any]:
    """The result by field."""
    result = accumulator.result()
    return {field.name: getattr(result, field.name) for field in fields(result)}


def assert_same(ours: Any, theirs: Any, seen: Data) -> None:
    """Equal results: exactly, except the float64 means (to the size of the values) and spreads (to themselves)."""
    size = torch.from_numpy(np.abs(seen.table).max(axis=0))
    first, second = outcome(ours), outcome(theirs)
    for name, value in first.items():
        if name == "mean":
            assert bool(((value - second[name]).abs() <= TIGHT * size).all())
        elif name.startswith("variance"):
            assert bool(((value - second[name]).abs() <= TIGHT * value).all())
        elif name == "covariance":
            both = [first.get(f"variance_{of}", value.diagonal()).sqrt() for of in "xy"]
            assert bool(((value - second[name]).abs() <= TIGHT * torch.outer(*both)).all())
        elif isinstance(value, Tensor):
            assert value.dtype == second[name].dtype
            np.testing.assert_array_equal(value.numpy(), second[name].numpy(), name)
        else:
            assert value == second[name], name


def assert_state_equal(ours: Accumulator, theirs: Accumulator) -> None:
    first, second = ours.state(), theirs.state()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        np.testing.assert_array_equal(tensor.numpy(), second[name].numpy(), name)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(seen=data(), pick=st.data())
def test_any_split_merged_in_any_order_equals_everything_at_once(kind: str, seen: Data, pick: st.DataObject) -> None:
    batch = seen.values.shape[0]
    owner = pick.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch), label="owner of each row")
    parts = [fed(kind, seen.part([row for row in range(batch) if owner[row] == part])) for part in range(4)]
    while len(parts) > 1:  # a random tree of merges
        ours = parts.pop(pick.draw(st.integers(0, len(parts) - 1)))
        other = pick.draw(st.integers(0, len(parts) - 1))
        kept = parts[other].state()
        assert ours.merge(parts[other]) is ours
        for name, tensor in parts[other].state().items():
            np.testing.assert_array_equal(tensor.numpy(), kept[name].numpy(), "merge changed the other")
        parts[other] = ours
    assert_same(parts[0], fed(kind, seen), seen)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(seen=data(), pick=st.data())
def test_updates_in_any_order_equal_one_update(kind: str, seen: Data, pick: st.DataObject) -> None:
    batch = seen.values.shape[0]
    order = pick.draw(st.permutations(range(batch)))
    accumulator = KINDS[kind][0](seen.values.shape[2])
    for row in order:
        KINDS[kind][1](accumulator, seen.part([row]))
    assert_same(accumulator, fed(kind, seen), seen)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(seen=data())
def test_empty_is_the_identity(kind: str, seen: Data) -> None:
    whole, empty = fed(kind, seen), KINDS[kind][0](seen.values.shape[2])
    assert_state_equal(fed(kind, seen).merge(empty), whole)
    assert_same(empty.merge(whole), whole, seen)
    empty.merge(whole)  # what was taken in is a copy
    assert_state_equal(whole, fed(kind, seen))
    nothing = seen.part([])
    touched = fed(kind, seen)
    KINDS[kind][1](touched, nothing)
    assert_state_equal(touched, whole)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(seen=data(least=2))
def test_state_round_trip_goes_on_as_if_never_stopped(kind: str, seen: Data) -> None:
    half = seen.values.shape[0] // 2
    first, second = seen.part(list(range(half))), seen.part(list(range(half, seen.values.shape[0])))
    going = fed(kind, first)
    restored = type(going).from_state(going.state())
    assert_state_equal(restored, going)
    KINDS[kind][1](restored, second)
    KINDS[kind][1](going, second)
    assert_state_equal(restored, going)
    assert_state_equal(merged([fed(kind, first), fed(kind, second)]), fed(kind, first).merge(fed(kind, second)))


@laws
@given(seen=data())
def test_moments_equal_exact_arithmetic(seen: Data) -> None:
    result = fed("moments", seen).result()
    for unit in range(seen.values.shape[2]):
        exact = [Fraction(float(value)) for value in seen.table[:, unit]]
        mean = sum(exact, Fraction(0)) / len(exact)
        variance = sum(((value - mean) ** 2 for value in exact), Fraction(0)) / len(exact)
        assert result.count == len(exact)
        assert abs(float(result.mean[unit]) - float(mean)) <= TIGHT * float(max(map(abs, exact)))
        assert math.isclose(float(result.variance[unit]), float(variance), rel_tol=TIGHT, abs_tol=0)
        assert float(result.min[unit]) == min(exact)
        assert float(result.max[unit]) == max(exact)


@laws
@given(seen=data())
def test_covariance_equals_exact_arithmetic(seen: Data) -> None:
    result = fed("covariance", seen).result()
    columns = [[Fraction(float(value)) for value in column] for column in seen.table.T]
    count = len(columns[0])
    centred = [[value - sum(column, Fraction(0)) / count for value in column] for column in columns]
    exact = [
        [float(sum((a * b for a, b in zip(p, q, strict=True)), Fraction(0)) / count) for q in centred] for p in centred
    ]
    for i, row in enumerate(exact):
        for j, value in enumerate(row):
            assert abs(float(result.covariance[i, j]) - value) <= TIGHT * math.sqrt(exact[i][i] * exact[j][j])


@laws
@given(seen=data())
def test_counts_equal_numpy(seen: Data) -> None:
    table = seen.table
    firing = fed("firing", seen).result()
    assert np.array_equal(firing.count.numpy(), (table > 1.0).sum(axis=0))
    assert firing.total == len(table)
    joint = fed("cooccurrence", seen).result()
    flags = (table > 0).astype(np.int64)
    assert np.array_equal(joint.joint.numpy(), flags.T @ flags)
    counter = fed("counter", seen).result()
    group = seen.group[seen.mask].numpy()
    for number in range(len(GROUPS)):
        assert np.array_equal(counter.count[number].numpy(), flags[group == number].sum(axis=0))
        assert int(counter.total[number]) == (group == number).sum()
    histogram = fed("histogram", seen).result()
    for unit in range(table.shape[1]):
        assert np.array_equal(histogram.count[unit].numpy(), np.histogram(table[:, unit], bins=EDGES)[0])
        assert int(histogram.below[unit]) == (table[:, unit] < EDGES[0]).sum()
        assert int(histogram.above[unit]) == (table[:, unit] > EDGES[-1]).sum()


@laws
@given(seen=data(kinds=("ties", "ties", "normal")), k=st.integers(1, 9))
def test_top_examples_equal_sorting_everything(seen: Data, k: int) -> None:
    accumulator = TopExamples(seen.values.shape[2], k)
    accumulator.update(seen.values, seen.start, seen.mask)
    result = accumulator.result()
    for unit in range(seen.values.shape[2]):
        peaks: list[tuple[float, int, int]] = []
        for row, start in enumerate(seen.start.tolist()):
            counted = [(-float(seen.values[row, p, unit]), start + p, start)
                       for p in range(seen.values.shape[1]) if bool(seen.mask[row, p])]  # fmt: skip
            peaks += [min(counted)] if counted else []
        best = sorted(peaks)[:k] + [(math.inf, -1, -1)] * (k - len(peaks))
        found = zip(result.values[unit].tolist(), result.index[unit].tolist(), result.start[unit].tolist(), strict=True)
        assert list(found) == [(-value, index, start) for value, index, start in best]
    assert accumulator.rows == int(seen.mask.any(dim=1).sum())


@laws
@given(seen=data(kinds=("ties", "normal")), before=st.integers(0, 3), behind=st.integers(0, 3))
def test_examples_hold_the_values_around_their_peaks(seen: Data, before: int, behind: int) -> None:
    accumulator = TopExamples(seen.values.shape[2], 4, (before, behind))
    accumulator.update(seen.values, seen.start, seen.mask)
    result = accumulator.result()
    rows = {start: row for row, start in enumerate(seen.start.tolist())}
    for unit, rank in np.ndindex(*result.index.shape):
        place, start = int(result.index[unit, rank]), int(result.start[unit, rank])
        expected = np.full(before + 1 + behind, np.nan, dtype=np.float32)
        for offset in range(-before, behind + 1) if place >= 0 else ():
            pos = place - start + offset
            if 0 <= pos < seen.values.shape[1] and bool(seen.mask[rows[start], pos]):
                expected[before + offset] = seen.values[rows[start], pos, unit]
        np.testing.assert_array_equal(result.around[unit, rank].numpy(), expected)


def test_rows_are_drawn_evenly_whatever_their_order() -> None:
    """Each of 40 rows is among the 8 drawn ones in about a fifth of 400 draws of other starts."""
    g = torch.Generator().manual_seed(0)
    often = torch.zeros(40)
    for draw in range(400):
        values = torch.randn((40, 3, 2), generator=g)
        start = (torch.arange(40) + 40 * draw) * 256
        drawn = DrawnExamples(2, 8)
        for rows in torch.randperm(40, generator=g).split(7):
            drawn.update(values[rows], start[rows])
        found = drawn.result()
        assert torch.equal(found.start[0], found.start[1])
        row = found.start[0] // 256 - 40 * draw
        often[row] += 1
        assert torch.equal(found.values[0], values[row, :, 0].amax(1).double())
    assert abs(float(often.mean()) - 80) < 1e-6
    assert float(often.min()) > 80 - 5 * 8  # 5 standard deviations
    assert float(often.max()) < 80 + 5 * 8


@laws
@given(seen=data(), accuracy=st.sampled_from([0.3, 0.05, 0.01, 0.001]), smallest=st.sampled_from([1e-4, 1e-9, 0.5]))
def test_quantiles_are_within_the_stated_error(seen: Data, accuracy: float, smallest: float) -> None:
    sketch = Quantiles(seen.values.shape[2], accuracy, smallest)
    sketch.update(seen.values, seen.mask)
    shares = [0.0, 0.1, 0.25, 0.5, 0.66, 0.9, 1.0]
    found = sketch.result(shares).values.numpy()
    true = np.quantile(seen.table, shares, axis=0, method="lower").T
    allowed = np.where(np.abs(true) < smallest, smallest, accuracy * np.abs(true))
    assert (np.abs(found - true) <= allowed * (1 + 1e-9)).all()
    assert (np.diff(found, axis=1) >= 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("counter", "cooccurrence")])
@laws
@given(seen=data(), bad=st.sampled_from([math.nan, math.inf, -math.inf]), pick=st.data())
def test_what_is_not_finite_is_refused_and_leaves_no_trace(
    kind: str, seen: Data, bad: float, pick: st.DataObject
) -> None:
    from microtome.errors import DataError

    accumulator = fed(kind, seen)
    before = accumulator.state()
    row, pos, unit = (pick.draw(st.integers(0, length - 1)) for length in seen.values.shape)
    values = seen.values.clone()
    values[row, pos, unit] = bad
    spoiled = Data(values, seen.start, seen.mask, seen.group)
    if bool(seen.mask[row, pos]):
        with pytest.raises(DataError, match=rf"1 of \d+ values are not finite, the first in unit {unit}; got"):
            KINDS[kind][1](accumulator, spoiled)
        for name, tensor in accumulator.state().items():
            np.testing.assert_array_equal(tensor.numpy(), before[name].numpy(), name)
    else:  # padding may hold anything
        KINDS[kind][1](accumulator, spoiled)
        twice = fed(kind, seen)
        KINDS[kind][1](twice, seen)
        assert_state_equal(accumulator, twice)
