"""How quickly the pages of an atlas open in a browser, for the default model and for a million neurons.

    python benchmarks/pages.py [--atlas FOLDER] [--rounds N] [--skip-million]

Each page is opened from disk in a Chromium without a window, in a new browser each time. Milliseconds from the start of
the navigation until its heading and first figures or tables have been laid out and painted: the median over rounds and
the least; and CPU time of the page's thread until all of it was drawn, which other work on the machine lengthens less.
Bounds: the first page 1,000 ms, a neuron's page 300 ms.

default    the atlas in FOLDER, or one that `microtome atlas --quick` makes.
million    the same tables drawn anew: 64 layers of 32 heads and 16,384 neurons, whose rows are rows of that atlas,
           written by the same writer; lists of neurons (examples, histograms) in the opened layer alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.browser.conftest import NAMES
from tests.browser.tab import Tab

import microtome as mt
from microtome.atlas._kinds import for_pages
from microtome.view import Passage, Patterns, write_pages

RESULTS = Path(__file__).parent / "results" / "pages.json"
BOUNDS = {"first page": 1000, "neuron": 300}
LAYERS, HEADS, NEURONS = 64, 32, 16_384
OPENED = (31, 12_345)
"""The layer and the neuron of the million whose pages are opened."""

WATCH = """(() => {
  const told = (_, watcher) => {
    if (!document.querySelector("main h1")) return;
    watcher.disconnect();
    requestAnimationFrame(() => {
      const after = new MessageChannel(); // its message comes when the frame has been drawn
      after.port1.onmessage = () => { window.drawnAt = performance.now(); };
      after.port2.postMessage(0);
    });
  };
  new MutationObserver(told).observe(document, { childList: true, subtree: true });
})()"""
"""Told to every page before its own scripts: when a page with a heading was painted, since the navigation began."""


def milliseconds(browser: str, page: Path, route: str) -> tuple[float, float]:
    """Of one opening: wall time until it was painted, and what the page's thread computed until all of it was drawn."""
    tab = Tab(browser)
    try:
        tab.call("Performance.setTimeDomain", timeDomain="threadTicks")
        tab.call("Performance.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        tab.open(page, route)
        deadline = time.monotonic() + 60
        while tab.eval("window.drawnAt ?? null") is None or tab.eval("document.querySelector('[aria-busy]') !== null"):
            assert time.monotonic() < deadline, "the page was not drawn"
        assert tab.complaints == [], tab.complaints
        told = {one["name"]: one["value"] for one in tab.call("Performance.getMetrics")["metrics"]}
        return tab.eval("window.drawnAt"), 1000 * told["TaskDuration"]
    finally:
        tab.close()


def opened(browser: str, index: Path, layer: int, neuron: int, rounds: int) -> dict[str, Any]:
    """The pages of an atlas: the median of each, all rounds, and what each loads."""
    routes = {
        "first page": "",
        "neuron": f"#/neuron/{layer}.{neuron}",
        "head": f"#/head/{layer}.1",
        "layer": f"#/layer/{layer}",
    }
    found: dict[str, Any] = {}
    for name, route in routes.items():
        times = [milliseconds(browser, index, route) for _ in range(rounds)]
        painted = [round(first, 1) for first, _ in times]
        computed = round(statistics.median(cpu for _, cpu in times), 1)
        found[name] = {"ms": round(statistics.median(painted), 1), "cpu": computed, "rounds": painted}
        found[name] |= {"bound": BOUNDS[name]} if name in BOUNDS else {}
    return found


def million(source: Path, folder: Path) -> dict[str, Any]:
    """Write the pages of a model of a million neurons, with rows of another atlas; seconds and bytes."""
    manifest: dict[str, Any] = json.loads((source / "manifest.json").read_text())
    g = np.random.default_rng(0)
    sizes = {"layers": (LAYERS,), "heads": (LAYERS, HEADS), "neurons": (LAYERS, NEURONS)}
    tables = {name: drawn(pq.read_table(source / f"{name}.parquet"), size, g) for name, size in sizes.items()}
    model = mt.open()
    vocab = model.to_words(list(range(model.anatomy.d_vocab)))
    words = pq.read_table(source / "text.parquet").column("word").to_pylist()
    told, shown = for_pages(manifest | {"model": manifest["model"] | {"name": "a million neurons"}}, tables)
    tokens = tuple(words[:28])
    weights = np.tril(g.random((HEADS, len(tokens), len(tokens))) ** 4)
    pattern = weights / weights.sum(-1, keepdims=True)
    patterns = Patterns((Passage("English", "", tokens),), {i: [pattern] for i in range(LAYERS)}, {})
    started = time.perf_counter()
    write_pages(folder, told, shown, words, vocab, patterns=patterns)
    seconds = round(time.perf_counter() - started, 1)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"neurons": LAYERS * NEURONS, "seconds": seconds, "bytes": size}


def drawn(table: pa.Table, size: tuple[int, ...], g: np.random.Generator) -> pa.Table:
    """As many rows as units of these sizes, drawn from those of a table, under the names of these units.

    Lists (examples, histograms, tokens) are in the rows of the opened layer alone: a page loads a slice of them, and
    writing them for all layers takes ten times as long and 7 GB of memory for the same pages.
    """
    rows = int(np.prod(size))
    chosen = np.sort(g.integers(0, table.num_rows, rows))
    names = dict(
        zip(("layer", table.column_names[1]), np.indices(size).reshape(len(size), -1).astype(np.int32), strict=False)
    )
    here = pa.array(chosen, mask=names["layer"] != OPENED[0])
    columns = [
        pa.chunked_array([names[field.name]]) if field.name in names
        else column.take(here if pa.types.is_list(field.type) else pa.array(chosen))
        for field, column in zip(table.schema, table.columns, strict=True)
    ]  # fmt: skip
    return pa.table(columns, schema=table.schema)


def report(found: dict[str, Any]) -> Table:
    """All figures as one table."""
    heads = [f"{name}, {what}" for name in found["pages"] for what in ("ms", "least", "CPU")]
    table = Table("page", *heads, "bound, ms", box=None)
    for page in next(iter(found["pages"].values())):
        each = [(of[page]["ms"], min(of[page]["rounds"]), of[page]["cpu"]) for of in found["pages"].values()]
        columns = [f"{value:.0f}" for values in each for value in values]
        table.add_row(page, *columns, str(BOUNDS.get(page, "")))
    return table


def main() -> None:
    """Measure, print one table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atlas", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-million", action="store_true")
    given = parser.parse_args()
    browser = next(path for name in NAMES if (path := shutil.which(name)))
    found: dict[str, Any] = {"cores": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()], "pages": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = given.atlas or Path(folder) / "atlas"
        if given.atlas is None:
            command = [sys.executable, "-m", "microtome", "atlas", "--quick", "-o", str(source)]
            subprocess.run(command, check=True, capture_output=True)
        found["pages"]["default"] = opened(browser, source / "index.html", 12, 431, given.rounds)
        if not given.skip_million:
            found["million"] = million(source, Path(folder) / "million")
            index = Path(folder) / "million" / "index.html"
            found["pages"]["million"] = opened(browser, index, *OPENED, given.rounds)
    Console().print(report(found))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
