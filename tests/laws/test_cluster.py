"""Every item comes back once, whatever dies; what a cluster harvests is what one process does, byte for byte."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import clusters
from tests.harvests import TEXTS, files, made, tokenizer

import microtome as mt
from microtome.cluster import Cluster, spread
from microtome.errors import ArgumentError, DataError, ModelError, OutputError
from microtome.method import _feed
from microtome.stream import Corpus

TEXT = Corpus.of("t", [text for text in TEXTS for _ in range(6)])
DRIVER = """
import sys
import microtome as mt
from tests.harvests import made
from tests.laws.test_cluster import TEXT
with mt.settings(ray=sys.argv[3]):
    made(mt.open(sys.argv[1], prove=False), sys.argv[2], text=TEXT, shard_tokens=20)
"""


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def gone(name: str) -> Any:
        if name == "ray":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(ArgumentError, match=r'needs the package ray, which is not here. To do: pip install "microtome'):
        next(spread(Cluster(), clusters.Squares, (), []))


@pytest.mark.parametrize(
    "address", [f"127.0.0.1:{clusters.free_port()}", "nowhere", "host:port"], ids=["closed", "no port", "no number"]
)
def test_an_address_that_does_not_answer_is_one_line(address: str) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    with pytest.raises(ArgumentError, match=f'no Ray cluster answers at "{address}"; got .*To do: start one') as told:
        next(spread(Cluster(address), clusters.Squares, (), []))
    assert "\n" not in str(told.value)
    with pytest.raises(ArgumentError, match="workers is too small for a cluster; got 0"):
        Cluster(address, workers=0)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    pytest.importorskip("ray", reason="ray is not installed")
    with clusters.cluster(tmp_path_factory.mktemp("nodes")) as (address, started):
        clusters.wait_for(2, address)
        yield address, started


pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of ray's own sockets
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.mark.slow
def test_every_item_comes_back_once_whatever_dies(nodes: Any, tmp_path: Path) -> None:
    address, _ = nodes
    how = {3: "die once", 11: "die once", 12: "die once", 39: "die once"}
    items = [(number, (number, how.get(number, ""))) for number in range(40)]
    found = list(spread(Cluster(address), clusters.Squares, (str(tmp_path),), items))
    assert sorted(key for key, _ in found) == list(range(40))
    assert all(square == key * key for key, (square, _) in found)
    assert len(clusters.seen(found)) >= 2


@pytest.mark.slow
def test_what_an_item_raises_is_raised_here(nodes: Any, tmp_path: Path) -> None:
    address, _ = nodes
    items = [(number, (number, "raise" if number == 5 else "")) for number in range(9)]
    with pytest.raises(DataError, match=r"^number 5 is bad. To do: leave it out.$"):
        list(spread(Cluster(address), clusters.Squares, (str(tmp_path),), items))
    items = [(7, (7, "die always"))]
    with pytest.raises(OutputError, match=r"4 workers died at item 7; got .*To do: look at the logs"):
        list(spread(Cluster(address, workers=1), clusters.Squares, (str(tmp_path),), items))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import families

    folder = tmp_path_factory.mktemp("model") / "tiny"
    families.build("llama-gqa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_cluster_harvests_what_one_process_does(
    nodes: Any, saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, started = nodes
    model = mt.open(str(saved), prove=False)
    made(model, tmp_path / "one", text=TEXT, shard_tokens=20)
    killed: list[int] = []

    def report(stage: str, done: int, everything: int) -> None:
        shards = len(list((tmp_path / "many").glob("shard-*.json")))
        if shards >= 5 * (1 + len(killed)) and len(killed) < 3:
            for process in clusters.actors(started, "HarvestWorker")[:1]:
                process.kill()
                killed.append(process.pid)

    with mt.settings(progress=report, ray=address):
        made(model, tmp_path / "many", text=TEXT, shard_tokens=20)
    assert len(killed) == 3
    assert not capfd.readouterr().out  # what Ray says of it is no result
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.slow
def test_a_driver_that_was_killed_goes_on(nodes: Any, saved: Path, tmp_path: Path) -> None:
    address, _ = nodes
    made(mt.open(str(saved), prove=False), tmp_path / "one", text=TEXT, shard_tokens=20)
    out = tmp_path / "many"
    paths = os.pathsep.join([str(clusters.ROOT / "src"), str(clusters.ROOT)])
    environment = os.environ | clusters.QUIET | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", DRIVER, str(saved), str(out), address]
    for most in (4, 12):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while len(list(out.glob("shard-*.json"))) < most and child.poll() is None:
            time.sleep(0.02)
        child.kill()
        child.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert len(kept) >= 12
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(tmp_path / "one")
    later = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert {name: later[name] for name in kept} == kept


@pytest.mark.slow
def test_a_cluster_measures_what_one_process_does(nodes: Any, saved: Path, tmp_path: Path) -> None:
    address, started = nodes
    model, names = mt.open(str(saved), prove=False), ("firing", "activations", "induction", "loss", "kurtosis")
    given: dict[str, Any] = {"text": TEXT, "tokens": 2_000, "length": 16, "groups": True, "period": 12}
    one = mt.measure(model, *names, **given)
    killed: list[int] = []

    def report(stage: str, done: int, everything: int) -> None:
        if stage == "reading the text" and done > everything / 4 and not killed:
            for process in clusters.actors(started, "MeasureWorker")[:1]:
                process.kill()
                killed.append(process.pid)

    with mt.settings(progress=report, ray=address):
        many = mt.measure(model, *names, **given)
    assert killed
    assert set(many) == set(one)
    for name, values in one.items():
        if values.dtype.kind in "iu":
            assert (many[name].values == values.values).all(), name
        else:
            np.testing.assert_allclose(many[name].values, values.values, rtol=1e-9, atol=1e-9, err_msg=str(name))


MEASURING = """
import sys
import microtome as mt
from tests.laws.test_cluster import MEASURED, TEXT
with mt.settings(ray=sys.argv[2]):
    mt.measure(mt.open(sys.argv[1], prove=False), "firing", "loss", text=TEXT, **MEASURED)
