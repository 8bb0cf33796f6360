"""The main job: measure every layer, head and neuron of a model, and write its atlas.

An atlas is a folder: `layers.parquet`, `heads.parquet`, `neurons.parquet`, `groups.parquet` and what else was measured,
`manifest.json`, and `index.html` with its assets, which open from disk without a network. It is made beside its place
and moved there when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microtome.atlas._format import TEXT_FILE
from microtome.atlas._groups import DAMAGE, GROUPED
from microtome.atlas._kinds import for_pages
from microtome.atlas._labels import Labels
from microtome.atlas._manifest import manifest_tables, text_checksum
from microtome.atlas._measured import measured_atlas
from microtome.atlas._patterns import patterns_of
from microtome.atlas._place import check_out
from microtome.atlas._read import Atlas
from microtome.atlas._read import open as open_atlas
from microtome.atlas._texts import Reading, reading_of
from microtome.context import current
from microtome.errors import ArgumentError, DataError, MicrotomeError, ModelUnsupported, error
from microtome.files import atomic
from microtome.method import methods
from microtome.model import Model
from microtome.view import PAGES, write_labels, write_pages

PROFILES = {"quick": 5_000, "default": 20_000, "full": 100_000}
"""How many tokens each profile reads; what it measures is declared by the measures."""

LEAST_TOKENS = 100
"""Of fewer no atlas is made: a share of so many is known to 0.1 at best, which is more than most neurons differ."""


def write_atlas(
    model: Model,
    out: str | Path,
    *,
    text: Any = None,
    measures: Sequence[str] | None = None,
    profile: str = "default",
    tokens: int | None = None,
    length: int = 256,
    rows: int = 4,
    **options: Any,
) -> Path:
    """Measure a causal model and write its atlas: all measures that say so, as tables and as pages.

    Cost:  what `mt.measure` of its measures costs; docs/atlas.md has the figures of the default model.

    Args:
        model: an open causal model with a tokenizer.
        out: the folder to write; it must not exist, be empty, or hold an earlier atlas, which is replaced.
        text: a corpus, the path of a file, texts, or a mapping from groups (languages, domains) to these; a corpus of
            several groups has these; the documentation topics of the standard library by default.
        measures: which to run; by default those of the profile, and of a text of several groups those of groups.
            "damage" is one of them: what each group loses without the neurons of each. What the model lacks the sites
            for is left out, and the manifest says why.
        profile: "quick", without the measures that run the model many times; "default"; or "full", with all of them.
        tokens: how many tokens of the text to read, 100 or more; by default as the profile says. Under 10,000, or
            under 30 rows, the manifest, the pages and the command say that the atlas is thin, and how exactly a share
            is known.
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
    if profile not in PROFILES:
        do = "choose one of these"
        raise error(ArgumentError, "there is no such profile", got=profile, allowed=", ".join(PROFILES), do=do)
    tokens = PROFILES[profile] if tokens is None else tokens
    _require_enough(ArgumentError, "an atlas reads too few tokens", tokens, "ask for more with tokens=")
    check_out(out)
    _check_model(model)
    length = min(length, model.anatomy.n_ctx)
    reading = reading_of(text, model.tokenizer, tokens=tokens, length=length, rows=rows)
    _require_enough(
        DataError, f"{reading.name} has too few tokens for an atlas", len(reading.flat), "give it more text"
    )
    chosen = measures_of(profile, len(reading.groups)) if measures is None else list(measures)
    place = out.resolve()
    with atomic(place, "the atlas to", folder=True) as partial:
        made, manifest = measured_atlas(model, reading, chosen, options)
        _store(model, reading, partial, manifest | {"profile": profile}, made)
        check_out(place)  # it took minutes: something may have come meanwhile
    return out / "index.html"


