"""A small fake atlas, and a browser without a window that opens its pages from disk and gives back what it drew."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from microtome.view import Passage, Patterns

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=4000", "--dump-dom",
)  # fmt: skip

LAYERS, HEADS, NEURONS, LENGTH = 3, 4, 70, 32

IMAGE = "</script><img src=x onerror=document.title='broken'>"
HOSTILE = [IMAGE, '"; alert(1)//', "a\u2028b", "\\", "<!--", "\u202eright"]
"""Tokens that would break a page which did not escape them."""

WORDS = [*HOSTILE, " Paris", " is", " the", " capital", "\n", "\t", "  ", " ", "\ud83d", "é", " France"]


DRAWN: dict[str, dict[str, Any]] = {
    "new_measure": {"chart": "New together", "title": "one", "control": "new_random"},
    "attn_share": {"chart": "Added", "title": "attention"},
    "new_other": {"chart": "New together", "title": "other"},
    "new_head": {"title": "new <i>score", "control": "new_head_random"},
}
"""What the manifest says of how to draw columns that no page has heard of."""


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of a Chromium; tests that need one are skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on PATH (looked for {', '.join(NAMES)})")
    return found


@pytest.fixture
def dom(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], str]:
    """Open a page at a hash route, and return its document as HTML."""

    def open_page(page: Path, route: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", page.as_uri() + route]
        try:
            done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        finally:
            shutil.rmtree(profile, ignore_errors=True)
        return done.stdout.decode("utf-8", errors="replace")

    return open_page


@pytest.fixture
def text(dom: Callable[[Path, str], str]) -> Callable[[Path, str], str]:
    """The same, as the text that a reader sees: no tags, single spaces."""

    def read(page: Path, route: str) -> str:
        body = dom(page, route).split("<main", 1)[1]
        plain = html.unescape(re.sub(r"<[^>]*>", " ", "<main" + body))
        return re.sub(r"[^\S\u2028]+", " ", plain)

    return read


@pytest.fixture(scope="session")
def fake() -> dict[str, Any]:
    """A small atlas of a model that does not exist, as the keyword arguments of `write_pages` after the folder."""
    g = np.random.default_rng(7)
    vocab = [*WORDS, *(f" word{i}" for i in range(200)), "never used"]
    tokens = [vocab[i] for i in g.integers(0, len(vocab) - 1, 20 * LENGTH)]
    tables = {"layers": _layers(g), "heads": _heads(g), "neurons": _neurons(g, tokens, len(vocab) - 1)}
    manifest = {
        "model": {
            "name": "Fake <b>& small", "family": "fake", "fingerprint": "ab" * 32, "n_layers": LAYERS, "d_model": 16,
            "n_heads": HEADS, "n_kv_heads": 2, "d_head": 4, "d_mlp": NEURONS, "d_vocab": len(vocab),
            "parameters": 12345, "gated": True, "dtype": "float32",
        },
        "text": {"source": "made up", "tokens": len(tokens), "sequences": 20, "length": LENGTH, "sha256": "cd" * 32},
        "seed": 7, "versions": {"python": "3.11"}, "cost": {"seconds": 700.0, "peak_memory_bytes": 3 * 2**30},
        "created": "2026-01-01T00:00:00Z", "loss": float("nan"), "microtome": "0",
        "tables": {
            name: {"columns": {column: _described(column) for column in table.column_names}}
            for name, table in tables.items()
        },
    }  # fmt: skip
    return {"manifest": manifest, "tables": tables, "tokens": tokens, "vocab": vocab, "patterns": _patterns(g)}


def _patterns(g: np.random.Generator) -> Patterns:
    """Of all layers but the last."""
    passages = (Passage("First", "some words", tuple(WORDS[:9])), Passage("Second", "others", tuple(WORDS[6:10])))

    def causal(n: int) -> np.ndarray:
        weights = np.tril(g.random((HEADS, n, n)) ** 3)
        return weights / weights.sum(-1, keepdims=True)

    layers = {layer: [causal(len(p.tokens)) for p in passages] for layer in range(LAYERS - 1)}
    return Patterns(passages, layers, {LAYERS - 1: "no attention <here>"})


def _described(column: str) -> dict[str, Any]:
    return {"unit": "unit", "meaning": f"meaning of {column}"} | DRAWN.get(column, {})


def _with_interval(columns: dict[str, Any], name: str, values: np.ndarray) -> None:
    columns |= {name: values, f"{name}_lo": values - 0.05, f"{name}_hi": values + 0.05}


def _layers(g: np.random.Generator) -> pa.Table:
    columns: dict[str, Any] = {"layer": np.arange(LAYERS)}
    norms, shares = ("resid_pre_norm", "resid_mid_norm", "resid_post_norm"), ("attn_share", "mlp_share")
    for name in (*norms, *shares, "new_measure"):
        columns[name] = g.random(LAYERS) + 1
    columns["new_random"], columns["new_other"] = [1.5, 1.0, 1.25], [1.25, 1.75, 1.5]
    columns["max_abs_dim"] = [3, 1, 15]
    columns["median_abs"] = [0.25, None, float("inf")]
    _with_interval(columns, "loss_skip_attn", g.random(LAYERS) + 3)
    return pa.table(columns)


def _heads(g: np.random.Generator) -> pa.Table:
    rows = LAYERS * HEADS
    head = np.tile(np.arange(HEADS), LAYERS)
    columns: dict[str, Any] = {"layer": np.repeat(np.arange(LAYERS), HEADS), "head": head, "kv_head": head // 2}
    for name in ("previous_token", "induction"):
        _with_interval(columns, name, g.random(rows))
    columns["entropy"] = g.random(rows) * 3
    columns["new_head"], columns["new_head_random"] = np.arange(rows) * 0.11 + 1, np.arange(rows) / 64
    columns["label"] = [f"role {i}" for i in range(rows)]
    return pa.table(columns)


def _neurons(g: np.random.Generator, tokens: list[str], used: int) -> pa.Table:
    rows = LAYERS * NEURONS
    columns: dict[str, Any] = {
        "layer": np.repeat(np.arange(LAYERS), NEURONS),
        "neuron": np.tile(np.arange(NEURONS), LAYERS),
        "firing_rate": g.random(rows),
        "mean": g.normal(size=rows).astype(np.float32),
        "max": g.permutation(rows) + 0.25,
    }
    promoted = g.integers(len(WORDS), used, (rows, 4))
    promoted[75, :2] = [WORDS.index(" Paris"), 0]  # neuron 1.5
    suppressed = g.integers(len(WORDS), used, (rows, 4))
    suppressed[75, :4] = [1, 2, 3, WORDS.index("\n")]
    index = g.integers(0, len(tokens), (rows, 2))
    index[75] = [LENGTH, 2 * LENGTH - 1]  # first and last token of sequence 1
    columns |= {
        "promoted": promoted.astype(np.int32).tolist(),
        "promoted_logit": (g.random((rows, 4)) + 1).tolist(),
        "suppressed": suppressed.astype(np.int32).tolist(),
        "suppressed_logit": (-g.random((rows, 4)) - 1).tolist(),
        "example_index": index.tolist(),
        "example_value": (g.random((rows, 2)) * 9).tolist(),
        "example_start": (index // LENGTH * LENGTH).tolist(),
    }
    return pa.table(columns)
