"""A Ray cluster of two nodes on this machine: what a second worker brings, and what random kills cost.

    python benchmarks/cluster.py [--tokens N] [--kills N] [--seed N] [--only speed|kills]

speed    measures of the default model over a text, by one worker of one thread and by two; tokens a second from the
         first part that came back to the last (a worker first opens the model), and in all; floor 1.7.
kills    harvests and measures of a tiny model, while workers and drivers are killed at random moments; a driver that
         died is started again. Every harvest must have the bytes of an undisturbed one, and every measure its counts.

Both are written to benchmarks/results/cluster.json, kills where there are 20 or more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests import clusters, families  # noqa: E402
from tests.harvests import TEXTS, files, made, tokenizer  # noqa: E402

import microtome as mt  # noqa: E402
from microtome.cluster import Cluster  # noqa: E402
from microtome.stream import Corpus  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "cluster.json"
TEXT = Corpus.of("t", [text for text in TEXTS for _ in range(12)])
FLOOR = 1.7
MEASURES = ("firing", "activations", "loss")
GIVEN: dict[str, Any] = {"tokens": 4_000, "length": 16, "rows": 2}


def speed(address: str, tokens: int) -> None:
    """Print what the second worker brings."""
    model = mt.open(prove=False)
    whole: dict[int, float] = {}
    rates: dict[int, float] = {}
    for workers in (1, 2):
        times: list[tuple[float, int]] = []

        def report(stage: str, done: int, everything: int, times: list[tuple[float, int]] = times) -> None:
            if stage == "reading the text" and done:
                times.append((time.perf_counter(), done))

        began = time.perf_counter()
        with mt.settings(ray=Cluster(address, workers=workers), progress=report):
            mt.measure(model, *MEASURES, tokens=tokens, rows=2)
        whole[workers] = time.perf_counter() - began
        (first, some), (last, everything) = times[0], times[-1]
        # As the first part comes back, each other worker has almost done one too.
        rates[workers] = tokens * (everything - some * workers) / everything / (last - first)
        told = f"{rates[workers]:,.0f} tokens a second, {whole[workers]:.1f} s in all"
        print(f"speed {workers} worker{'s' * (workers > 1)}: {told}", flush=True)
    ratio = rates[2] / rates[1]
    print(f"speed: ratio {ratio:.2f} (floor {FLOOR:.2f}), in all {whole[1] / whole[2]:.2f}", flush=True)
    write("speed", {"tokens_a_second": rates, "seconds_in_all": whole, "ratio": ratio, "floor": FLOOR})


def write(name: str, found: dict[str, Any]) -> None:
    """Put one part of the results in place of what it was."""
    held = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(held | {name: found}, indent=1) + "\n")


@dataclass
class Kill:
    """One kill: what was at work, who died, and when."""

    work: str
    victim: str
    seconds: float
    left: str = ""


def drive(work: str, model: str, out: str, address: str | None) -> None:
    """Harvest or measure; a driver of its own process on a cluster."""
    opened = mt.open(model, prove=False)
    with mt.settings(ray=address, progress=None):
        if work == "harvest":
            made(opened, out, text=TEXT, shard_tokens=60)
        else:
            mt.measure(opened, *MEASURES, text=TEXT, **GIVEN).to_zarr(out)


def same(work: str, out: Path, whole: Path) -> bool:
    """Whether a result is the undisturbed one: bytes of harvests, counts and float64 statistics of measures."""
    if work == "harvest":
        return files(out) == files(whole)
    found, known = xr.open_zarr(out).load(), xr.open_zarr(whole).load()
    exact = all((found[n].values == x.values).all() for n, x in known.items() if x.dtype.kind in "iu")
    close = all(
        np.allclose(found[n], x, rtol=1e-9, atol=1e-9, equal_nan=True) for n, x in known.items() if x.dtype.kind == "f"
    )
    return exact and close and set(found) == set(known)


def disturbed(work: str, saved: Path, out: Path, started: Any, draw: random.Random, most: int) -> list[Kill]:
    """One work to its end, with up to so many kills on the way."""
    address, nodes = started
    command = [sys.executable, __file__, "--driver", work, str(saved), str(out), address]
    kills: list[Kill] = []
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    name = "HarvestWorker" if work == "harvest" else "MeasureWorker"
    while True:
        wait = draw.uniform(0.3, 3.0)
        victim = draw.choice(["worker", "worker", "driver"])
        until = time.monotonic() + wait
        while time.monotonic() < until or not (actors := clusters.actors(nodes, name)):
            if child.poll() is not None:
                break
            time.sleep(0.02)
        if child.poll() is not None:
            break
        if len(kills) < most:
            kills.append(Kill(work, victim, round(wait, 2)))
            if victim == "worker":
                draw.choice(actors).kill()
            else:
                child.kill()
                child.communicate()
                child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    _, problem = child.communicate()
    if child.returncode:
        raise SystemExit(f"the driver ended with {child.returncode}: {problem.decode()[-2000:]}")
    return kills


def kills(started: Any, folder: Path, count: int, seed: int) -> None:
    """Print and write the table of kills."""
    saved, draw = folder / "tiny", random.Random(seed)
    families.build("llama-gqa").save_pretrained(saved)
    tokenizer().save_pretrained(saved)
    for work in ("harvest", "measure"):
        drive(work, str(saved), str(folder / f"{work}-whole"), None)
    table: list[Kill] = []
    for work in itertools.cycle(("harvest", "measure")):
        if len(table) >= count:
            break
        out = folder / f"{work}-{len(table)}"
        found = disturbed(work, saved, out, started, draw, min(4, count - len(table)))
        fine = same(work, out, folder / f"{work}-whole")
        for one in found:
            one.left = "as undisturbed" if fine else "ANOTHER RESULT"
            print(
                f"kill {len(table) + 1:3d}: {one.work:8s} {one.victim:7s} after {one.seconds:4.2f} s: {one.left}",
                flush=True,
            )
            table.append(one)
    drivers = sum(one.victim == "driver" for one in table)
    lost = sum(one.left != "as undisturbed" for one in table)
    print(f"kills: {len(table)} ({drivers} of drivers), {lost} with another result (0 allowed)")
    if count >= 20:
        write("kills", {"seed": seed, "kills": [asdict(one) for one in table]})
    if lost:
        raise SystemExit(1)


def main() -> None:
    """Run what was asked for on a cluster that ends with it; a driver of the kills is this file too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["speed", "kills"])
    parser.add_argument("--driver", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.driver:
        drive(*given.driver)
        return
    with tempfile.TemporaryDirectory() as name, clusters.cluster(Path(name)) as started:
        clusters.wait_for(2, started[0])
        if given.only != "kills":
            speed(started[0], given.tokens)
        if given.only != "speed":
            kills(started, Path(name), given.kills, given.seed)


if __name__ == "__main__":
    main()
