"""What the atlas costs: its streaming measures beside plain forwards of the same tokens, and its profiles.

    python benchmarks/atlas.py [--tokens N] [--rounds N] [--memory] [--profiles]

text       all measures of the default profile that read the whole text, in one pass, over plain forwards of the model
           on the same batches: the ratio of the two in one round, its median over rounds. Bound: 1.6.
memory     the most memory of the pass at `tokens` and at ten times as many, in processes of their own.
profiles   seconds of `microtome atlas` with its pages. Bounds: quick 90, default 360.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import microtome as mt
from microtome.atlas import measures_of
from microtome.method import Measure, Text, declared

RESULTS = Path(__file__).parent / "results" / "atlas.json"


def streaming() -> list[str]:
    """The measures of the default profile that read the whole text."""
    found = [(name, declared(name)) for name in measures_of("default")]
    return [name for name, one in found if isinstance(one, Measure) and one.on == Text()]


def ratio(tokens: int, rounds: int) -> dict[str, object]:
    """Seconds of plain forwards and of the pass over the same batches, by round."""
    model = mt.open()
    batches = mt.stream.TokenBatches(mt.stream.standard_library_text(), model.tokenizer, tokens=tokens)
    names, times = streaming(), []
    for _ in range(rounds):
        started = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model.hf(batch.tokens)
        plain = time.perf_counter() - started
        started = time.perf_counter()
        mt.measure(model, *[name for name in names if name != "expert_neurons"], text=batches)
        times.append((round(plain, 2), round(time.perf_counter() - started, 2)))
    ratios = [measured / plain for plain, measured in times]
    return {"measures": names, "tokens": tokens, "seconds": times, "ratio": round(statistics.median(ratios), 3)}


def peak(tokens: int) -> int:
    """The most memory of a process that runs the pass on so many tokens."""
    code = (
        "import sys, microtome as mt; sys.path.insert(0, 'benchmarks'); from atlas import streaming\n"
        "from microtome.atlas._manifest import peak_memory\n"
        "names = [n for n in streaming() if n != 'expert_neurons']\n"
        f"mt.measure(mt.open(), *names, tokens={tokens}); print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def profile(option: list[str]) -> dict[str, float]:
    """Seconds of one atlas of the default model, and what it weighs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "atlas"
        started = time.perf_counter()
        command = [sys.executable, "-m", "microtome", "atlas", *option, "-o", str(out), "--json"]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        cost = json.loads((out / "manifest.json").read_text())["cost"]
    return {"seconds": round(seconds, 1), "bytes": size, **cost}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profiles", action="store_true")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    found: dict[str, object] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["text"] = ratio(given.tokens, given.rounds)
    print(json.dumps(found["text"]))
    if given.memory:
        found["memory"] = {str(n): peak(n) for n in (given.tokens, 10 * given.tokens)}
        print(json.dumps(found["memory"]))
    if given.profiles:
        found["profiles"] = {name: profile([f"--{name}"] if name != "default" else []) for name in ("quick", "default")}
        print(json.dumps(found["profiles"]))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
