"""Harvest: the activations of any number of sites on a text, written to disk in one pass.

Documents keep their borders: no row holds two. A harvest that was ended in any way goes on where it was, and gives the
same bytes as one that was not.

Cost:  the forwards, up to the last site that is named, and one write of what is kept; memory does not grow with the
       text. benchmarks/harvest.py compares it with a raw write of the same bytes.
Check: what is read back is what a run of each row alone captures; tests/laws/test_harvest.py.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microtome.anatomy import Address
from microtome.cluster import spread
from microtome.context import current
from microtome.errors import (
    ArgumentError,
    DataError,
    MicrotomeWarning,
    ModelUnsupported,
    OutputError,
    error,
)
from microtome.model import Model, Recipe
from microtome.stream._batches import bos_id
from microtome.stream._corpus import Corpus, standard_library_text
from microtome.stream._documents import Position, Row, rows_of
from microtome.stream._harvested import Harvest
from microtome.stream._places import Kept, kept_of
from microtome.stream._read import corpus_of
from microtome.stream._records import (
    FORMAT,
    KIND,
    MANIFEST,
    OWN,
    Record,
    digest_of,
    manifest_of,
    record_name,
    records_of,
)
from microtome.stream._shard import DTYPES, Layout
from microtome.stream._store import Store, store_of
from microtome.stream._workers import HarvestWorker
from microtome.stream._writer import Writer

SHARD, MOST = 2**29, 2**20
"""Bytes of a shard, about; and its tokens at most, whose rows are in memory."""


def harvest(
    model: Model,
    *,
    sites: str | Address | Iterable[str | Address],
    out: str | os.PathLike[str],
    text: Any = None,
    dtype: str | None = None,
    tokens: int | None = None,
    length: int = 256,
    rows: int = 8,
    seed: int | None = None,
    shard_tokens: int | None = None,
    force: bool = False,
    verify: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Harvest:
    """Write the activations of sites on every token of a text to disk, in one pass.

    Each row holds one document, or a piece of one that is longer than `length`: such pieces do not see each other, and
    a warning says how many documents that concerns. What a tokenizer puts before every text is read and not kept.

    Under ``mt.settings(ray=...)`` the actors of a Ray cluster make the shards: they open the model by its name, and
    write to `out` by themselves, so that every machine must reach both.

    Cost:  the forwards, up to the last site that is named, and one write of what is kept.
    Check: tests/laws/test_harvest.py.

    Args:
        model: an open model with a tokenizer.
        sites: addresses, in one text with commas between them or in a list: ``"*.resid_post,*.mlp.post[0-99]"``.
        out: a folder, or a URL of a file system that fsspec knows, such as "s3://bucket/harvest". An unfinished harvest
            of the same model, sites and text that lies there goes on; a finished one is left as it is.
        text: what `corpus_of` takes; the documentation topics of the standard library by default.
        dtype: "float32", "bfloat16", "float16" or "int8", which keeps round(x / s) and, as "SITE.scale",
            s = max |x| / 127 over the units of each token: an error of s / 2 at most. That of the model by default.
        tokens: how many tokens of the text to read, all of them by default.
        length: tokens in a row at most; the model's context at most.
        rows: `length * rows` is how many tokens a batch has, about.
        seed: shuffles the documents, see `Corpus.shuffled`; in their own order by default.
        shard_tokens: tokens of a shard at most; as many as make 512 MiB by default, or 2**20.
        force: whether a harvest of something else that lies there may be replaced.
        verify: whether the checksums of the shards that are there are compared first; else their sizes alone.
        options: of the file system, as `fsspec.filesystem` takes them.

    Returns:
        The `Harvest`, open for reading.

    Raises:
        SiteError: an address matches nothing, or its site has no value for each token.
        ArgumentError: there is no such dtype or cluster, or a number is too small.
        DataError: the text cannot be read or gives no tokens; or a value is not finite, or does not fit into the dtype:
            the site and the document are named, and the shards before stay.
        OutputError: something else lies there, or it cannot be written; the shards that are whole stay.
        ModelError: the model has no tokenizer, or workers cannot open it by its name.
    """
    _check_numbers(tokens=(tokens, 1), length=(length, 2), rows=(rows, 1), shard_tokens=(shard_tokens, 1))
    kept, layout = _layout(model, sites, dtype)
    store, length = store_of(out, options), min(length, model.anatomy.n_ctx)
    sizes = store.sizes()
    job = _Job(model, kept, layout, store, sizes, _earlier(store, sizes), length, length * rows, tokens)
    shard_tokens = shard_tokens or max(length, min(MOST, SHARD // layout.bytes_a_token))
    done = job.go(_corpus(text, seed), {"rows": rows, "seed": seed, "shard_tokens": shard_tokens}, force, verify)
    _tell_of_long(done, length, model.anatomy.n_ctx)
    return Harvest(out, options=options)


@dataclass
class _Job:
    """A harvest that is made, or goes on."""

    model: Model
    kept: Sequence[Kept]
    layout: Layout
    store: Store
    sizes: Mapping[str, int]
    earlier: Mapping[str, Any] | None
    length: int
    batch: int
    tokens: int | None

    def go(self, corpus: Corpus, more: Mapping[str, Any], force: bool, verify: bool) -> dict[int, Record]:
        """Make what is missing; the records of all shards, by number."""
        asked = _asked(self.model, self.layout, corpus) | {"tokens": self.tokens, "length": self.length, **more}
        if self.earlier is not None and self.earlier["asked"] != asked:
            self.sizes = _replace(self.store, self.sizes, self.earlier["asked"], asked, force=force)
            self.earlier = None
        digest, earlier = digest_of(asked), self.earlier
        manifest = {"kind": KIND, "format": FORMAT, "asked": asked, "digest": digest, **_about(self.model, corpus)}
        if earlier is None:
            self.store.write(MANIFEST, _json({**manifest, "complete": False}))
        done = whole_shards(self.store, self.sizes, digest, verify=verify)
        if earlier and earlier["complete"] and len(done) == len(earlier["shards"]):
            return done
        plan = plan_of_shards(
            corpus, self.model.tokenizer, length=self.length, tokens=self.tokens, shard_tokens=more["shard_tokens"],
            done=done,
        )  # fmt: skip
        _note_all(self._made(plan, digest), done, corpus, self.tokens)
        _finish(self.store, manifest, done, corpus)
        return done

    def _made(self, plan: Iterator[tuple[int, list[Row]]], digest: str) -> Iterator[tuple[int, Record]]:
        """The shards of a plan, as they are made here or elsewhere."""
        cluster = current().ray
        if cluster is None:
            writer = Writer(self.model, self.kept, self.layout, self.store, self.batch, digest)
            return ((number, writer.write(number, rows)) for number, rows in plan)
        recipe = Recipe.of(self.model, cluster.threads)
        start = (recipe, self.layout, self.store.reach, self.store.options, self.batch, digest)
        return spread(cluster, HarvestWorker, start, ((number, (number, rows)) for number, rows in plan))


def _corpus(text: Any, seed: int | None) -> Corpus:
    corpus = standard_library_text() if text is None else corpus_of(text)
    return corpus if seed is None else corpus.shuffled(seed)


def _layout(model: Model, sites: Any, dtype: str | None) -> tuple[list[Kept], Layout]:
    """What is kept, and how.

    Raises:
        ArgumentError: there is no such dtype.
        ModelUnsupported: the model has no tokenizer.
    """
    own = {kind: name for name, (kind, _, _) in DTYPES.items()}.get(model.dtype, "float32")
    dtype = own if dtype is None else dtype
    if dtype not in DTYPES:
        raise error(ArgumentError, "no such dtype of a harvest", got=repr(dtype), allowed=", ".join(DTYPES))
    kept = kept_of(model.anatomy, sites)
    if model.tokenizer is None:
        do = "open it with tokenizer="
        raise error(ModelUnsupported, f"{model.anatomy.name} has no tokenizer to read a text with", do=do)
    return kept, Layout({one.name: one.shape for one in kept}, dtype)


def _check_numbers(**numbers: tuple[int | None, int]) -> None:
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise error(ArgumentError, f"{name} is too small for a harvest", got=value, allowed=f"{least} or more")


def _asked(model: Model, layout: Layout, corpus: Corpus) -> dict[str, Any]:
    """What decides every byte of a harvest, as far as the machine does not."""
    return {
        "model": model.fingerprint,
        "sites": {name: list(shape) for name, shape in layout.sites.items()},
        "dtype": layout.dtype,
        "text": corpus.sha256,
        "groups": f"{zlib.crc32(chr(0).join(corpus.groups).encode()):08x}",
    }


def _about(model: Model, corpus: Corpus) -> dict[str, Any]:
    """What else is good to know of a harvest."""
    bos = bos_id(model.tokenizer)
    return {
        "model": dict(model.provenance),
        "text": {"name": corpus.name, "sha256": corpus.sha256},
        "rows_begin_with": None if bos is None else model.to_words([bos])[0],
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _earlier(store: Store, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The manifest of the harvest that lies in a place, if one does.

    Raises:
        OutputError: something else lies there.
    """
    foreign = sorted(name for name in sizes if not OWN.fullmatch(name))
    try:
        manifest = manifest_of(store, sizes)
    except DataError as problem:
        do = "name another place"
        raise error(OutputError, f"{store.place} holds no harvest that can go on", got=problem.told, do=do) from problem
    if foreign or (manifest is None and sizes):
        what, allowed = f"{store.place} holds something that is not a harvest", "a new place, or an earlier harvest"
        got = ", ".join((foreign or sorted(sizes))[:5])
        raise error(OutputError, what, got=got, allowed=allowed, do="name another place")
    return manifest


