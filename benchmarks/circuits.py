"""Circuits on the default model: ACDC beside the literal algorithm, and a faithfulness curve of 32 pairs.

    python benchmarks/circuits.py acdc [--tau 0.03] [--pairs 1] [--layers 30]
    python benchmarks/circuits.py curve [--pairs 32] [--scored 32] [--draws 3]

acdc: the literal algorithm takes one plain forward of the pairs an edge; the forward is timed in the same process, in
the middle of 20, before and after, and the ratio is edges times that over the time of ACDC, both in CPU seconds. With
--layers only the receivers of the last ones, and the logits, are tried.
curve: scores by EAP in the mean over the pairs, or over the first --scored of them, then faithfulness at ten shares of
edges beside --draws random circuits.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

import microtome as mt
from microtome import circuits
from microtome.circuits._bench import Bench, divergence

GIVING = "When {} and {} went to the store, {} gave a drink to"
NAMES = ["Mary", "John", "Tom", "Anna", "Sarah", "James", "David", "Emma", "Peter", "Alice", "Jane", "Paul"]


def pairs_of(model: mt.Model, n: int) -> Any:
    """Who gives is swapped: the answer is the other one."""
    found: list[tuple[str, str, str, str]] = []
    for i in range(len(NAMES)):
        for j in range(len(NAMES)):
            if i != j and len(found) < n:
                a, b = NAMES[i], NAMES[(j + 3 * i) % len(NAMES)]
                if a != b:
                    found.append((GIVING.format(a, b, b), GIVING.format(a, b, a), f" {a}", f" {b}"))
    clean, corrupt, answer, foil = (list(x) for x in zip(*found, strict=True))
    return mt.explain.pairs_of(model, clean, corrupt, answer=answer, foil=foil)


def forward_seconds(model: mt.Model, tokens: torch.Tensor, n: int = 10) -> list[float]:
    """CPU seconds of plain forwards."""
    taken: list[float] = []
    with torch.no_grad():
        for _ in range(n):
            started = time.process_time()
            model.hf(input_ids=tokens)
            taken.append(time.process_time() - started)
    return taken


def acdc(model: mt.Model, tau: float, n: int, layers: int) -> dict[str, Any]:
    """ACDC beside one plain forward an edge."""
    pairs = pairs_of(model, n)
    bench = Bench(model, pairs, divergence(model, pairs))
    engines = [engine for _, engine in bench.groups]
    numbering = engines[0].numbering
    first = (numbering.n_layers - layers) * (3 * numbering.n_heads + 1)
    receivers = list(reversed(range(first, numbering.receivers)))
    taken = [t for e in engines for t in forward_seconds(model, e.tokens)]
    started, spent = time.perf_counter(), time.process_time()
    last = [started]

    def report(done: int, total: int) -> None:
        if time.perf_counter() - last[0] > 30:
            last[0] = time.perf_counter()
            print(f"{done:,} of {total:,} edges, {last[0] - started:.0f} s", flush=True)

    found = circuits.acdc(engines, tau, receivers=receivers, report=report)
    seconds, spent = time.perf_counter() - started, time.process_time() - spent
    taken += [t for e in engines for t in forward_seconds(model, e.tokens)]
    forward = len(engines) * float(np.median(taken))
    edges = sum(numbering.before(v) for v in receivers)
    return {
        "edges": edges, "kept": int(found.kept[:, receivers].sum()), "cost": found.cost, "rows": found.rows,
        "seconds": seconds, "cpu": spent, "forward": forward, "literal": edges * forward,
        "ratio": edges * forward / spent,
        "tau": tau, "pairs": n, "tokens": int(engines[0].tokens.shape[1]),
    }  # fmt: skip


def curve(model: mt.Model, n: int, scored: int, draws: int) -> dict[str, Any]:
    """A faithfulness curve."""
    pairs = pairs_of(model, n)
    started = time.process_time()
    scores = circuits.mean_scores(model, pairs[:scored], "eap")
    spent = time.process_time() - started
    began, started = time.perf_counter(), time.process_time()
    circuit = circuits.from_scores(model, scores, 1.0 - 1e-12, prune=False)
    clean, corrupt = ([pair[side].tolist() for pair in pairs.tokens] for side in (0, 1))
    found = circuits.faithfulness(
        model, circuit, clean, corrupt, answer=list(pairs.answer_ids), foil=list(pairs.foil_ids), draws=draws
    )
    values = {name: np.round(found[name].values, 3).tolist() for name in ("faithfulness", "faithfulness_control")}
    single = {name: round(float(found[name]), 4) for name in ("cpr", "cpr_control", "cmd", "cmd_control")}
    taken = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - started, "scoring_cpu": spent}
    return taken | {"pairs": n, "scored": scored, "draws": draws} | values | single


def main() -> None:
    """Run one of both, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="acdc", choices=("acdc", "curve"))
    parser.add_argument("--model")
    parser.add_argument("--tau", type=float, default=0.03)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scored", type=int, help="of how many pairs the scores are the mean")
    parser.add_argument("--draws", type=int, default=3, help="random circuits at each share")
    given = parser.parse_args()
    model = mt.open() if given.model is None else mt.open(given.model)
    with mt.settings(progress=False):
        if given.what == "acdc":
            found = acdc(model, given.tau, given.pairs or 1, given.layers or model.anatomy.n_layers)
        else:
            found = curve(model, given.pairs or 32, given.scored or given.pairs or 32, given.draws)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