"""
MEASURED: dict[str, Any] = {"tokens": 2_000, "length": 16}


@pytest.mark.slow
def test_a_driver_of_measures_that_was_killed_goes_on(
    nodes: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = nodes
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path / "cache"))
    model = mt.open(str(saved), prove=False)
    one = mt.measure(model, "firing", "loss", text=TEXT, **MEASURED)
    paths = os.pathsep.join([str(clusters.ROOT / "src"), str(clusters.ROOT)])
    environment = os.environ | clusters.QUIET | {"PYTHONPATH": paths}
    child = subprocess.Popen(
        [sys.executable, "-c", MEASURING, str(saved), address], env=environment, stderr=subprocess.DEVNULL
    )
    while len(list(tmp_path.glob("cache/parts/*/*.safetensors"))) < 5 and child.poll() is None:
        time.sleep(0.005)
    child.kill()
    child.wait()
    kept = [int(path.name.partition("-")[0]) for path in tmp_path.glob("cache/parts/*/*.safetensors")]
    assert len(kept) >= 5
    handed: list[int] = []

    def counted(cluster: Any, kind: Any, arguments: Any, items: Any) -> Any:
        return spread(cluster, kind, arguments, (handed.append(item[0]) or item for item in items))

    monkeypatch.setattr(_feed, "spread", counted)
    with mt.settings(ray=address):
        many = mt.measure(model, "firing", "loss", text=TEXT, **MEASURED)
    assert handed
    assert sorted([*handed, *kept]) == list(range(len(handed) + len(kept)))
    for name, values in one.items():
        np.testing.assert_allclose(many[name].values, values.values, rtol=1e-9, atol=1e-9, err_msg=str(name))
    assert not list(tmp_path.glob("cache/parts/*"))


@pytest.mark.slow
def test_a_model_that_workers_cannot_open(nodes: Any, saved: Path, tmp_path: Path) -> None:
    address, _ = nodes
    model = mt.open(str(saved), prove=False)
    with torch.no_grad():
        next(model.hf.parameters()).add_(1.0)
    with mt.settings(ray=address):
        with pytest.raises(ModelError, match=r"a worker opened another model as .*; got [0-9a-f]{16}; allowed: "):
            made(model, tmp_path / "h")
        model.hf.config.name_or_path = ""
        with pytest.raises(ModelError, match="workers cannot open a model that was made in memory"):
            made(model, tmp_path / "h")
