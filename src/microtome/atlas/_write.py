"""The main job: measure every layer, head and neuron of a model, and write its atlas.

An atlas is a folder: `layers.parquet`, `heads.parquet`, `neurons.parquet`, `manifest.json`, and `index.html` with its
assets, which open from disk without a network. It is made beside its place and moved there when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from microtome.atlas._tables import described, tables
from microtome.context import current
from microtome.errors import ArgumentError, DataError, MicrotomeError, ModelUnsupported, OutputError, error
from microtome.files import atomic
from microtome.method import corpus_of, methods
from microtome.method.runner import Measured, run_measures
from microtome.model import Model
from microtome.stream import TokenBatches, standard_library_text
from microtome.view import write_pages

KIND = "microtome atlas"

LEAST_TOKENS = 100
"""Of fewer no atlas is made: a share of so many is known to 0.1 at best, which is more than most neurons differ."""

THIN_TOKENS, THIN_ROWS = 10_000, 30
"""An atlas of fewer is marked as thin: by then a share is known to 0.01, and an interval over rows is steady."""


def write_atlas(
    model: Model,
    out: str | Path,
    *,
    text: Any = None,
    measures: Sequence[str] | None = None,
    tokens: int = 20_000,
    length: int = 256,
    rows: int = 4,
    **options: Any,
) -> Path:
    """Measure a causal model and write its atlas: all measures that say so, as tables and as pages.

    Cost:  what `mt.measure` of its measures costs; docs/atlas.md has the figures of the default model.

    Args:
        model: an open causal model with a tokenizer.
        out: the folder to write; it must not exist, be empty, or hold an earlier atlas, which is replaced.
        text: a corpus, the path of a file, or texts; the documentation topics of the standard library by default.
        measures: which to run; all that are declared for the atlas by default. What the model lacks the sites for is
            left out, and the manifest says why.
        tokens: how many tokens of the text to read, 100 or more. Under 10,000, or under 30 rows, the manifest, the
            pages and the command say that the atlas is thin, and how exactly a share is known.
        length: tokens in a row.
        rows: rows in a batch.
        options: arguments of measures, such as ``examples=10``.

    Returns:
        The path of `index.html`.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        DataError: the text has under 100 tokens.
        ModelUnsupported: the model is not causal, or was opened without a tokenizer.
        ArgumentError: there is no such measure or argument, or fewer than 100 tokens are asked for.
    """
    out = Path(out)
    _require_enough(ArgumentError, "an atlas reads too few tokens", tokens, "ask for more with tokens=")
    check_out(out)
    _check_model(model)
    length = min(length, model.anatomy.n_ctx)
    chosen = [m.name for m in methods("measure").values() if m.atlas] if measures is None else list(measures)
    corpus = standard_library_text() if text is None else corpus_of(text)
    batches = TokenBatches(corpus, model.tokenizer, length=length, rows=rows, tokens=tokens)
    _require_enough(DataError, f"{corpus.name} has too few tokens for an atlas", len(batches.flat), "give it more text")
    place = out.resolve()
    with atomic(place, "the atlas to", folder=True) as partial:
        _make(model, batches, partial, chosen, options)
        check_out(place)  # it took minutes: something may have come meanwhile
    return out / "index.html"


def _require_enough(kind: type[MicrotomeError], what: str, tokens: int, do: str) -> None:
    if tokens < LEAST_TOKENS:
        raise error(kind, what, got=tokens, allowed=f"{LEAST_TOKENS} or more", do=do)


def thin(tokens: int, rows: int) -> list[str]:
    """In which ways an atlas of so many tokens in so many rows is thin: sentences, none where it is not."""
    found: list[str] = []
    if tokens < THIN_TOKENS:
        share = 1.96 * 0.5 / math.sqrt(tokens)
        found.append(
            f"{tokens:,} tokens were read: a share of them, such as a firing rate, is known to within {share:.2g} at "
            f"best (95 %), and what is rare was not seen. From {THIN_TOKENS:,} tokens on this mark goes."
        )
    if rows < THIN_ROWS:
        found.append(
            f"{rows} row{'s were' if rows > 1 else ' was'} read: intervals over so few examples are rough, and no "
            f"neuron has more examples than that. From {THIN_ROWS} rows on this mark goes."
        )
    return found


def _check_model(model: Model) -> None:
    model.require_next_token()
    if model.tokenizer is None:
        raise error(
            ModelUnsupported,
            f"{model.anatomy.name} was opened without a tokenizer",
            do="open it with tokenizer=, or open a folder that has one",
        )


def check_out(out: Path, force: bool = True) -> None:
    """Refuse a folder that must not be written to.

    Args:
        out: the folder.
        force: whether an earlier atlas may be replaced.

    Raises:
        OutputError: it is a file, or holds something that is not an atlas, alone or beside one; or it holds an atlas
            that may not be replaced.
    """
    if out.is_file():
        raise error(OutputError, f"{out} is a file", allowed="a folder", do="name another place")
    try:
        held = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_symlink() or not p.is_dir())
        held += sorted(p.name for p in out.iterdir() if p.is_dir()) if out.is_dir() and not held else []
    except OSError as problem:
        raise error(
            OutputError, f"cannot read the folder {out}", got=str(problem), do="check its permissions"
        ) from problem
    own = _files(out)
    foreign = [name for name in held if name not in own]
    if foreign:
        raise error(
            OutputError,
            f"the folder {out} exists and holds something that is not an atlas",
            got=", ".join(foreign[:5]),
            allowed="a new folder, an empty one, or an earlier atlas",
            do="name another folder",
        )
    if held and not force:
        do = "name another folder, or pass force=True to replace it"
        raise error(OutputError, f"the folder {out} exists and holds an earlier atlas", do=do)


def _files(folder: Path) -> set[str]:
    """The files of the atlas in a folder, as its manifest lists them; none if there is no atlas."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return set(manifest["files"]) if manifest["kind"] == KIND else set()
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _make(model: Model, batches: TokenBatches, folder: Path, chosen: Sequence[str], options: Mapping[str, Any]) -> None:
    started = time.perf_counter()
    report = current().report
    measured = run_measures(model, chosen, text=batches, options=options, lenient=True)
    found = [(method, data) for method, data in measured.datasets.items() if method.of != "model"]
    made = tables(model, found)
    report("writing", 0, 1)
    for name, table in made.items():
        pq.write_table(table, folder / f"{name}.parquet")
    cost = {**measured.seconds, "seconds": round(time.perf_counter() - started, 2), "peak_memory_bytes": peak_memory()}
    manifest = _manifest(model, batches, measured, cost, made)
    vocab = model.to_words(list(range(model.anatomy.d_vocab)))
    words = [vocab[t] for t in batches.flat]
    write_pages(folder, manifest, made, words, vocab)
    written = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest["files"] = ["manifest.json", *written]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    report("writing", 1, 1)


def _manifest(
    model: Model,
    batches: TokenBatches,
    measured: Measured,
    cost: Mapping[str, float],
    made: Mapping[str, pa.Table],
) -> dict[str, Any]:
    a, provenance = model.anatomy, model.provenance
    text = batches.corpus
    whole = {
        str(name): float(value) if math.isfinite(value) else None
        for method, data in measured.datasets.items()
        for name, value in data.data_vars.items()
        if method.of == "model"
    }
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
        "thin": thin(len(batches.flat), -(-len(batches.flat) // batches[0].tokens.shape[1])),
        **whole,
        "seed": current().seed,
        "versions": {k: provenance[k] for k in ("microtome", "transformers", "torch")} | {"pyarrow": pa.__version__},
        "cost": dict(cost),
        "measures": {
            method.name: {
                "question": method.question, "source": "; ".join(map(str, method.source)), "check": method.check,
                "looked_at": measured.looks[method.name],
            }
            for method in measured.datasets
        },
        "left_out": dict(measured.left_out),
        "tables": {name: {"rows": table.num_rows, "columns": described(table)} for name, table in made.items()},
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
