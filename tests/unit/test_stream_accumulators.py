"""What the accumulators refuse, how they are saved, and that they leave what they are given alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from microtome.errors import DataError, OutputError
from microtome.stream import (
    Accumulator,
    Cooccurrence,
    Counter,
    Covariance,
    Firing,
    Histogram,
    Moments,
    Quantiles,
    TopExamples,
    merged,
)

UNITS = 5


def activations(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, UNITS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_kind(values: torch.Tensor) -> list[Accumulator]:
    """One of each, fed with the same values."""
    moments, firing, covariance = Moments(UNITS), Firing(UNITS, torch.linspace(-1, 1, UNITS)), Covariance(UNITS)
    histogram, quantiles = Histogram.uniform(UNITS, -2.0, torch.arange(1, 6), 7), Quantiles(UNITS, 0.02)
    for accumulator in (moments, firing, covariance, histogram, quantiles):
        accumulator.update(values)
    top, counter, joint = TopExamples(UNITS, 4), Counter(("prose", "code é"), UNITS), Cooccurrence(UNITS)
    top.update(values, [8, 0, 4])
    counter.update(values > 0, torch.tensor([0, 1, 0])[:, None].expand(3, 4))
    joint.update(values > 0)
    return [moments, firing, covariance, histogram, quantiles, top, counter, joint]


def assert_equal(ours: Accumulator, theirs: Accumulator) -> None:
    first, second = ours.state(), theirs.state()
    assert type(ours) is type(theirs)
    assert first.keys() == second.keys()
    assert all(np.array_equal(tensor, second[name], equal_nan=True) for name, tensor in first.items())


# ------------------------------------------------------------------------------------------------------------ saving


def test_save_and_load_every_kind_through_any_door(tmp_path: Path) -> None:
    for accumulator in every_kind(activations()):
        path = accumulator.save(tmp_path / f"{accumulator.kind}.safetensors")
        assert_equal(Accumulator.load(path), accumulator)
        assert_equal(type(accumulator).load(str(path)), accumulator)
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob(".*"))


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path = Moments(2).merge(_fed_moments()).save(tmp_path / "moments.safetensors")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded = Moments.load(path)
        except DataError:
            continue
        assert_equal(loaded, _fed_moments())  # a space of padding, or the like: nothing was lost


def _fed_moments() -> Moments:
    moments = Moments(2)
    moments.update(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    return moments


def test_damaged_files_say_so(tmp_path: Path) -> None:
    path = _fed_moments().save(tmp_path / "moments.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 128]))
    with pytest.raises(DataError, match=r"is damaged: its checksum differs. To do: delete it and compute it again"):
        Accumulator.load(path)
    for part in (whole[:-9], whole[:20], b""):
        path.write_bytes(part)
        with pytest.raises(DataError, match=r"moments.safetensors\" is damaged \("):
            Accumulator.load(path)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no accumulator file ".*absent"'):
        Accumulator.load(tmp_path / "absent")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(DataError, match="holds no accumulator; got no metadata; allowed: microtome-accumulator-1"):
        Accumulator.load(tmp_path / "weights")
    path = _fed_moments().save(tmp_path / "moments")
    with pytest.raises(DataError, match="holds another kind of accumulator; got Moments; allowed: Firing"):
        Firing.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _fed_moments().save(tmp_path / "moments")
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot write .*moments; got No space left on device\."):
        Moments(2).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["moments"]
    with pytest.raises(OutputError, match="No such file or directory"):
        Moments(2).save(tmp_path / "no" / "folder")


def test_a_state_that_cannot_be_is_refused() -> None:
    for accumulator in every_kind(activations()):
        state = accumulator.state()
        for name in state:
            without = {other: tensor for other, tensor in state.items() if other != name}
            with pytest.raises(DataError, match=f"this state does not describe {accumulator.kind}; got"):
                type(accumulator).from_state(without)


def test_metadata_is_plain(tmp_path: Path) -> None:
    data = _fed_moments().save(tmp_path / "moments").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"].keys() == {"format", "kind", "sha256"}
    assert header["m2"]["dtype"] == "F64"


# ---------------------------------------------------------------------------------------------------------- refusals


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    moments = Moments((2, 3))
    with pytest.raises(DataError, match=r"Moments.update: values have the wrong shape; got \(4, 3\); .*\[..., 2, 3\]"):
        moments.update(torch.ones(4, 3))
    with pytest.raises(DataError, match=r"values must be real numbers; got torch.bool"):
        moments.update(torch.ones(4, 2, 3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"mask does not fit; got torch.int64 \(4,\); allowed: torch.bool \(4,\)"):
        moments.update(torch.ones(4, 2, 3), torch.ones(4, dtype=torch.int64))
    with pytest.raises(DataError, match="an accumulator needs axes of one unit or more; got"):
        Moments((2, 0))
    with pytest.raises(DataError, match=r"the threshold does not fit; got shape \(3,\); allowed: a number or \(2,\)"):
        Firing(2, torch.zeros(3))
    with pytest.raises(DataError, match="the edges do not fit, or do not increase"):
        Histogram(2, [0.0, 1.0, 1.0])
    with pytest.raises(DataError, match=r"Quantiles: settings out of range; got accuracy 1.0"):
        Quantiles(2, 1.0)


def test_the_unit_that_is_not_finite_is_named_by_its_axes() -> None:
    values = torch.zeros(4, 2, 3)
    values[3, 1, 2] = torch.nan
    with pytest.raises(DataError, match=r"1 of 24 values are not finite, the first in unit \(1, 2\); got nan"):
        Moments((2, 3)).update(values)


def test_large_finite_values_are_not_taken_for_infinite_ones() -> None:
    for dtype in (torch.float16, torch.float32):
        values = torch.full((64, 2), torch.finfo(dtype).max, dtype=dtype)
        moments = Moments(2)
        moments.update(values)
        assert moments.result().mean.tolist() == values[0].double().tolist()
        assert moments.result().variance.tolist() == [0, 0]


def test_flags_and_groups_that_do_not_fit_are_refused() -> None:
    counter = Counter(("prose", "code"), 2)
    fired = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(DataError, match=r"flags do not fit; got torch.float32 .* To do: pass values > threshold"):
        Cooccurrence(2).update(torch.ones(3, 2))
    with pytest.raises(DataError, match="a group number is out of range; got 0 to 2; allowed: 0 to 1"):
        counter.update(fired, torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match=r"group numbers do not fit; got torch.int64 \(2,\); allowed: integers \(3,\)"):
        counter.update(fired, torch.tensor([0, 1]))
    with pytest.raises(DataError, match="group names must be given, and differ"):
        Counter(("prose", "prose"), 2)
    assert counter.result().total.tolist() == [0, 0]


def test_starts_that_do_not_fit_are_refused() -> None:
    top = TopExamples(2, 3)
    for start in ([0], [0, -1], torch.tensor([0.0, 4.0])):
        with pytest.raises(DataError, match=r"the starts do not fit; got .*; allowed: 2 integers from 0"):
            top.update(torch.ones(2, 4, 2), start)
    with pytest.raises(DataError, match=r"wrong shape; got \(4, 2\); allowed: \[batch, pos, 2\]"):
        top.update(torch.ones(4, 2), [0])


def test_only_equal_settings_merge() -> None:
    pairs: list[tuple[Any, Any]] = [
        (Moments(2), Moments(3)),
        (Moments(2), Firing(2)),
        (Firing(2, 0.0), Firing(2, 0.1)),
        (TopExamples(2, 3), TopExamples(2, 4)),
        (Histogram(2, [0.0, 1.0]), Histogram(2, [0.0, 2.0])),
        (Quantiles(2, 0.01), Quantiles(2, 0.02)),
        (Counter(("a", "b"), 2), Counter(("b", "a"), 2)),
        (Covariance(2), Covariance(3)),
        (Cooccurrence(2), Cooccurrence(3)),
    ]
    for ours, theirs in pairs:
        with pytest.raises(DataError, match=f"cannot merge into {ours.kind}.*; got {theirs.kind}.*; allowed: the same"):
            ours.merge(theirs)
    with pytest.raises(DataError, match="there is nothing to merge"):
        merged([])


def test_results_of_nothing() -> None:
    for kind in (Moments, Covariance, Quantiles):
        with pytest.raises(DataError, match=f"{kind.__name__} has counted nothing"):
            kind(2).result()
    assert Firing(2).result().rate.isnan().all()
    assert TopExamples(2, 1).result().index.tolist() == [[-1], [-1]]
    with pytest.raises(DataError, match=r"a quantile is out of range; got \[1.5\]; allowed: 0 to 1"):
        _fed_quantiles().result([1.5])


def _fed_quantiles() -> Quantiles:
    quantiles = Quantiles(1)
    quantiles.update(torch.ones(1, 1))
    return quantiles


# --------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_every_dtype_is_counted_as_its_exact_values(dtype: torch.dtype) -> None:
    values = (activations() * 3).to(dtype)
    for ours, exact in zip(every_kind(values), every_kind(values.double()), strict=True):
        if not isinstance(ours, Firing):  # its threshold is rounded to the dtype
            assert_equal(ours, exact)


def test_thresholds_between_integers_and_for_each_unit() -> None:
    firing = Firing(3, torch.tensor([-0.5, 0.5, 1.0]))
    firing.update(torch.tensor([[0, 0, 1], [-1, 1, 2]]))
    assert firing.result().count.tolist() == [1, 1, 1]
    assert firing.result().rate.tolist() == [0.5, 0.5, 0.5]


def test_what_is_given_is_not_changed_and_what_is_returned_is_a_copy() -> None:
    values = activations()
    values.requires_grad_()
    before = values.detach().clone()
    for accumulator in every_kind(values):
        kept = accumulator.state()
        given = accumulator.state()
        restored = type(accumulator).from_state(given)
        for tensor in given.values():
            tensor.fill_(1)
        assert_equal(restored, accumulator)
        for tensor in [*accumulator.state().values(), *vars(accumulator.result()).values()]:
            if isinstance(tensor, torch.Tensor):
                assert not tensor.requires_grad
                tensor.fill_(1)
        assert all(np.array_equal(x, kept[name], equal_nan=True) for name, x in accumulator.state().items())
    assert torch.equal(values, before)


def test_fed_in_inference_mode_and_outside_it() -> None:
    with torch.inference_mode():
        inside = every_kind(activations() * 100)
        copies = [accumulator.copy() for accumulator in inside]
    outside = every_kind(activations(1))
    for ours, copy, other in zip(inside, copies, outside, strict=True):
        assert_equal(ours.merge(other), copy.merge(other))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = 50 + rng.standard_normal((40, 64, 257)).astype(np.float32)
    tensor = torch.from_numpy(values)  # 658,000 values: several blocks
    moments, covariance = Moments(257), Covariance(257)
    moments.update(tensor)
    covariance.update(tensor)
    table = values.reshape(-1, 257).astype(np.float64)
    np.testing.assert_allclose(moments.result().mean.numpy(), table.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.result().std.numpy(), table.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.result().mean_square.numpy(), (table**2).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(covariance.result().covariance.numpy(), np.cov(table.T, bias=True), atol=1e-13)
    np.testing.assert_allclose(covariance.result().second_moment.numpy(), table.T @ table / len(table), rtol=1e-13)
    assert torch.equal(covariance.result().covariance, covariance.result().covariance.T)
    np.testing.assert_allclose(covariance.result().correlation.numpy(), np.corrcoef(table.T), atol=1e-12)


def test_a_constant_far_from_zero_has_no_variance() -> None:
    moments = Moments(3)
    for _ in range(5):
        moments.update(torch.tensor([0.1, 1e9, -1e-9], dtype=torch.float64).expand(7, 11, 3))
    assert moments.result().variance.tolist() == [0, 0, 0]
    assert moments.result().mean.tolist() == [0.1, 1e9, -1e-9]


def test_top_examples_by_hand() -> None:
    values = torch.tensor([[1.0, 5, 5, 0], [5, 2, 0, 0], [7, 9, 8, 9]])[..., None]
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 1:] = False
    top = TopExamples(1, 4)
    top.update(values, torch.tensor([4, 8, 0]), mask)
    result = top.result()
    assert result.values.tolist() == [[7, 5, 5, -np.inf]]
    assert result.index.tolist() == [[0, 5, 8, -1]]
    assert result.start.tolist() == [[0, 4, 8, -1]]


def test_shared_and_single_units() -> None:
    scalar = Moments(())
    scalar.update(torch.tensor([1.0, 2.0, 6.0]))
    assert scalar.result().mean.item() == 3
    assert scalar.result().max.shape == ()
    histogram = Histogram.uniform(2, 0.0, torch.tensor([1.0, 10.0]), 2)
    histogram.update(torch.tensor([[0.6, 0.6], [1.0, 10.0], [-1.0, 11.0]]))
    assert histogram.result().count.tolist() == [[0, 2], [1, 1]]
    assert histogram.result().below.tolist() == [1, 0]
    assert histogram.result().above.tolist() == [0, 1]


def test_jaccard_and_rates_by_hand() -> None:
    fired = torch.tensor([[True, True, False], [True, False, False], [False, True, False], [True, True, False]])
    joint = Cooccurrence(3)
    joint.update(fired)
    assert joint.result().count.tolist() == [3, 3, 0]
    assert joint.result().jaccard[0].tolist() == [1, 0.5, 0]
    assert joint.result().jaccard[2, 2].isnan()
    counter = Counter(("prose", "code", "none"), 3)
    counter.update(fired, torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False]))
    assert counter.result().rate[:2].tolist() == [[1, 0.5, 0], [0, 1, 0]]
    assert counter.result().rate[2].isnan().all()