def _replace(
    store: Store, sizes: Mapping[str, int], there: Mapping[str, Any], asked: Mapping[str, Any], *, force: bool
) -> dict[str, int]:
    """Delete a harvest of something else, its manifest last.

    Raises:
        OutputError: that was not allowed; what differs is named.
    """
    if not force:
        other = next(name for name in {**there, **asked} if there.get(name) != asked.get(name))
        got, allowed = f"{other} {_short(asked.get(other))}", f"{other} {_short(there.get(other))}, to go on with it"
        do = "name another place, or pass force=True to replace it"
        raise error(OutputError, f"{store.place} holds a harvest of something else", got=got, allowed=allowed, do=do)
    for name in sorted(sizes, key=lambda name: (name == MANIFEST, not name.endswith(".json"))):
        store.remove(name)
    return {}


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole_shards(store: Store, sizes: Mapping[str, int], digest: str, *, verify: bool) -> dict[int, Record]:
    """The shards that are whole, by number; each that is not is named in a warning, and made anew."""
    store.sweep()
    found = records_of(store, sizes, digest)
    for number, record in list(found.items()):
        faults = record.faults(sizes)
        if verify and not faults:
            faults = Harvest.faults_of(store, record)
        if faults:
            what = f"{store.place}: {'; '.join(faults)}. Shard {number} is made anew"
            warnings.warn(what, MicrotomeWarning, stacklevel=3)
            store.remove(record_name(number))
            del found[number]
    return found


