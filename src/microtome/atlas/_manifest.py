"""What an atlas says of itself: what was measured, on which model and text, with which seed, at what cost."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from microtome.atlas._format import FORMAT, KIND
from microtome.atlas._tables import described
from microtome.atlas._texts import Reading
from microtome.context import current
from microtome.measurements import CONTEXT
from microtome.method.runner import Measured
from microtome.model import Model

THIN_TOKENS, THIN_ROWS = 10_000, 30
"""An atlas of fewer is marked as thin: by then a share is known to 0.01, and an interval over rows is steady."""


def manifest_of(
    model: Model,
    reading: Reading,
    measured: Measured,
    cost: Mapping[str, float],
    made: Mapping[str, pa.Table],
) -> dict[str, Any]:
    """The manifest of an atlas, but for the list of its files.

    Args:
        model: that was measured.
        reading: the text that was read.
        measured: what the measures gave.
        cost: seconds by stage and in all, and the most memory.
        made: its tables.
    """
    a, provenance = model.anatomy, model.provenance
    whole = {
        str(name): _plain(value.values.tolist())
        for method, data in measured.datasets.items()
        for name, value in data.data_vars.items()
        if method.of == "model"
    }
    return {
        "kind": KIND,
        "format": FORMAT,
        "microtome": provenance["microtome"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": a.name, "family": a.model_type, "fingerprint": model.fingerprint, "n_layers": a.n_layers,
            "d_model": a.d_model, "n_heads": a.n_heads, "n_kv_heads": a.n_kv_heads, "d_head": a.d_head,
            "d_mlp": a.d_mlp, "d_vocab": a.d_vocab, "parameters": model.n_parameters, "gated": a.gated,
            "parallel": a.parts.form == "parallel", "dtype": provenance["dtype"],
        },
        "text": {
            "source": reading.name, "tokens": len(reading.flat), "asked": reading.asked, "length": reading.length,
            "rows_begin_with": None if reading.beginning is None else model.to_words([reading.beginning])[0],
            "sequences": reading.sequences, "documents": "joined within a group, and attend over their borders",
            "sha256": text_checksum(reading), "short": reading.short,
            "examples": list(CONTEXT), "groups": list(reading.groups),
        },
        "thin": thin(len(reading.flat), reading.sequences),
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
        "tables": manifest_tables(made),
    }  # fmt: skip


def text_checksum(reading: Reading) -> str:
    """SHA-256 of the tokens of a text."""
    return hashlib.sha256(str(reading.flat).encode()).hexdigest()


def manifest_tables(made: Mapping[str, pa.Table]) -> dict[str, Any]:
    """What each table holds: its rows, and what each column says of itself."""
    return {name: {"rows": table.num_rows, "columns": described(table)} for name, table in made.items()}


def _plain(value: Any) -> Any:
    """A number, or lists of them, with None for what JSON cannot hold."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
