"""How well gradients predict exact patching on the default model: correlations by site and method, over many pairs.

    python benchmarks/attribution.py [--model MODEL] [--cost] [--out results.json]

Both methods score every layer and position (and head) of every pair, from the first position on where its prompts
differ; every one of these is also measured exactly. The correlation of the two is taken within each pair, and its mean
over pairs is given with the interval of `mt.stream.mean_interval`: Pearson's, Pearson's without the one cell of the
largest exact effect, and that of ranks. RelP - AtP is taken in the same pairs: an interval without 0 is a difference.
As a control, AtP's scores of each pair are compared with the exact effects of the next one of its task.

--cost prints only what the methods cost, in forwards, and contributions beside the plain forward of their prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy import ndarray
from scipy.stats import spearmanr

import microtome as mt
from microtome.stream import mean_interval

SITES = ("resid_pre", "attn_out", "mlp_out", "attn.z[head]")

# One token each where the prompts differ, and one token an answer.
FACTS = [
    ("The capital of {} is", ("France", "Paris"), ("Italy", "Rome")),
    ("The capital of {} is", ("Germany", "Berlin"), ("Spain", "Madrid")),
    ("The capital of {} is", ("Japan", "Tokyo"), ("China", "Beijing")),
    ("The capital of {} is", ("Egypt", "Cairo"), ("Greece", "Athens")),
    ("People in {} mostly speak", ("France", "French"), ("Germany", "German")),
    ("People in {} mostly speak", ("Spain", "Spanish"), ("Italy", "Italian")),
    ("The day after {} is", ("Monday", "Tuesday"), ("Thursday", "Friday")),
    ("The opposite of {} is", ("hot", "cold"), ("big", "small")),
]
GIVING = "When {} and {} went to the store, {} gave a drink to"
NAMES = [("Mary", "John"), ("Tom", "Anna"), ("Sarah", "James"), ("David", "Emma"), ("Peter", "Alice"), ("Jane", "Paul")]


def pairs() -> dict[str, list[tuple[str, str, str, str]]]:
    """Clean prompt, corrupt prompt, answer and foil, by task."""
    facts = [(text.format(a), text.format(b), f" {x}", f" {y}") for text, (a, x), (b, y) in FACTS]
    # Who gives is swapped: the answer is the other one.
    giving = [(GIVING.format(a, b, b), GIVING.format(a, b, a), f" {a}", f" {b}") for a, b in NAMES]
    return {"facts": facts, "indirect object": giving}


def pearson(a: ndarray, b: ndarray) -> float:
    """Pearson correlation over all cells of a pair."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def without_largest(a: ndarray, b: ndarray) -> float:
    """Pearson correlation over all cells of a pair but the one of the largest exact effect."""
    rest = np.arange(b.size) != np.abs(b).argmax()
    return pearson(a.ravel()[rest], b.ravel()[rest])


def spearman(a: ndarray, b: ndarray) -> float:
    """Rank correlation over all cells of a pair."""
    return float(spearmanr(a.ravel(), b.ravel()).statistic)


def interval(values: list[float]) -> tuple[float, ...]:
    """Mean, and the ends of its 95 % interval."""
    return tuple(float(x) for x in mean_interval(torch.tensor(values, dtype=torch.float64)))


def measure(model: mt.Model, pair: tuple[str, str, str, str]) -> dict[str, xr.Dataset]:
    """Scores by method, and the exact effects, all in logits."""
    clean, corrupt, answer, foil = pair
    exact = mt.explain.patch(model, clean, corrupt, answer=answer, foil=foil, direction="noise")
    given: dict[str, Any] = {"answer": answer, "foil": foil, "direction": "noise", "verify": 0}
    found = {m: mt.explain.attribute(model, clean, corrupt, method=m, **given) for m in ("atp", "relp")}
    found["exact"] = exact[list(SITES)] * (exact["corrupt"] - exact["clean"])
    # Before the first difference all effects are 0, which every method knows: these positions are left out.
    first = int((exact["clean_token"].values != exact["corrupt_token"].values).argmax())
    return {name: data.isel(pos=slice(first, None)) for name, data in found.items()}


