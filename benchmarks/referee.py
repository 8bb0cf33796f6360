"""Which estimate of causal effects finds what exact effects and known circuits show, on the default model.

    python benchmarks/referee.py [--pairs 4] [--programs 29] [--inputs 24] [--tasks NAME,NAME]

Writes `benchmarks/results/referee.json`: for each estimate rank correlation and recall against exact effects with their
intervals over pairs, operations in forwards, seconds, and the area under the ROC curve on compiled programs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import microtome as mt
from microtome.claims import referee

OUT = Path(__file__).parent / "results" / "referee.json"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--programs", type=int, default=29)
    parser.add_argument("--inputs", type=int, default=24)
    parser.add_argument("--tasks", default="")
    given = parser.parse_args()
    more = {"of": tuple(given.tasks.split(","))} if given.tasks else {}
    started, model = time.perf_counter(), mt.open()
    found = referee(model, pairs=given.pairs, programs=given.programs, inputs=given.inputs, **more)
    names = [str(name) for name in found["estimate"].values]
    plain = [str(v) for v in found.data_vars if not str(v).endswith("_each")]
    rows = {
        name: {v: found[v].sel(estimate=name).values.round(4).tolist() for v in plain} for name in names
    }  # a task's and a program's values in the order of their names
    for name, row in rows.items():
        shown = "  ".join(f"{v} {row[v]}" for v in ("rank_correlation", "recall", "cost", "auc", "perfect"))
        print(f"{name:16} {shown}")
    for name in names:
        rows[name]["seconds"] = found.attrs.get(f"seconds_{name}")
    report = {
        "model": found.attrs["model"], "fingerprint": found.attrs["fingerprint"], "seed": found.attrs["seed"],
        "pairs": given.pairs, "inputs": given.inputs, "tasks": found["task"].values.tolist(),
        "programs": found["program"].values.tolist(), "seconds": round(time.perf_counter() - started, 1),
        "estimates": rows,
    }  # fmt: skip
    OUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
