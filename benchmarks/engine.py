"""What Microtome costs beside the plain model, as ratios measured within one run.

    python benchmarks/engine.py [--model MODEL] [--repeats 7] [--atlas] [--out results.json]

Each figure alternates the plain call and ours, and takes the median of the ratios of neighbouring pairs, so that a slow
moment of the machine falls on both. Peers run in environments of their own: see benchmarks/peers. --atlas writes the
default atlas too, in a process of its own, and says how long it took and how much memory.

What is kept is new memory, whose pages the system must supply; on a virtual machine that returns freed pages to its
host that costs more than the whole of the engine. The ratio of user time, without the system's, is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import microtome as mt
from microtome.anatomy import default_folder
from microtome.method import Bound, Measure, Pass, Text, declared
from microtome.stream import TokenBatches, standard_library_text

OF_TEXT = ("stream", "massive", "head_norms", "activations", "firing", "top_examples", "loss")

TARGETS = {
    "capture_all": 1.05, "capture_one": 1.02, "steered_generation": 1.10, "atlas_pass": 1.35,
    "import": 0.5, "open": 4.0, "atlas_seconds": 480.0, "atlas_gib": 4.0,
}  # fmt: skip


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time of one call, and the user time of all its threads."""
    started, before = time.perf_counter(), os.times().user
    call()
    return time.perf_counter() - started, os.times().user - before


