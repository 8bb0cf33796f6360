"""What mean edge scores over many pairs cost, and how well they find the edges that matter.

python benchmarks/edges.py [--model MODEL] [--task indirect_object] [--pairs 32] [--out benchmarks/results/edges.json]

scores    all edges, on average over pairs, by EAP and by EAP-IG of 5 steps
exact     the best 1,000 edges of EAP-IG measured in every pair, with 200 random others: rank correlation and recall,
          of both methods on the same edges

Beside the time on the clock stands that of the processor, as other work may share the machine (`load`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import microtome as mt

TARGETS = {"eap-ig_seconds": 240.0, "exact_seconds": 900.0}
BEST, OTHERS = 1000, 200


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--task", default="indirect_object")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--best", type=int, default=BEST)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/edges.json"))
    options = parser.parse_args()
    model = mt.open() if options.model is None else mt.open(options.model)
    task = mt.tasks.build(options.task, model, n=options.pairs)
    length = max(len(pair.clean_tokens) for pair in task)
    found: dict[str, Any] = {
        "provenance": model.provenance, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0], "task": options.task, "pairs": options.pairs, "steps": options.steps,
        "tokens": length,
    }  # fmt: skip
    scores: dict[str, Any] = {}
    for method in ("eap", "eap-ig"):
        started, cpu = time.perf_counter(), time.process_time()
        data = mt.explain.attribute(model, task, method=method, steps=options.steps, verify=0, direction="noise")
        scores[method] = data
        seconds = time.perf_counter() - started
        own = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "gap": float(data["gap"])}
        found[method] = own | {"edges": int(data["score"].notnull().sum()), "answered": float(data["answered"])}
        print(f"{method:7} {found[method]}", flush=True)
    started, cpu = time.perf_counter(), time.process_time()
    exact = mt.explain.verify(model, scores["eap-ig"], top=options.best, others=OTHERS)
    measured = exact["score_exact"].values
    there = np.isfinite(measured)
    found["exact"] = {
        "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
        "cells": int(there.sum()) * options.pairs, "best": options.best, "others": OTHERS,
        **{name: float(exact[name][0]) for name in
           ("rank_correlation", "rank_correlation_others", "recall", "recall_random")},
    }  # fmt: skip
    for method, data in scores.items():
        values = data["score"].values
        sizes: Any = spearmanr(np.abs(values[there]), np.abs(measured[there]))
        rank = float(sizes.statistic)
        found[method]["rank_correlation_of_sizes"] = rank
        found[method]["signs_right"] = float((np.sign(values[there]) == np.sign(measured[there])).mean())
    best = {
        method: set(np.argsort(-np.nan_to_num(abs(data["score"].values)).ravel())[: options.best])
        for method, data in scores.items()
    }
    found["overlap_of_best"] = len(best["eap"] & best["eap-ig"]) / options.best
    found["targets"] = TARGETS
    print(json.dumps({k: found[k] for k in ("eap", "eap-ig", "exact", "overlap_of_best")}, indent=1))
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
