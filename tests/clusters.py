"""A Ray cluster of several nodes on this machine, and what its actors do in tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from microtome.cluster import Worker
from microtome.errors import DataError, error

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1"}


class Squares(Worker):
    """Squares numbers; told to, it dies once at an item, or always, or raises."""

    def start(self, folder: str) -> None:
        self.folder = Path(folder)

    def work(self, number: int, how: str = "") -> tuple[int, int]:
        mark = self.folder / f"died-{number}"
        if how == "die always" or (how == "die once" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise error(DataError, f"number {number} is bad", do="leave it out")
        time.sleep(0.01)
        return number * number, os.getpid()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _node(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    ray = Path(sys.executable).with_name("ray")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [str(ray), "start", "--block", "--num-cpus=1", "--object-store-memory=80000000", *arguments]
    log = (folder / f"node-{len(list(folder.glob('node-*')))}").open("wb")
    return subprocess.Popen(
        command, stdout=log, stderr=log, env=os.environ | QUIET | {"PYTHONPATH": paths}, start_new_session=True
    )


@contextmanager
def cluster(folder: Path, nodes: int = 2) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """The address of a cluster of nodes of one CPU each, and their processes; they end with the block."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    head = ("--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false")
    started = [_node(*head, folder=folder)]
    try:
        _wait(address)
        for _ in range(1, nodes):
            joining = (f"--address={address}", "--node-ip-address=127.0.0.1")
            started += [_node(*joining, folder=folder)]
        yield address, started
    finally:
        for process in reversed(started):
            end(process)


def _wait(address: str) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        time.sleep(0.2)
    raise TimeoutError("the head of the cluster has not started")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started, those alone."""
    family = below(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    if process.poll() is None:
        process.kill()
    process.wait()


def below(pid: int) -> list[psutil.Process]:
    """The processes that one has started, and those that they have."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def actors(started: list[subprocess.Popen[bytes]], name: str) -> list[psutil.Process]:
    """The processes of actors of a class, on nodes that were started here."""
    found: list[psutil.Process] = []
    for node in started:
        for one in below(node.pid):
            with suppress(psutil.Error):
                if any(f"ray::{name}" in part for part in one.cmdline()):
                    found.append(one)
    return found


def wait_for(nodes: int, address: str) -> None:
    """Wait until a cluster has so many nodes."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    try:
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) < nodes:
            if time.monotonic() > deadline:
                raise TimeoutError("a node has not joined")
            time.sleep(0.2)
    finally:
        ray.shutdown()


def seen(results: list[tuple[Any, Any]]) -> set[int]:
    """The processes that gave results."""
    return {pid for _, (_, pid) in results}
