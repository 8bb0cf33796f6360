"""The main job: measure every layer, head and neuron of a model, and write its atlas.

An atlas is a folder: `layers.parquet`, `heads.parquet`, `neurons.parquet`, `manifest.json`, and `index.html` with its
assets, which open from disk without a network. It is made beside its place and moved there when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from microtome.atlas._columns import HEADS, LAYERS, NEURONS, meaning
from microtome.atlas._tables import head_table, layer_table, neuron_table
from microtome.errors import ModelUnsupported, OutputError, error
from microtome.files import atomic
from microtome.measurements import TextStatistics, ablation_loss, head_scores, neuron_weights
from microtome.model import Model
from microtome.stream import Corpus, TokenBatches, standard_library_text
from microtome.view import write_pages

Progress = Callable[[str, int, int], None]
KIND = "microtome atlas"


def write_atlas(
    model: Model,
    out: str | Path,
    *,
    corpus: Corpus | None = None,
    tokens: int = 20_000,
    length: int = 256,
    rows: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Measure a causal model and write its atlas.

    Cost:  one pass over the text with statistics, about 1.5 L forwards of 1,024 tokens for the losses without a layer,
           16 forwards of 100 tokens for the heads, and 2 d_model vocab operations a neuron for its tokens.

    Args:
        model: an open causal model with a tokenizer.
        out: the folder to write; it must not exist, be empty, or hold an earlier atlas, which is replaced.
        corpus: the text; the documentation topics of the standard library by default.
        tokens: how many of its tokens to read.
        length: tokens a row.
        rows: rows a batch.
        seed: of random tokens and bootstraps.
        progress: called with (stage, done, all).

    Returns:
        The path of `index.html`.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        DataError: the text has too few tokens.
        ModelUnsupported: the model is not causal, or was opened without a tokenizer.
    """
    out = Path(out)
    check_out(out)
    _check_model(model)
    length = min(length, model.anatomy.n_ctx)
    batches = TokenBatches(corpus or standard_library_text(), model.tokenizer, length=length, rows=rows, tokens=tokens)
    place = out.resolve()
    with atomic(place, "the atlas to", folder=True) as partial:
        _make(model, batches, partial, seed, progress or (lambda stage, done, all: None))
        check_out(place)  # it took minutes: something may have come meanwhile
    return out / "index.html"


def _check_model(model: Model) -> None:
    if not model.anatomy.causal:
        raise error(
            ModelUnsupported,
            f"{model.anatomy.name} has no next token, so it has no loss to measure",
            got="attention that sees both ways",
            allowed="causal models",
            do="choose a causal model",
        )
    if model.tokenizer is None:
        raise error(
            ModelUnsupported,
            f"{model.anatomy.name} was opened without a tokenizer",
            do="open it with tokenizer=, or from a folder that has one",
        )


def check_out(out: Path) -> None:
    """Refuse a folder that must not be written to.

    Raises:
        OutputError: it is a file, or holds something that is not an atlas, alone or beside one.
    """
    if out.is_file():
        raise error(OutputError, f"{out} is a file", allowed="a folder", do="name another place with -o")
    try:
        held = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_symlink() or not p.is_dir())
        held += sorted(p.name for p in out.iterdir() if p.is_dir()) if out.is_dir() and not held else []
    except OSError as problem:
        raise error(OutputError, f"cannot read the folder {out}", got=str(problem), do="check its rights") from problem
    own = _files(out)
    foreign = [name for name in held if name not in own]
    if foreign:
        raise error(
            OutputError,
            f"the folder {out} exists and holds something that is not an atlas",
            got=", ".join(foreign[:5]),
            allowed="a new folder, an empty one, or an earlier atlas",
            do="name another folder with -o",
        )