def table(task: str, measured: list[dict[str, xr.Dataset]]) -> list[dict[str, object]]:
    """One row per site and measure."""
    rows: list[dict[str, object]] = []
    for site in SITES:
        for name, correlation in (("pearson", pearson), ("- largest", without_largest), ("rank", spearman)):
            values = {
                m: [correlation(d[m][site].values, d["exact"][site].values) for d in measured] for m in ("atp", "relp")
            }
            gain = [b - a for a, b in zip(values["atp"], values["relp"], strict=True)]
            same = [(a, b) for a, b in pairwise(measured) if a["atp"][site].shape == b["exact"][site].shape]
            control = [correlation(a["atp"][site].values, b["exact"][site].values) for a, b in same]
            row: dict[str, object] = {"task": task, "site": site, "measure": name, "pairs": len(measured)}
            row |= {"atp": interval(values["atp"]), "relp": interval(values["relp"]), "gain": interval(gain)}
            rows.append(row | {"control": float(np.mean(control)) if control else None})
    return rows


def costs(model: mt.Model, repeats: int = 5) -> dict[str, float]:
    """Seconds of one forward, and of each method in forwards, medians."""
    clean, corrupt, answer, foil = pairs()["indirect object"][0]
    calls = {
        "forward": lambda: model.run(clean),
        **{
            m: (lambda m=m: mt.explain.attribute(model, clean, corrupt, answer=answer, foil=foil, method=m, verify=0))
            for m in ("atp", "relp", "eap")
        },
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(x)) for name, x in taken.items()}
    return {name: x / (1 if name == "forward" else medians["forward"]) for name, x in medians.items()}


def contributions_cost(model: mt.Model, repeats: int = 15) -> tuple[float, float]:
    """Contributions of a short prompt beside the plain forward that they need: median ratios of wall and CPU time."""
    prompt = "The capital of France is"
    ids = model.to_tokens(prompt)

    def plain() -> None:
        with torch.no_grad():
            model.hf(ids)

    def ours() -> None:
        mt.explain.contributions(model, prompt, answer=" Paris", foil=" Rome")

    plain(), ours()
    taken: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for _ in range(repeats):
        for name, call in (("plain", plain), ("ours", ours)):
            started, before = time.perf_counter(), time.process_time()
            call()
            taken[name].append((time.perf_counter() - started, time.process_time() - before))
    wall, cpu = np.median(np.array(taken["ours"]) / np.array(taken["plain"]), axis=0).tolist()
    return wall, cpu


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    model = mt.open() if arguments.model is None else mt.open(arguments.model)
    cost = costs(model)
    in_forwards = ", ".join(f"{m} {cost[m]:.1f}" for m in ("atp", "relp", "eap"))
    print(f"a forward of 14 tokens takes {cost['forward'] * 1e3:.0f} ms; in forwards: {in_forwards}", flush=True)
    wall, processor = contributions_cost(model)
    print(
        f"contributions of 5 tokens, in plain forwards: {wall:.2f} (CPU time {processor:.2f}; target 1.3)", flush=True
    )
    if arguments.cost:
        return
    started = time.perf_counter()
    rows: list[dict[str, object]] = []
    everything: list[dict[str, xr.Dataset]] = []
    for task, members in pairs().items():
        measured = []
        for pair in members:
            found = measure(model, pair)
            clean, corrupt = (float(found["atp"][end]) for end in ("clean", "corrupt"))
            print(f"{task:16} {clean:+7.2f} {corrupt:+7.2f}  {pair[0]} |{pair[2]} /{pair[3]}", flush=True)
            if clean > 0 > corrupt:
                measured.append(found)
        print(f"{task}: {len(measured)} of {len(members)} pairs are answered right both ways and kept", flush=True)
        rows += table(task, measured)
        everything += measured
    rows += table("all", everything)
    print(f"\n{'task':16} {'site':13} {'measure':9} {'AtP':22} {'RelP':22} {'RelP - AtP':22} control")
    for row in rows:
        cells = "  ".join("{:+.3f} [{:+.2f}, {:+.2f}]".format(*row[k]) for k in ("atp", "relp", "gain"))
        control = "" if row["control"] is None else f"{row['control']:+.3f}"
        print(f"{row['task']:16} {row['site']:13} {row['measure']:9} {cells}  {control}")
    print(f"\n{time.perf_counter() - started:.0f} s, {torch.get_num_threads()} threads, {model}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"provenance": model.provenance, "cost": cost, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