def plan_of_shards(
    corpus: Corpus,
    tokenizer: Any,
    *,
    length: int,
    tokens: int | None,
    shard_tokens: int,
    done: Mapping[int, Record],
) -> Iterator[tuple[int, list[Row]]]:
    """The shards that are to be made, each with its rows: rows in order, as many as fit. Those done are passed over.

    A shard depends on where the one before it ends, and on nothing else: one that is made anew is the same.
    """
    number, place, left = 0, Position(), tokens
    while True:
        while number in done:
            place, number = done[number].go_on, number + 1
            left = None if left is None else left - done[number - 1].tokens
        rows, size = list[Row](), 0
        for row in rows_of(corpus, tokenizer, length=length, tokens=left, start=place):
            if rows and size + len(row.tokens) > shard_tokens:
                yield number, rows
                place, number = rows[-1].next, number + 1
                left = None if left is None else left - size
                rows, size = [], 0
                if number in done:
                    break
            rows.append(row)
            size += len(row.tokens)
        else:
            if rows:
                yield number, rows
            return


def _note_all(
    made: Iterator[tuple[int, Record]],
    done: dict[int, Record],
    corpus: Corpus,
    tokens: int | None,
) -> None:
    """Note the shards as done as they come."""
    held = corpus.documents
    known = tokens or (len(held) if isinstance(held, tuple) else 0)

    def report(end: bool = False) -> None:
        reached = sum(r.tokens if tokens else r.documents for r in done.values())
        everything = reached if end else max(known, reached + 1)
        current().report("harvesting", reached, everything)

    report()
    for number, record in made:
        done[number] = record
        report()
    report(end=True)


def _finish(store: Store, manifest: Mapping[str, Any], done: Mapping[int, Record], corpus: Corpus) -> None:
    """Write the manifest of a harvest that is complete.

    Raises:
        DataError: there were no tokens.
    """
    if not done:
        raise error(DataError, f'corpus "{corpus.name}" gives no tokens', do="give it more text")
    store.sweep()  # workers that died have left what they had in hand
    records = [done[number] for number in sorted(done)]
    store.write(MANIFEST, _json({
        **manifest, "complete": True,
        "tokens": sum(r.tokens for r in records), "rows": sum(r.rows for r in records),
        "documents": sum(r.documents for r in records), "split": sum(r.split for r in records),
        "shards": [json.loads(r.text()) for r in records],
    }))  # fmt: skip


def _tell_of_long(done: Mapping[int, Record], length: int, context: int) -> None:
    """Warn of documents that do not fit into a row."""
    split, documents = sum(r.split for r in done.values()), sum(r.documents for r in done.values())
    if split:
        most = f"; up to length={context:,} is possible" if length < context else ", the model's context"
        what = (
            f"{split:,} of {documents:,} documents are longer than a row of {length:,} tokens{most}: "
            "they were read in pieces that do not see each other"
        )
        warnings.warn(what, MicrotomeWarning, stacklevel=3)
