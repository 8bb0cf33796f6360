"""Parts of a pass on disk are found again by the same work alone, and never where they are damaged."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from microtome.errors import DataError
from microtome.method import _parts
from microtome.method._parts import Found, Parts
from microtome.stream import Counter, Moments, TokenBatch, load_accumulators, save_accumulators

WORK = ("fingerprint", [("loss", {"top": 3}, [0, 1])], None, 0)
MODULES = ["microtome.measurements._loss", "microtome.measurements._stream"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def moments(of: float) -> Moments:
    made = Moments((2,))
    made.update(torch.tensor([[of, 1.0], [2.0, 5.0]]))
    return made


def batch(first: int = 1) -> TokenBatch:
    return TokenBatch.of(torch.tensor([[first, 2, 3], [4, 5, 6]]))


def kept() -> Found:
    return [{(None, 0): {"a/b": moments(3.0)}, (2, None): {"c": moments(7.0)}}, {}]


def same(a: Found, b: Found) -> None:
    assert [set(one) for one in a] == [set(one) for one in b]
    for mine, theirs in zip(a, b, strict=True):
        for place, held in mine.items():
            assert held.keys() == theirs[place].keys()
            for name, one in held.items():
                state, other = one.state(), theirs[place][name].state()
                assert state.keys() == other.keys()
                assert all(torch.equal(state[key], other[key]) for key in state)


def test_what_is_written_is_read_by_the_same_work() -> None:
    Parts(WORK, MODULES).write(3, [batch()], kept())
    found = Parts(WORK, MODULES).read(3, [batch()])
    assert found is not None
    same(found, kept())


def test_other_work_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Parts(WORK, MODULES).write(3, [batch()], kept())
    assert Parts(WORK, MODULES).read(4, [batch()]) is None
    assert Parts(WORK, MODULES).read(3, [batch(9)]) is None
    assert Parts(WORK, MODULES).read(3, [batch(), batch()]) is None
    assert Parts((*WORK, 1), MODULES).read(3, [batch()]) is None
    monkeypatch.setattr(_parts, "_source", lambda name: name.encode())
    assert Parts(WORK, MODULES).read(3, [batch()]) is None


def test_a_changed_file_of_the_package_of_a_measure_is_other_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__init__", "_m", "_stats"):
        (tmp_path / "plugged").mkdir(exist_ok=True)
        (tmp_path / "plugged" / f"{name}.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("plugged._m")
    Parts(WORK, ["plugged._m"]).write(0, [batch()], kept()[:1])
    assert Parts(WORK, ["plugged._m"]).read(0, [batch()]) is not None
    (tmp_path / "plugged" / "_stats.py").write_text("x = 2")
    assert Parts(WORK, ["plugged._m"]).read(0, [batch()]) is None
    monkeypatch.delitem(sys.modules, "plugged")
    monkeypatch.delitem(sys.modules, "plugged._m")


def test_other_versions_and_large_parts(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Parts(WORK, MODULES).write(0, [batch()], kept())
    with monkeypatch.context() as patched:
        patched.setattr(_parts, "version", lambda name: f"{name} 9")
        assert Parts(WORK, MODULES).read(0, [batch()]) is None
    monkeypatch.setattr(_parts, "LARGEST", 8)
    Parts(WORK, MODULES).write(1, [batch()], kept())
    assert Parts(WORK, MODULES).read(1, [batch()]) is None
    assert Parts(WORK, MODULES).read(0, [batch()]) is not None


def test_documents_and_groups_of_the_tokens_count() -> None:
    other = batch()
    other.group[0, 0] = 1
    Parts(WORK, MODULES).write(0, [batch()], kept())
    assert Parts(WORK, MODULES).read(0, [other]) is None


def test_a_damaged_part_is_done_again(own_cache: Path) -> None:
    parts = Parts(WORK, MODULES)
    parts.write(0, [batch()], kept())
    [file] = own_cache.rglob("*.safetensors")
    whole = file.read_bytes()
    for bad in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(bad)
        assert parts.read(0, [batch()]) is None
    file.write_bytes(whole)
    assert parts.read(0, [batch()]) is not None
    parts.clear()
    assert not list(own_cache.rglob("*.safetensors"))


def test_work_that_cannot_be_told_from_other_work_is_not_kept(own_cache: Path) -> None:
    Parts((*WORK, torch.zeros(3)), MODULES).write(0, [batch()], kept())
    assert not list(own_cache.rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written_stops_nothing(own_cache: Path) -> None:
    own_cache.write_text("a file")
    parts = Parts(WORK, MODULES)
    parts.write(0, [batch()], kept())
    assert parts.read(0, [batch()]) is None


def test_accumulators_of_one_file(tmp_path: Path) -> None:
    counter = Counter(("one", "two"), 4)
    held = {"x": moments(1.0), "y": counter, "x.y/z": moments(2.0)}
    found = load_accumulators(save_accumulators(held, tmp_path / "held.safetensors"))
    assert list(found) == list(held)
    assert isinstance(found["y"], Counter)
    for name, one in held.items():
        assert all(torch.equal(x, found[name].state()[key]) for key, x in one.state().items())
    assert load_accumulators(save_accumulators({}, tmp_path / "none.safetensors")) == {}
    moments(1.0).save(tmp_path / "one.safetensors")
    for name in ("one", "missing"):
        with pytest.raises(DataError, match="is damaged"):
            load_accumulators(tmp_path / f"{name}.safetensors")


def test_a_single_value_of_any_stride_is_kept(tmp_path: Path) -> None:
    made = Moments((1,))
    made.update(torch.arange(8.0).view(4, 2)[:, 1:])
    strided = torch.arange(8.0, dtype=torch.float64).view(4, 2)[:1, 1]
    made._offset = strided  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    assert strided.is_contiguous()
    assert strided.stride() == (2,)
    made.save(tmp_path / "one.safetensors")
    found = Moments.load(tmp_path / "one.safetensors")
    assert found.result().mean.item() == made.result().mean.item()
