"""What a machine with a GPU can check: that it agrees with the CPU, and what the engine costs there, as ratios.

    python tools/gpu_check.py [--device cuda] [--seconds 225] [--json gpu.json]
    python tools/gpu_check.py --device cpu --small     # the same parts at tiny sizes, on any machine

Models have random weights and no tokenizer, so that nothing is read from disk or network. Parts run one after another;
one that fails is reported with its traceback, one for which the time is short is skipped and says so, and the JSON is
written again after each of them. The parts of agreement are in `gpu_agreement.py`, those of cost in `gpu_cost.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_agreement import CHECKS, check
from gpu_cost import costs, shapes

import microtome as mt

Part = tuple[str, float, Callable[[], dict[str, Any]]]
"""Name, the most seconds that it may take, and what runs it."""


class OutOfTime(Exception):
    """A part took longer than it may."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop the block after some seconds."""

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(device: torch.device) -> dict[str, Any]:
    """Where this runs."""
    found: dict[str, Any] = {
        "device": str(device), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "microtome": mt.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device)
        found |= {"card": held.name, "gib": round(held.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def parts(device: torch.device, small: bool) -> Iterator[Part]:
    """All parts in order: agreement in both types, then the cost at each shape."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in CHECKS:
            yield f"{name} {str(dtype).removeprefix('torch.')}", 25.0, lambda n=name, d=dtype: check(n, device, d)
    for name, shape in shapes(small).items():
        for part, seconds, call in costs(shape, device):
            yield f"{part} {name}", seconds, call


def run(device: torch.device, small: bool, seconds: float, only: str, write: Callable[[dict[str, Any]], None]) -> bool:
    """Run every part that there is time for; whether none failed."""
    started = time.perf_counter()
    report: dict[str, Any] = {"machine": machine(device), "small": small, "parts": {}}
    sound = True
    for name, most, call in parts(device, small):
        if only not in name:
            continue
        began = time.perf_counter()
        left = seconds - (began - started)
        if left < most / 2:
            row: dict[str, Any] = {"status": "skipped", "why": f"{left:.0f} s left, it may take {most:.0f} s"}
        else:
            try:
                with at_most(min(most, left)):
                    row = call()
                row = {"status": "missed" if row.pop("missed", False) else "ok", **row}
            except BaseException as problem:
                if isinstance(problem, KeyboardInterrupt):
                    raise
                row = {"status": "failed", "why": f"{type(problem).__name__}: {problem}"[:500]}
                row["traceback"] = traceback.format_exc().replace(f"{Path(__file__).resolve().parents[1]}/", "")
                sound = False
        row["seconds"] = round(time.perf_counter() - began, 2)
        report["parts"][name] = row
        report["seconds"] = round(time.perf_counter() - started, 1)
        print(line(name, row), flush=True)
        gc.collect()
        write(report)
    return sound


def line(name: str, row: dict[str, Any]) -> str:
    """One part in one line of the report, with the end of its traceback where it failed."""
    said = "  ".join(f"{k} {v}" for k, v in row.items() if k not in ("status", "seconds", "traceback", "worst", "all"))
    text = f"{row['status']:8} {name:32} {row['seconds']:6.1f} s  {said}"
    if "traceback" in row:
        text += "\n" + "\n".join("    " + x for x in row["traceback"].strip().splitlines()[-8:])
    return text


def main() -> None:
    """Run, print and write; the exit status is 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes in the parts of cost")
    parser.add_argument("--seconds", type=float, default=225.0, help="all parts together")
    parser.add_argument("--only", default="", help="parts whose name holds this")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    # Matrix products of float32 in float32: with TF32 a card keeps 10 bits of the mantissa.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    print(json.dumps(machine(device)), flush=True)

    def write(report: dict[str, Any]) -> None:
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    with mt.settings(progress=None):
        sound = run(device, options.small, options.seconds, options.only, write)
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
