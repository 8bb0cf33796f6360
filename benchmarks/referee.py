"""Which estimate of causal effects finds what exact effects and known circuits show, on the default model.

    python benchmarks/referee.py [--pairs 4] [--programs 29] [--inputs 24] [--tasks NAME,NAME] [--fresh]

Writes `benchmarks/results/referee.json`: for each estimate rank correlation and recall against exact effects with their
intervals over pairs, operations in forwards, seconds, and the areas under the ROC curve on compiled and on trained
programs. Each task is written when it is done, beside it, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import microtome as mt
from microtome.claims import referee
from microtome.files import atomic
from microtome.stream import mean_interval

OUT = Path(__file__).parent / "results" / "referee.json"
TASKS = ("indirect_object", "greater_than", "subject_verb_agreement", "induction")
OF_PAIRS = ("rank_correlation", "recall")
OF_PROGRAMS = ("auc", "auc_nodes", "auc_trained", "auc_nodes_trained")


def part(data: xr.Dataset) -> dict[str, Any]:
    """What is kept of one task, and of the programs where these were scored with it."""
    names = [str(name) for name in data["estimate"].values]
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        own = data.sel(estimate=name)
        for column in data.data_vars:
            if "estimate" in data[column].dims:
                rows[name][str(column)] = own[column].values.round(4).tolist()
        rows[name]["seconds"] = data.attrs.get(f"seconds_{name}")
    head = {key: data.attrs[key] for key in ("model", "fingerprint", "seed")}
    return head | {"programs": data["program"].values.tolist() if "program" in data.coords else [], "estimates": rows}


def merged(parts: dict[str, dict[str, Any]], tasks: list[str]) -> dict[str, dict[str, Any]]:
    """One row an estimate, of all tasks: means and intervals over all of their pairs."""
    rows = dict[str, dict[str, Any]]()
    for name in parts[list(parts)[-1]]["estimates"]:
        row: dict[str, Any] = {}
        of = [p["estimates"].get(name, {}) for p in parts.values()]
        for column in OF_PAIRS:
            values = torch.tensor([x for own in of for x in own.get(f"{column}_each", [])], dtype=torch.float64)
            ends = mean_interval(values) if len(values) else [torch.nan] * 3
            row |= {column + end: round(float(x), 4) for end, x in zip(("", "_lo", "_hi"), ends, strict=True)}
        for column in ("recall_random", "cost", "seconds"):
            values = [own[column] for own in of if own.get(column) is not None]
            row[column] = round(float(np.mean(values)), 4) if values else None
        row["by_task"] = {task: parts[task]["estimates"].get(name, {}).get("by_task", [torch.nan])[0] for task in tasks}
        for own in of:
            columns = [f"{c}{end}" for c in OF_PROGRAMS for end in ("", "_lo", "_hi")]
            row |= {c: own[c] for c in (*columns, "perfect", "by_program", "by_program_nodes") if c in own}
        rows[name] = row
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--programs", type=int, default=29)
    parser.add_argument("--inputs", type=int, default=24)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--fresh", action="store_true", help="measure tasks again that are written already")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    model, tasks = mt.open(), given.tasks.split(",")
    asked = {"pairs": given.pairs, "fingerprint": model.fingerprint}
    beside = given.out.with_suffix(".partial.json")
    held: dict[str, Any] = json.loads(beside.read_text()) if beside.exists() and not given.fresh else {}
    parts: dict[str, Any] = held.get("parts", {}) if held.get("asked") == asked else {}
    last = f"{given.programs} programs of {given.inputs} inputs"
    for name in (*tasks, last):
        if name in parts:
            continue
        started = time.perf_counter()
        if name == last:
            data = referee(model, of=(), programs=given.programs, inputs=given.inputs)
        else:
            data = referee(model, of=(name,), pairs=given.pairs, programs=0, trained=0)
        parts[name] = part(data) | {"seconds": round(time.perf_counter() - started, 1)}
        print(f"{name}: {parts[name]['seconds']} s", flush=True)
        with atomic(beside, "parts of a benchmark to") as partial:
            partial.write_text(json.dumps({"asked": asked, "parts": parts}) + "\n")
    parts = {name: parts[name] for name in (*tasks, last)}
    rows = merged(parts, tasks)
    for name, row in rows.items():
        shown = "  ".join(f"{v} {row.get(v)}" for v in (*OF_PAIRS, "cost", *OF_PROGRAMS, "perfect"))
        print(f"{name:18} {shown}")
    report = {
        **{key: parts[last][key] for key in ("model", "fingerprint", "seed", "programs")}, "pairs": given.pairs,
        "inputs": given.inputs, "tasks": tasks, "seconds": round(sum(p["seconds"] for p in parts.values()), 1),
        "estimates": rows,
    }  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    beside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
