"""What exact sweeps cost beside one forward per cell with plain hooks, as ratios measured within one run.

    python benchmarks/sweeps.py [--model MODEL] [--repeats 3] [--edges] [--out benchmarks/results/sweeps.json]

    resid_pre    every layer and position of one pair, each cell equal to its plain forward to 1e-4
    sixteen      the same for 16 pairs in one sweep: milliseconds a cell
    patching     resid_pre, attn_out and mlp_out by position, and every head, of one pair
    nodes        exact effects of all senders of a 15-token pair
    edges        exact effects of all edges of that pair (with --edges: minutes)
    peer         TransformerLens' own patching of resid_pre, if `make bench-peers` made its environment

Plain hooks are timed on a sample of cells before and after every sweep, so that a slow moment falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import microtome as mt
from microtome.anatomy import default_folder

CLEAN = "The Eiffel Tower is a very famous old landmark in the city"
CORRUPT = "The Brandenburg Gate is a very famous old landmark in the city"
LONG = [
    "Then, John and Mary went to the store. John gave a drink to",
    "Then, John and Mary went to the store. Mary gave a drink to",
]
TARGETS = {
    "resid_pre_ratio": 14.0, "sixteen_over_one": 1.0, "patching_seconds": 12.0, "nodes_seconds": 15.0,
    "edges_seconds": 2400.0, "edges_gib": 6.0,
}  # fmt: skip


def hooked(model: mt.Model, tokens: torch.Tensor, source: mt.Run, layer: int, pos: int, ids: tuple[int, int]) -> float:
    """One cell as anybody would write it: a hook, a forward, and the difference of two logits."""

    def patch(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].clone()
        hidden[0, pos] = source[f"{layer}.resid_pre"][0, pos]
        return (hidden, *args[1:]), kwargs

    block = model.hf.get_submodule(model.anatomy.parts.layers[layer].block)
    handle = block.register_forward_pre_hook(patch, with_kwargs=True)
    with torch.no_grad():
        logits = model.hf(input_ids=tokens).logits[0, -1]
    handle.remove()
    return float(logits[ids[0]] - logits[ids[1]])


def resid_pre(model: mt.Model, clean: str, corrupt: str, repeats: int) -> dict[str, Any]:
    """Every layer and position of one pair, beside plain hooks on a sample of the same cells."""
    tokens = model.to_tokens(clean)
    length = tokens.shape[1]
    source = model.run(corrupt, capture="*.resid_pre")
    assert source.tokens.shape[1] == length
    ids = (int(model.to_tokens(" Paris")[0, -1]), int(model.to_tokens(" Berlin")[0, -1]))
    metric = mt.metric.LogitDifference(ids[0], foil=ids[1])
    places = [(layer, pos) for layer in range(model.anatomy.n_layers) for pos in range(length)]
    cells = [mt.edit.Patch(f"{layer}.resid_pre@{pos}", source=source) for layer, pos in places]
    sample = list(range(0, len(places), max(1, len(places) // 24)))
    model.sweep(tokens, cells[:32], metric).run()
    gap, ratios, ours, plains = 0.0, [], [], []
    for _ in range(repeats):
        started = time.perf_counter()
        swept = model.sweep(tokens, cells, metric).run()
        ours.append((time.perf_counter() - started) / len(cells))
        started = time.perf_counter()
        values = [hooked(model, tokens, source, *places[i], ids) for i in sample]
        plains.append((time.perf_counter() - started) / len(sample))
        gap = max(gap, *(abs(v - float(swept.values[i])) for v, i in zip(values, sample, strict=True)))
        ratios.append(plains[-1] / ours[-1])
    return {
        "cells": len(cells), "positions": length, "ratio": statistics.median(ratios), "gap": gap,
        "ms_a_cell": 1e3 * statistics.median(ours), "plain_ms_a_cell": 1e3 * statistics.median(plains),
        "plan": str(swept.plan),
    }  # fmt: skip


def sixteen(model: mt.Model, clean: str, corrupt: str, repeats: int) -> dict[str, Any]:
    """The same cells of sixteen pairs in one sweep, beside one pair alone."""
    cities = ["city", "town", "land", "state", "area", "zone", "place", "world"]
    cleans = [f"{clean.rpartition(' ')[0]} {word}{more}" for word in cities for more in ("", " of")]
    corrupts = [f"{corrupt.rpartition(' ')[0]} {word}{more}" for word in cities for more in ("", " of")]
    metric = mt.metric.LogitDifference(11, foil=13)

    def run(a: list[str], b: list[str]) -> float:
        batches = [model.to_batch(prompt) for prompt in b]
        cells, prompts = [], []
        for number, batch in enumerate(batches):
            source = model.run(batch.tokens, capture="*.resid_pre")
            where = [(layer, p) for layer in range(model.anatomy.n_layers) for p in range(batch.tokens.shape[1])]
            cells += [mt.edit.Patch(f"{layer}.resid_pre@{p}", source=source) for layer, p in where]
            prompts += [number] * len(where)
        started = time.perf_counter()
        model.sweep(a, cells, metric, prompts=prompts).run()
        return (time.perf_counter() - started) / len(cells)

    run(cleans[:1], corrupts[:1])
    pairs = [(run(cleans[:1], corrupts[:1]), run(cleans, corrupts)) for _ in range(repeats)]
    return {
        "one_ms_a_cell": 1e3 * statistics.median(a for a, _ in pairs),
        "sixteen_ms_a_cell": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def patching(model: mt.Model, clean: str, corrupt: str) -> dict[str, Any]:
    """Three sites by position, and every head."""
    started = time.perf_counter()
    data = mt.explain.patch(model, clean, corrupt, answer=" Paris", foil=" Berlin")
    seconds = time.perf_counter() - started
    return {"cells": sum(v.size for v in data.values()) - 2, "seconds": seconds, "positions": data.sizes["pos"]}


def graph_effects(model: mt.Model, edges: bool) -> dict[str, Any]:
    """All nodes of a 15-token pair, and all edges if asked for."""
    answers = {"answer": " Mary", "foil": " John", "direction": "noise"}
    started = time.perf_counter()
    nodes = mt.explain.node_effects(model, *LONG, **answers)
    found: dict[str, Any] = {"nodes": nodes.sizes["sender"], "nodes_seconds": time.perf_counter() - started}
    if edges:
        started = time.perf_counter()
        walked = [time.perf_counter()]

        def report(stage: str, done: int, everything: int) -> None:
            if time.perf_counter() - walked[0] > 60:
                walked[0] = time.perf_counter()
                print(f"  {done} of {everything} edges, {time.perf_counter() - started:.0f} s", flush=True)

        with mt.settings(progress=report):
            data = mt.explain.edge_effects(model, *LONG, **answers)
        found |= {"edges": int(data.attrs["measured"]), "edges_seconds": time.perf_counter() - started}
        effects = data["effect"].to_series().dropna()
        strongest = effects[effects.abs().sort_values().index[-10:]]
        found["strongest"] = {f"{sender} -> {receiver}": value for (sender, receiver), value in strongest.items()}
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def peer(tokens: int) -> dict[str, Any] | None:
    """TransformerLens' own patching of the same model, in an environment of its own; None where it is not made."""
    python, folder = Path(".venv-peers/bin/python"), default_folder()
    if not python.exists() or folder is None:
        return None
    call = [str(python), "benchmarks/peers/time_patching.py", str(folder), "--tokens", str(tokens)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--edges", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/sweeps.json")
    options = parser.parse_args()
    model = mt.open(options.model)
    found: dict[str, Any] = {"resid_pre": resid_pre(model, CLEAN, CORRUPT, options.repeats)}
    print("resid_pre", json.dumps(found["resid_pre"]))
    found["sixteen"] = sixteen(model, CLEAN, CORRUPT, options.repeats)
    print("sixteen", json.dumps(found["sixteen"]))
    found["patching"] = patching(model, CLEAN, CORRUPT)
    print("patching", json.dumps(found["patching"]))
    beside = peer(found["resid_pre"]["positions"])
    if beside is not None:
        found["transformer_lens"] = beside | {"ratio": beside["ms_a_cell"] / found["resid_pre"]["ms_a_cell"]}
        print("transformer_lens", json.dumps(found["transformer_lens"]))
    found["graph"] = graph_effects(model, options.edges)
    print("graph", json.dumps(found["graph"]))
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "python": platform.python_version()},
        "provenance": model.provenance, "repeats": options.repeats, "figures": found, "targets": TARGETS,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
