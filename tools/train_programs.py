"""Train transformers with ordinary weights whose circuit is that of a compiled program, and write them.

    python tools/train_programs.py            all of them, or those that are named; minutes each on two cores

The third, histogram, is older: only its nodes were trained, in 4000 steps. In 1500 steps its edges are not learned.
What is printed of each is on inputs that it was not trained on: the share of answers that are as the program says.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from microtome import planted

HERE = Path(__file__).resolve().parents[1] / "src" / "microtome" / "planted" / "trained"
PROGRAMS = {"repeats": 600, "previous_token": 600}
SEED = 0


def made(name: str, steps: int) -> None:
    """Train one, write it, and print how true its circuit is on inputs that it was not trained on."""
    started = time.time()
    it = planted.train(name, steps=steps, seed=SEED)
    shutil.rmtree(HERE / name, ignore_errors=True)
    planted.save(it.model, HERE / name, truth={**it.truth, "source": "trained by tools/train_programs.py"})
    again = planted.load(HERE / name)
    nodes = planted.interchange_accuracy(again, 256, seed=10**6)
    edges = planted.edge_accuracy(again, 256, seed=10**6)
    inside = {tuple(edge) for edge in it.truth["edges"]}
    print(name, f"{time.time() - started:.0f} s", {k: f"{v:.4f}" for k, v in nodes.items()})
    for what, mine in (("edges inside", inside), ("edges outside", edges.keys() - inside)):
        print(f"  {what}: the least {min((edges[e], e) for e in mine)}", flush=True)


if __name__ == "__main__":
    for program in sys.argv[1:] or PROGRAMS:
        made(program, PROGRAMS[program])