def paired(plain: Callable[[], object], ours: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median ratios of neighbouring calls, in wall and in user time, with the medians of both in seconds."""
    plain(), ours()
    pairs = []
    for i in range(repeats):
        if i % 2:
            b, a = seconds(ours), seconds(plain)
        else:
            a, b = seconds(plain), seconds(ours)
        pairs.append((a, b))
    return {
        "ratio": statistics.median(b[0] / a[0] for a, b in pairs),
        "user_ratio": statistics.median(b[1] / a[1] for a, b in pairs),
        "plain_seconds": statistics.median(a[0] for a, _ in pairs),
        "seconds": statistics.median(b[0] for _, b in pairs),
    }


def hooked(model: mt.Model, tokens: torch.Tensor) -> None:
    """Plain hooks that keep the same tensors, written by hand."""
    kept: list[torch.Tensor] = []
    parts = model.anatomy.parts.layers
    handles = [
        model.hf.get_submodule(p.down).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
        for p in parts
        if p.down
    ]
    handles += [model.hf.get_submodule(p.block).register_forward_hook(lambda m, a, o: kept.append(o)) for p in parts]
    with torch.no_grad():
        model.hf(input_ids=tokens)
    for handle in handles:
        handle.remove()


def forwards(model: mt.Model, repeats: int) -> dict[str, dict[str, float]]:
    """Capture of everything, of one site, and plain hooks, beside the plain forward on 8 x 256 tokens."""
    batches = TokenBatches(standard_library_text(), model.tokenizer, length=256, rows=8, tokens=2048)
    tokens = batches[0].tokens

    def plain() -> None:
        with torch.no_grad():
            model.hf(input_ids=tokens)

    last = model.anatomy.n_layers // 2
    return {
        "capture_all": paired(plain, lambda: model.run(tokens, capture=["*.mlp.post", "*.resid_post"]), repeats),
        "plain_hooks_all": paired(plain, lambda: hooked(model, tokens), repeats),
        "capture_one": paired(plain, lambda: model.run(tokens, capture=f"{last}.mlp.post"), repeats),
    }


def generation(model: mt.Model, repeats: int) -> dict[str, float]:
    """Steered generation of 32 tokens beside the generation of plain transformers."""
    direction = torch.randn(model.anatomy.d_model, generator=torch.Generator().manual_seed(0)) * 0.01
    edit = mt.edit.Add(f"{model.anatomy.n_layers // 2}.resid_post", value=direction)
    options: dict[str, Any] = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    tokens = model.to_tokens("The history of science")
    pad = model.tokenizer.pad_token_id

    def plain() -> None:
        mask = torch.ones_like(tokens)
        out = model.hf.generate(input_ids=tokens, attention_mask=mask, pad_token_id=pad, **options)
        model.tokenizer.decode(out[0, tokens.shape[1] :])

    def steered() -> None:
        with model.editing(edit):
            model.generate("The history of science", **options)

    return paired(plain, steered, repeats)


def atlas_pass(model: mt.Model, repeats: int) -> dict[str, float]:
    """The measures of the atlas that read the whole text, beside plain forwards with logits over the same tokens."""
    batches = TokenBatches(standard_library_text(), model.tokenizer, length=256, rows=4, tokens=2048)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model.hf(input_ids=batch.tokens)

    def ours() -> None:
        measures: list[Measure] = [declared(name) for name in OF_TEXT]  # pyright: ignore[reportAssignmentType]
        made = Pass(model, [Bound(one, one.statistic({}), one.layers(model)) for one in measures], Text())
        for batch in batches:
            made.update(batch)

    return paired(plain, ours, max(3, repeats // 2))


def fresh(code: str, setup: str = "") -> float:
    """What a fresh interpreter reports for the seconds of a piece of code."""
    script = f"{setup}\nimport time\nt = time.perf_counter()\n{code}\nprint(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def starts(repeats: int) -> dict[str, dict[str, float]]:
    """Importing beside importing numpy, and opening the default model beside loading it with plain transformers."""
    load = "AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)"
    setup = "import torch, microtome as mt\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    setup += f"from transformers import LlamaForCausalLM\nfolder = {str(default_folder())!r}"
    cases = {"import": ("import numpy", "import microtome", ""), "open": (load, "mt.open()", setup)}
    found: dict[str, dict[str, float]] = {}
    for name, (plain, ours, before) in cases.items():
        pairs = [(fresh(plain, before), fresh(ours, before)) for _ in range(repeats)]
        found[name] = {
            "ratio": statistics.median(b / a for a, b in pairs),
            "plain_seconds": statistics.median(a for a, _ in pairs),
            "seconds": statistics.median(b for _, b in pairs),
        }
    return found


def whole_atlas(model: str | None) -> dict[str, dict[str, float]]:
    """Wall time of `microtome atlas` with what it reads by default, and the most memory it took."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "microtome", "atlas", *([model] if model else []), "-o", f"{folder}/atlas"]
        took, _ = seconds(lambda: subprocess.run(call, capture_output=True, check=True))
        cost = json.loads(Path(folder, "atlas", "manifest.json").read_text())["cost"]
    return {"atlas_seconds": {"seconds": took}, "atlas_gib": {"gib": cost["peak_memory_bytes"] / 2**30}}


PEERS = {
    "transformer-lens": (".venv-peers", "time_transformer_lens.py"),
    "nnsight": (".venv-nnsight", "time_nnsight.py"),
}


def peers() -> dict[str, Any]:
    """What the peers print in environments of their own, which `make bench-peers` makes; nothing without them."""
    found: dict[str, Any] = {}
    for name, (environment, script) in PEERS.items():
        python = Path(environment) / "bin" / "python"
        if python.exists():
            call = [str(python), f"benchmarks/peers/{script}", *([str(folder)] if (folder := default_folder()) else [])]
            found[name] = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--atlas", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/engine.json")
    options = parser.parse_args()
    model = mt.open(options.model)
    found: dict[str, Any] = forwards(model, options.repeats)
    found["steered_generation"] = generation(model, options.repeats)
    found["atlas_pass"] = atlas_pass(model, options.repeats)
    found |= starts(max(3, options.repeats // 2))
    found |= whole_atlas(options.model) if options.atlas else {}
    for name, row in found.items():
        value = next(row[unit] for unit in ("ratio", "seconds", "gib") if unit in row)
        target = TARGETS.get(name)
        verdict = "" if target is None else f"  target {target:g}  {'reached' if value <= target else 'MISSED'}"
        user = f"  user {row['user_ratio']:.3f}" if "user_ratio" in row else ""
        print(f"{name:20} {value:7.3f}{user}{verdict}")
    beside = peers()
    for name, result in beside.items():
        print(name, json.dumps(result.get("ratios", result)))
    report = {
        "peers": beside,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "python": platform.python_version()},
        "provenance": model.provenance, "repeats": options.repeats, "figures": found, "targets": TARGETS,
    }  # fmt: skip
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
