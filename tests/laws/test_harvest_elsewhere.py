"""A harvest on other file systems: an S3 endpoint that the test starts on loopback, and one in memory."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.harvests import files, killed, made, opened

import microtome as mt
from microtome.errors import DataError, OutputError
from microtome.stream import Harvest


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return opened()


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, dict[str, Any]]]:
    """A place of its own, and the options that reach it."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    options = {"key": "x", "secret": "x", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    import s3fs

    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield "s3://bucket", options
    started.stop()


def objects(place: str, options: dict[str, Any]) -> dict[str, bytes]:
    import s3fs

    system = s3fs.S3FileSystem(**options, skip_instance_cache=True)
    return {path.rpartition("/")[2]: system.cat_file(path) for path in sorted(system.ls(place))}


def test_an_object_store_holds_what_a_disk_holds(model: mt.Model, tmp_path: Path, bucket: Any) -> None:
    root, options = bucket
    made(model, tmp_path / "h")
    found = made(model, f"{root}/h", options=options)
    assert objects(f"{root}/h", options) == files(tmp_path / "h")
    near = Harvest(tmp_path / "h")
    assert torch.equal(found["1.attn.z"][:], near["1.attn.z"][:])
    assert found.index.equals(near.index)
    order = [x for x, _ in found.shuffled("1.attn.z", batch=8, buffer=32, numbers=True)]
    assert sorted(torch.cat(order).tolist()) == list(range(len(found)))
    found.verify()


@pytest.mark.slow
def test_killed_in_the_middle_on_an_object_store_it_goes_on(model: mt.Model, tmp_path: Path, bucket: Any) -> None:
    root, options = bucket
    made(model, tmp_path / "h", shard_tokens=20)
    place, draw, kills = f"{root}/killed", random.Random(1), 0
    began = time.monotonic()
    assert killed(lambda: made(model, f"{root}/timed", shard_tokens=20, options=options), after=60) == 0
    taken = time.monotonic() - began
    for _ in range(40):
        work = lambda: made(model, place, shard_tokens=20, options=options)  # noqa: E731
        code = killed(work, after=draw.uniform(0.1, 0.5) * taken)
        kills += code is None
        assert code in (0, None)
        if code == 0:
            break
    assert kills >= 2
    made(model, place, shard_tokens=20, options=options)
    assert objects(place, options) == files(tmp_path / "h")


def test_a_truncated_object_is_named(model: mt.Model, bucket: Any) -> None:
    import s3fs

    root, options = bucket
    made(model, f"{root}/cut", options=options)
    system = s3fs.S3FileSystem(**options, skip_instance_cache=True)
    data = system.cat_file("bucket/cut/shard-00001.safetensors")
    system.pipe_file("bucket/cut/shard-00001.safetensors", data[:-9])
    with pytest.raises(DataError, match=rf"shard-00001.safetensors is damaged: {len(data) - 9} of {len(data)} bytes"):
        Harvest(f"{root}/cut", options=options)


def test_a_place_that_does_not_answer_is_one_line(model: mt.Model, bucket: Any) -> None:
    root, options = bucket
    with pytest.raises(OutputError, match=r"cannot write the harvest to s3://nobucket/h/manifest.json; got .*ucket"):
        made(model, "s3://nobucket/h", options=options)
    with pytest.raises(DataError, match=r"no harvest lies in s3://bucket/absent"):
        Harvest(f"{root}/absent", options=options)


def test_a_file_system_in_memory(model: mt.Model, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    made(model, tmp_path / "h")
    found = made(model, "memory://h")
    assert torch.equal(found["1.attn.z"][:], Harvest(tmp_path / "h")["1.attn.z"][:])
    system = fsspec.filesystem("memory")
    held = {path.rpartition("/")[2]: system.cat_file(path) for path in system.ls("/h", detail=False)}
    assert held == files(tmp_path / "h")


def test_a_system_that_shows_half_a_file_gets_it_under_another_name(
    model: mt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    from microtome.stream import _store

    monkeypatch.setattr(_store, "WHOLE", ())
    seen: list[str] = []
    files_of = _store.store_of("memory://aside", None)
    assert isinstance(files_of, _store.Remote)
    put = type(files_of.files).put_file
    monkeypatch.setattr(
        type(files_of.files), "put_file", lambda self, a, b, **more: (seen.append(b), put(self, a, b, **more))[1]
    )
    made(model, "memory://aside")
    assert seen
    assert all(path.rpartition("/")[2].startswith(".") for path in seen)
    assert Harvest("memory://aside").complete
    made(model, tmp_path / "h")
    assert torch.equal(Harvest("memory://aside")["1.attn.z"][:], Harvest(tmp_path / "h")["1.attn.z"][:])
