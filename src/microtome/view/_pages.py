"""The pages of an atlas: one page with hash routes, its scripts, and its data as scripts.

    index.html              opens from disk; everything else is loaded by it, when it is needed
    assets/*.js, *.css      the pages themselves, copied from `static/`
    assets/data/model.js    the manifest, the layer and head tables, and what the overview shows of the neurons
    assets/data/neurons/    one file per layer: the numbers and promoted tokens of its neurons, for lists
    assets/data/details/    files of 512 neurons of a layer: examples and tokens, for the page of a neuron
    assets/data/patterns/   one file per layer: what its heads attend to in short passages, for their pages
    assets/data/vocab.js    the vocabulary strings that neurons promote or suppress
    assets/data/groups.js, groups/, labels.js    see `_group_pages`
    assets/data/text.js     the distinct strings of the text; `assets/data/text/` holds its tokens in chunks

Nothing is loaded from a network. A page opened from disk may not fetch, which is why the data are scripts too.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa

from microtome.errors import DataError, OutputError, error
from microtome.view._group_pages import write_groups, write_labels
from microtome.view._page_data import (
    by_layer,
    check_examples,
    count_classes,
    count_firing,
    encode,
    hundredths,
    literal,
    pack_tokens,
    reindex_vocab,
    script,
    split_columns,
    strings_of,
)
from microtome.view._patterns import Patterns, write_patterns

SCRIPTS = (
    "dom.js", "save.js", "names.js", "data.js", "chart.js", "query.js", "list.js", "diagram.js", "matrix.js",
    "groups.js", "relations.js", "patterns.js", "figures.js", "overview.js", "units.js", "atlas.js",
)  # fmt: skip
STYLES = ("atlas.css", "groups.css", "figures.css")

DIGITS = 6
"""Significant digits of the layer and head tables."""

NEURON_DIGITS = 4
"""Significant digits of the neuron table, which is large."""

UNITS = {"layers": ("layer",), "heads": ("layer", "head"), "neurons": ("layer", "neuron")}

PAGES = UNITS | {
    "groups": ("group_name",), "group_layers": ("group_name", "layer"), "damage": ("neurons_of", "group_name"),
}  # fmt: skip
"""The tables that have pages, and the columns that name their rows."""

CHUNK = 65536
"""Tokens of the text in one data file."""

PART = 512
"""Neurons in one data file of details: the page of a neuron loads one of them."""


def write_pages(
    folder: Path,
    manifest: dict[str, Any],
    tables: Mapping[str, pa.Table],
    tokens: list[str],
    vocab: list[str],
    *,
    patterns: Patterns | None = None,
) -> Path:
    """Write the pages of an atlas into a folder, to be opened from disk without a network.

    Writes straight into `folder`; a caller that wants all or nothing gives a temporary folder and renames it.

    Args:
        folder: where to write; made if it is not there.
        manifest: what was measured, on which model and text, at which cost. Its `["tables"][table]["columns"][name]`
            describes a column: `unit` and `meaning`, and where wanted its `title`, the `chart` that it shares with
            others, whether that is `log`, and the name of its `control`.
        tables: "layers", one row per layer with a column `layer`; "heads", with columns `layer` and `head`; "neurons",
            with columns `layer` and `neuron`, whose list columns `promoted` and `suppressed` hold vocabulary ids, and
            `example_index` and `example_start` places in `tokens`; `example_around` are the activations around each,
            from `manifest["text"]["examples"][0]` tokens before it; and of groups of the text "groups", "group_layers"
            and "damage". A table that is not there has no rows.
        tokens: every token of the text, in order.
        vocab: every string of the vocabulary; only those in use are written.
        patterns: what the heads attend to in short passages.

    Columns beyond those named are shown too, each in its place: floats are drawn, on the overview as well; integers,
    booleans, text and lists of numbers are listed. `X_lo` and `X_hi` are the ends of the 95 % interval of `X`.

    Returns:
        The path of `index.html`.

    Raises:
        DataError: a table has no pages, lacks a column it must have, or points outside the text or the vocabulary.
        OutputError: the folder cannot be written.
    """
    if unknown := [name for name in tables if name not in PAGES]:
        raise error(DataError, f'there are no pages for a table "{unknown[0]}"', allowed=", ".join(PAGES))
    layers, heads, neurons = (tables[name] if name in tables else _without_rows(keys) for name, keys in UNITS.items())
    for name, table in tables.items():
        _require(name, table, PAGES[name])
    check_examples(neurons, len(tokens))
    neurons, strings = reindex_vocab(neurons, vocab)
    if context := manifest.get("text", {}).get("examples"):
        neurons = hundredths(neurons, context[0])
    try:
        told = write_patterns(Path(folder) / "assets" / "data", patterns)
        path = _write(Path(folder), manifest, layers, heads, neurons, tokens, strings, {"patterns": told})
        write_groups(path.parent / "assets" / "data", tables, neurons)
        write_labels(path.parent, {})
        return path
    except OSError as problem:
        raise error(OutputError, f"the pages cannot be written to {folder}", got=str(problem)) from problem


def _write(
    folder: Path,
    manifest: dict[str, Any],
    layers: pa.Table,
    heads: pa.Table,
    neurons: pa.Table,
    tokens: list[str],
    strings: list[str],
    more: Mapping[str, str],
) -> Path:
    """Write every file; token columns of `neurons` point into `strings`, and `more` is the JSON of further values."""
    data = folder / "assets" / "data"
    for room in ("neurons", "details", "text"):
        (data / room).mkdir(parents=True, exist_ok=True)
    counts = _write_neurons(data, neurons, strings)
    _save(data, "vocab", literal(strings))
    _write_text(data, tokens)
    model = {
        "manifest": literal(manifest),
        "layers": encode(layers.sort_by("layer"), DIGITS),
        "heads": encode(heads.sort_by([("layer", "ascending"), ("head", "ascending")]), DIGITS),
        "firing": literal(count_firing(neurons)),
        "classes": literal(count_classes(neurons, manifest.get("tables", {}).get("neurons", {}).get("columns", {}))),
        "neurons": literal(counts),
        "part": literal(PART),
        **more,
    }
    _save(data, "model", "{" + ",\n".join(f"{literal(key)}:{value}" for key, value in model.items()) + "}")
    return _write_static(folder, str(manifest.get("model", {}).get("name", "a model")))


def _write_neurons(data: Path, neurons: pa.Table, strings: Sequence[str]) -> list[dict[str, int]]:
    """Write the neurons layer by layer, their details in parts, and return the layers with their number of neurons."""
    listed, details = split_columns(neurons)
    counts: list[dict[str, int]] = []
    for layer, table in by_layer(neurons, "neuron"):
        _save(data, f"neurons/{layer}", encode(table, NEURON_DIGITS, listed))
        (data / f"details/{layer}").mkdir(exist_ok=True)
        for number, start in enumerate(range(0, table.num_rows, PART)):
            part = table.slice(start, PART)
            words = literal(strings_of(part, strings))
            _save(data, f"details/{layer}/{number}", f'{encode(part, NEURON_DIGITS, details)[:-1]},"strings":{words}}}')
        counts.append({"layer": layer, "rows": table.num_rows})
    return counts


def _write_text(data: Path, tokens: list[str]) -> None:
    """Write the text as distinct strings, and as chunks of places in them that load on demand."""
    strings, ids = pack_tokens(tokens)
    _save(data, "text", literal({"tokens": len(ids), "chunk": CHUNK, "strings": strings}))
    for number, start in enumerate(range(0, len(ids), CHUNK)):
        _save(data, f"text/{number}", literal(ids[start : start + CHUNK]))


def _write_static(folder: Path, name: str) -> Path:
    """Copy the scripts and styles, and write index.html around them."""
    static = files("microtome.view") / "static"
    for asset in SCRIPTS + STYLES:
        (folder / "assets" / asset).write_bytes((static / asset).read_bytes())
    page = Template((static / "index.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(name),
        styles="\n".join(f'<link rel="stylesheet" href="assets/{style}">' for style in STYLES),
        scripts="\n".join(f'<script defer src="assets/{part}"></script>' for part in SCRIPTS),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _save(data: Path, name: str, value: str) -> None:
    (data / f"{name}.js").write_text(script(name, value), encoding="ascii")


def _without_rows(keys: tuple[str, ...]) -> pa.Table:
    return pa.table({key: pa.array([], pa.int32()) for key in keys})


def _require(name: str, table: pa.Table, needed: tuple[str, ...]) -> None:
    missing = [column for column in needed if column not in table.column_names]
    if missing:
        raise error(DataError, f'the table "{name}" lacks {", ".join(missing)}', got=", ".join(table.column_names))