def _files(folder: Path) -> set[str]:
    """The files of the atlas in a folder, as its manifest lists them; none if there is no atlas."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return set(manifest["files"]) if manifest["kind"] == KIND else set()
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _make(model: Model, batches: TokenBatches, folder: Path, seed: int, progress: Progress) -> None:
    started = time.perf_counter()
    cost: dict[str, float] = {}

    def lap(stage: str) -> None:
        cost[stage] = round(time.perf_counter() - started - sum(cost.values()), 2)

    progress("reading the text", 0, len(batches))
    statistics = TextStatistics(model)
    for done, batch in enumerate(batches, 1):
        statistics.update(batch)
        progress("reading the text", done, len(batches))
    lap("text")
    sample = batches[0].tokens[:, :128].to(model.device)
    more = [b.tokens[:, :128].to(model.device) for b in list(batches)[1:2]]
    import torch

    skipped = torch.cat([sample, *more])
    without = ablation_loss(model, skipped, seed=seed, progress=lambda d, n: progress("leaving layers out", d, n))
    lap("loss_without")
    progress("scoring heads", 0, 1)
    scores = head_scores(model, length=min(50, (model.anatomy.n_ctx - 1) // 2), seed=seed)
    progress("scoring heads", 1, 1)
    lap("heads")
    weights = neuron_weights(model, progress=lambda d, n: progress("reading neurons", d, n))
    lap("neurons")
    progress("writing", 0, 1)
    tables = {
        "layers": (layer_table(statistics.layers(), without), LAYERS),
        "heads": (head_table(model, scores, statistics.heads()), HEADS),
        "neurons": (neuron_table(statistics.neurons(), weights), NEURONS),
    }
    for name, (table, _) in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    cost["seconds"] = round(time.perf_counter() - started, 2)
    cost["peak_memory_bytes"] = peak_memory()
    manifest = _manifest(model, batches, statistics.loss, seed, cost, tables)
    manifest["skipped_on"] = {"sequences": skipped.shape[0], "tokens_each": skipped.shape[1]}
    manifest["scored_on"] = {"sequences": scores.attrs["sequences"], "tokens_each": 2 * scores.attrs["length"]}
    vocab = model.to_words(list(range(model.anatomy.d_vocab)))
    words = [vocab[t] for t in batches.flat]
    layers, heads, neurons = (tables[name][0] for name in ("layers", "heads", "neurons"))
    write_pages(folder, manifest, layers, heads, neurons, words, vocab)
    written = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest["files"] = ["manifest.json", *written]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    progress("writing", 1, 1)


def _manifest(
    model: Model,
    batches: TokenBatches,
    loss: float,
    seed: int,
    cost: dict[str, float],
    tables: dict[str, tuple[pa.Table, dict[str, tuple[str, str]]]],
) -> dict[str, Any]:
    a, provenance = model.anatomy, model.provenance
    text = batches.corpus
    return {
        "kind": KIND,
        "microtome": provenance["microtome"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": a.name, "family": a.model_type, "fingerprint": model.fingerprint, "n_layers": a.n_layers,
            "d_model": a.d_model, "n_heads": a.n_heads, "n_kv_heads": a.n_kv_heads, "d_head": a.d_head,
            "d_mlp": a.d_mlp, "d_vocab": a.d_vocab, "parameters": model.n_parameters, "gated": a.gated,
            "parallel": a.parts.form == "parallel", "dtype": provenance["dtype"],
        },
        "text": {
            "source": text.name, "tokens": len(batches.flat), "length": batches[0].tokens.shape[1],
            "rows_begin_with": None if batches.bos_id is None else model.to_words([batches.bos_id])[0],
            "sequences": -(-len(batches.flat) // batches[0].tokens.shape[1]),
            "sha256": hashlib.sha256(str(batches.flat).encode()).hexdigest(), "short": batches.short,
        },
        "loss": loss,
        "seed": seed,
        "versions": {k: provenance[k] for k in ("microtome", "transformers", "torch")} | {"pyarrow": pa.__version__},
        "cost": cost,
        "tables": {
            name: {"rows": table.num_rows, "columns": {c: meaning(meanings, c) for c in table.column_names}}
            for name, (table, meanings) in tables.items()
        },
    }  # fmt: skip


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where the figure below would count a parent's memory too
        held = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if held is not None:
            return int(held[1]) * 1024
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak * (1 if os.uname().sysname == "Darwin" else 1024))
    except ImportError:
        return int(psutil.Process().memory_info().rss)
