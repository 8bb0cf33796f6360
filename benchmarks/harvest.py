"""What a harvest costs beside its forwards, and how quickly it is read.

    python benchmarks/harvest.py [--tokens N] [--rounds N] [--folder DIR] [--only write|read|rows]

write    a harvest with a stub model, which shows prepared values without computing them, beside a raw write of the same
         bytes into memory-mapped files that are flushed; the ratio of the two in one round, its median over rounds.
read     vectors of width 576 a second from the shuffled reader, by type; files are in the page cache.
rows     forwards of the default model over documents in rows of their own, beside rows of joined documents: tokens a
         second, for long documents and for short ones.

Floors: write at least 0.9 of the raw write; read at least 1M vectors a second.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import microtome as mt
from microtome.stream import Corpus, DocumentBatches, TokenBatches, harvest

LENGTH, ROWS = 256, 8
SITES = "*.resid_post"


class Stub(mt.Model):
    """A model whose forwards cost nothing: every site has prepared values."""

    fingerprint, provenance = "0" * 16, {"model": "stub"}  # to read weights takes half a second, whatever is harvested

    def __init__(self, model: mt.Model) -> None:
        super().__init__(model.hf, model.tokenizer, model.anatomy)
        self.values = torch.randn(ROWS, LENGTH, model.anatomy.d_model)

    def run(self, prompt: Any, *, observe: Any = None, **more: Any) -> Any:
        rows, width = prompt.shape
        for address, see in observe.items():
            see(mt.anatomy.Site("resid_post", int(address.split(".")[0])), self.values[:rows, :width])


class Numbers:
    """A tokenizer of words that are numbers, so that reading the text costs next to nothing."""

    eos_token_id, bos_token_id, is_fast = 0, None, False

    def __call__(self, text: str, /, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, **more: Any) -> str:
        return " ".join(map(str, ids))


def numbers(tokens: int) -> Corpus:
    """Documents of one row each."""
    row = " ".join(map(str, range(1, LENGTH + 1)))
    return Corpus.of("numbers", [row] * (tokens // LENGTH))


def raw(folder: Path, values: torch.Tensor, sites: int, tokens: int, shard: int) -> None:
    """The same bytes into memory-mapped files, in the same batches."""
    width, data = values.shape[-1], values.flatten(0, 1).numpy()
    for number, first in enumerate(range(0, tokens, shard)):
        some = min(shard, tokens - first)
        held = np.memmap(folder / f"{number}.bin", np.float32, "w+", shape=(sites, some, width))
        for at in range(0, some, len(data)):
            for site in range(sites):
                part = held[site, at : at + len(data)]
                part[:] = data[: len(part)]
        held.flush()


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write(model: mt.Model, folder: Path, tokens: int, rounds: int) -> None:
    """Print the harvest beside the raw write."""
    stub, corpus, sites = Stub(model), numbers(tokens), model.anatomy.n_layers
    stub.tokenizer = Numbers()
    shard = 2**29 // (4 * sites * model.anatomy.d_model) // (ROWS * LENGTH) * (ROWS * LENGTH)
    size = tokens * sites * model.anatomy.d_model * 4 / 2**30
    ratios = []
    for number in range(rounds):
        taken: dict[str, float] = {}
        for name in ("raw", "harvest") if number % 2 else ("harvest", "raw"):
            out = folder / f"{name}{number}"  # nothing is deleted between: what follows a deletion is slowed by it
            out.mkdir()
            if name == "raw":
                taken[name] = timed(lambda out=out: raw(out, stub.values, sites, tokens, shard))
            else:
                given: dict[str, Any] = {"sites": SITES, "text": corpus, "length": LENGTH, "rows": ROWS}
                taken[name] = timed(lambda out=out, g=given: harvest(stub, out=out, shard_tokens=shard, **g))
        ratios.append(taken["raw"] / taken["harvest"])
        speeds = ", ".join(f"{name} {size / s:.2f} GiB/s" for name, s in sorted(taken.items()))
        print(f"write {size:.2f} GiB: {speeds}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"write: median ratio {statistics.median(ratios):.2f} (floor 0.90)", flush=True)


def read(model: mt.Model, folder: Path, tokens: int, rounds: int) -> None:
    """Print vectors a second, by type."""
    stub, corpus = Stub(model), numbers(tokens)
    stub.tokenizer = Numbers()
    for dtype in ("float32", "bfloat16", "int8"):
        held = harvest(stub, sites="0.resid_post", text=corpus, out=folder / dtype, length=LENGTH, dtype=dtype)
        found = []
        for seed in range(rounds):
            vectors, began = 0, time.perf_counter()
            for batch in held.shuffled("0.resid_post", seed=seed):
                vectors += len(batch)
            found.append(vectors / (time.perf_counter() - began) / 1e6)
        print(
            f"read {dtype}: {statistics.median(found):.2f}M vectors a second of {len(held):,} (floor 1.00)", flush=True
        )
        shutil.rmtree(folder / dtype)


def documents() -> Iterator[tuple[str, Corpus]]:
    """Long documents and short ones."""
    texts = list(mt.stream.standard_library_text())
    yield "long", Corpus.of("long", texts)
    yield "short", Corpus.of("short", [line for text in texts for line in text.splitlines() if len(line.split()) > 3])


def rows(model: mt.Model, tokens: int) -> None:
    """Print tokens a second in rows of their own, and joined."""
    for name, corpus in documents():
        given: dict[str, Any] = {"length": LENGTH, "rows": ROWS, "tokens": tokens}
        made = {"apart": DocumentBatches, "joined": TokenBatches}
        batches = {how: kind(corpus, model.tokenizer, **given) for how, kind in made.items()}
        speeds = {}
        for how, parts in batches.items():
            count = sum(part.tokens.numel() for part in parts)
            speeds[how] = count / timed(lambda p=parts: [model.run(x.tokens, observe={}, logits=False) for x in p])
        ratio = speeds["apart"] / speeds["joined"]
        told = ", ".join(f"{how} {speed:,.0f}" for how, speed in speeds.items())
        print(f"rows {name}: tokens a second {told}, ratio {ratio:.2f}, {len(batches['apart'])} batches", flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("--only", choices=("write", "read", "rows"), default=None)
    given = parser.parse_args()
    model = mt.open(prove=False)
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        if given.only in (None, "write"):
            write(model, folder, given.tokens, given.rounds)
        if given.only in (None, "read"):
            read(model, folder, 8 * given.tokens, given.rounds)
        if given.only in (None, "rows"):
            rows(model, given.tokens // 4)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
