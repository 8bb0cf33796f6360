"""How well edge scores tell a known circuit from the rest, for every compiled program.

    python benchmarks/planted_circuits.py [--pairs 24] [--out benchmarks/results/planted_circuits.json]

AUC of exact edge effects with both corruptions, and with other tokens alone, which show no edge of the positions; and
of edge attribution patching (EAP), the estimate, with both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import microtome as mt
from microtome import planted


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/planted_circuits.json")
    options = parser.parse_args()
    started, rows = time.perf_counter(), {}
    print(f"{'program':20} {'edges':>9} {'true':>5} {'both':>6} {'tokens':>7} {'eap':>6}")
    for name in planted.PROGRAMS:
        it = planted.program(name)
        with mt.settings(seed=options.seed):
            both = mt.explain.circuit_recovery(it, pairs=options.pairs)
            tokens = mt.explain.circuit_recovery(it, pairs=options.pairs, corrupt=("tokens",))
        row: dict[str, Any] = {
            "edges": int(both["score"].notnull().sum()), "true": int(both["true"].sum()),
            "auc": float(both["auc"]), "auc_tokens_only": float(tokens["auc"]),
            "auc_eap": float(both["auc_estimated"][0]),
        }  # fmt: skip
        rows[name] = row
        figures = f"{row['auc']:6.3f} {row['auc_tokens_only']:7.3f} {row['auc_eap']:6.3f}"
        print(f"{name:20} {row['edges']:9} {row['true']:5} {figures}", flush=True)
    report = {"pairs": options.pairs, "seed": options.seed, "seconds": time.perf_counter() - started, "programs": rows}
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