def add_to_atlas(
    model: Model, folder: str | Path, measures: Sequence[str], *, text: Any = None, **options: Any
) -> Path:
    """Add measures to an atlas that was written, without measuring anew what it has.

    Cost:  what `mt.measure` of these measures costs, and writing the pages.

    Args:
        model: the model that the atlas is of.
        folder: of the atlas.
        measures: which to run; one that the atlas has is measured anew, and replaces its columns.
        text: that the atlas was made of, if it was not the documentation topics of the standard library.
        options: arguments of measures.

    Returns:
        The path of `index.html`.

    Raises:
        DataError: there is no atlas, or it is of another model or another text.
        ArgumentError: there is no such measure or argument.
        OutputError: the folder cannot be written.
    """
    before = open_atlas(folder)
    told = before.manifest["text"]
    if model.fingerprint != (own := before.manifest["model"]["fingerprint"]):
        do = "open the model that the atlas was made of"
        raise error(DataError, "the atlas is of another model", got=model.fingerprint, allowed=own, do=do)
    tokens = told.get("asked", told["tokens"])
    reading = reading_of(text, model.tokenizer, tokens=tokens, length=told["length"], rows=4)
    if text_checksum(reading) != told["sha256"]:
        do = "give the text that the atlas was made of with text="
        raise error(DataError, "the atlas was made of another text", got=reading.name, allowed=told["source"], do=do)
    old = {name: pq.read_table(before.path / f"{name}.parquet") for name in before.manifest["tables"]}
    made, manifest = measured_atlas(model, reading, list(measures), options, old)
    with atomic(before.path.resolve(), "the atlas to", folder=True) as partial:
        _store(model, reading, partial, _joined(before, manifest, made), made)
    return before.path / "index.html"


def _joined(before: Atlas, added: Mapping[str, Any], made: Mapping[str, pa.Table]) -> dict[str, Any]:
    """The manifest of an atlas to which measures were added."""
    old = before.manifest
    kept = {"kind", "format", "microtome", "created", "model", "text", "thin", "seed", "versions", "cost", "tables"}
    whole = {k: v for k, v in added.items() if k not in {*kept, "measures", "left_out"}}  # of the whole model
    log = {
        "measures": list(added["measures"]),
        "created": added["created"],
        "seed": added["seed"],
        "cost": added["cost"],
    }
    ran, left_out = added["measures"], added["left_out"]  # what is said of a measure is said of its last run
    return {
        **old, **whole, "text": {**added["text"], **old["text"]}, "tables": manifest_tables(made),
        "measures": {**{k: v for k, v in old["measures"].items() if k not in left_out}, **ran},
        "left_out": {**{k: v for k, v in old["left_out"].items() if k not in ran}, **left_out},
        "added": [*old.get("added", ()), log],
    }  # fmt: skip


def measures_of(profile: str, groups: int = 1) -> list[str]:
    """The measures that a profile of the atlas runs on a text of so many groups."""
    runs = {"quick": (True,), "default": (True, "default"), "full": (True, "default", "full")}[profile]
    of_groups = {"quick": (), "default": (GROUPED,), "full": (GROUPED, DAMAGE)}[profile] if groups > 1 else ()
    return [*(m.name for m in methods("measure").values() if m.atlas in runs), *of_groups]


def _require_enough(kind: type[MicrotomeError], what: str, tokens: int, do: str) -> None:
    if tokens < LEAST_TOKENS:
        raise error(kind, what, got=tokens, allowed=f"{LEAST_TOKENS} or more", do=do)


def _check_model(model: Model) -> None:
    model.require_next_token()
    if model.tokenizer is None:
        raise error(
            ModelUnsupported,
            f"{model.anatomy.name} was opened without a tokenizer",
            do="open it with tokenizer=, or open a folder that has one",
        )


def _store(
    model: Model, reading: Reading, folder: Path, manifest: dict[str, Any], made: Mapping[str, pa.Table]
) -> None:
    """Write tables, pages and manifest into a folder."""
    report = current().report
    report("writing", 0, 1)
    vocab = model.to_words(list(range(model.anatomy.d_vocab)))
    words = [vocab[t] for t in reading.flat]
    for name, table in (*made.items(), (Path(TEXT_FILE).stem, _text_table(words))):
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    told, shown = for_pages(manifest, {name: made[name] for name in made if name in PAGES})
    write_pages(folder, told, shown, words, vocab, patterns=patterns_of(model))
    write_labels(folder, Labels(model.fingerprint).read())
    written = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest["files"] = ["manifest.json", *written]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    report("writing", 1, 1)


def _text_table(words: Sequence[str]) -> pa.Table:
    """The words of a text; half a surrogate pair, which no file holds, becomes a question mark."""
    safe = [word.encode("utf-8", "replace").decode("utf-8") for word in words]
    return pa.table({"word": pa.array(safe, pa.string()).dictionary_encode()})
