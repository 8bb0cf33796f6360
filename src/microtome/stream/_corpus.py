"""Text to run a model on: named documents with groups and a checksum.

Every machine has some: `standard_library_text` (English prose about Python) and `standard_library_code`. Files are read
by `read_text`.

Check: tests/unit/test_stream_corpus.py.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain, islice

import numpy as np

from microtome.errors import DataError, error
from microtome.shown import brief, shown

WINDOW = 8_192
"""Documents that are in memory at a time where a text that is read as it goes is shuffled."""
CODE_MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "fractions", "functools", "gzip", "heapq", "inspect", "mailbox", "pathlib",
    "pprint", "queue", "random", "shutil", "statistics", "string", "tarfile", "textwrap", "threading", "zipfile",
)  # fmt: skip


@shown
@dataclass(frozen=True)
class Corpus:
    """Documents, in order.

    Args:
        name: what to call it in results.
        documents: texts; a tuple, or something that can be iterated more than once.
        groups: one name for all documents, or one name per document.
        sha256: checksum of the text, or of the file that it is read from.
    """

    name: str
    documents: Iterable[str]
    groups: tuple[str, ...]
    sha256: str

    @classmethod
    def of(cls, name: str, documents: Iterable[str], groups: str | Iterable[str] | None = None) -> Corpus:
        """A corpus of texts in memory.

        Args:
            name: what to call it in results.
            documents: texts.
            groups: one name for all (`name` by default), or one name per document.

        Raises:
            DataError: when there are no documents, or not as many groups as documents.
        """
        texts = tuple(documents)
        names = (name,) if groups is None else (groups,) if isinstance(groups, str) else tuple(groups)
        if not any(text.strip() for text in texts):
            raise error(DataError, f'corpus "{name}" has no text', got=f"{len(texts)} documents")
        if len(names) not in (1, len(texts)):
            got, allowed = f"{len(names)} groups for {len(texts)} documents", "one for all, or one per document"
            raise error(DataError, f'corpus "{name}": the groups do not fit', got=got, allowed=allowed)
        return cls(name, texts, names, _sha256(texts))

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)

    def _facts(self) -> dict[str, str]:
        """How much there is of it, and how it begins; a file that is read as it goes is not read for that."""
        texts = self.documents
        held = (
            f"{len(texts):,} texts of {sum(map(len, texts)):,} characters, {brief(texts[0])}"
            if isinstance(texts, tuple)
            else brief(texts)
        )
        groups = dict.fromkeys(self.groups)
        return {"name": brief(self.name), "documents": held, "groups": brief(tuple(groups)), "sha256": self.sha256[:16]}

    def group_of(self, document: int) -> str:
        """The group of a document, by its number from 0."""
        return self.groups[0] if len(self.groups) == 1 else self.groups[document]

    def shuffled(self, seed: int) -> Corpus:
        """The same documents in another order, which the seed alone decides.

        Texts in memory are shuffled as a whole; those that are read as they go within 8,192 documents at a time, so
        that no more are ever held. Each document keeps its group; `numbered` says which one it was.
        """
        if isinstance(self.documents, Shuffled):
            raise error(DataError, f'corpus "{self.name}" is shuffled already', do="shuffle the one it was made from")
        held = self.documents if isinstance(self.documents, tuple) else None
        order = Shuffled(self.documents, seed, WINDOW if held is None else max(1, len(held)))
        groups = self.groups
        if len(groups) > 1:
            groups = tuple(groups[number] for number in order.numbers(len(groups)))
        return replace(self, documents=order, groups=groups)

    def numbered(self, first: int = 0) -> Iterator[tuple[int, str]]:
        """The documents from one on, each with its number in what the corpus was read from."""
        if isinstance(self.documents, Shuffled):
            return islice(self.documents.numbered(), first, None)
        return islice(enumerate(self.documents), first, None)


@dataclass(frozen=True)
class Shuffled:
    """Documents in an order by seed: each window of them in an order of its own."""

    documents: Iterable[str]
    seed: int
    window: int

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self.numbered())

    def numbered(self) -> Iterator[tuple[int, str]]:
        """The documents, each with its number before."""
        held, source = 0, iter(self.documents)
        while texts := list(islice(source, self.window)):
            for number in self._order(held, len(texts)):
                yield held + number, texts[number]
            held += len(texts)

    def numbers(self, count: int) -> Iterator[int]:
        """The numbers that `count` documents had before."""
        for first in range(0, count, self.window):
            size = min(self.window, count - first)
            yield from (first + number for number in self._order(first, size))

    def _order(self, first: int, size: int) -> list[int]:
        return np.random.default_rng((self.seed, first)).permutation(size).tolist()


def joined(name: str, corpora: Iterable[Corpus]) -> Corpus:
    """One corpus in memory with the documents of several, in order, each keeping its group.

    Args:
        name: what to call it.
        corpora: at least one corpus.

    Returns:
        A corpus whose groups are one name per document.
    """
    parts = [(corpus, tuple(corpus)) for corpus in corpora]
    groups = [corpus.group_of(number) for corpus, texts in parts for number in range(len(texts))]
    return Corpus.of(name, chain.from_iterable(texts for _, texts in parts), groups)


def standard_library_text() -> Corpus:
    """English prose about Python: the documentation topics that ship with it, in the order of their names.

    About 465,000 characters, or 110,000 tokens; they differ a little between versions of Python, and so does `sha256`.

    Raises:
        DataError: when this Python was built without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as cause:
        do = "install the full standard library, or use read_text"
        raise error(DataError, 'this Python has no documentation topics ("pydoc_data.topics")', do=do) from cause
    return Corpus.of("standard-library-text", (topics[name] for name in sorted(topics)), "prose")


def standard_library_code(modules: Iterable[str] = CODE_MODULES) -> Corpus:
    """Python source code: modules of the standard library, by name, but those without source.

    Raises:
        DataError: when none of the modules has source here.
    """
    sources = (_source(module) for module in sorted(set(modules)))
    texts = [source for source in sources if source]
    if not texts:
        raise error(DataError, "no source code of the standard library is installed here", do="use read_text")
    return Corpus.of("standard-library-code", texts, "code")


def _source(module: str) -> str | None:
    """The source of a module, without importing it; None when there is none."""
    spec = find_spec(module)
    get_source = getattr(spec.loader, "get_source", None) if spec is not None else None
    return get_source(module) if get_source is not None else None


def _sha256(texts: Iterable[str]) -> str:
    """SHA-256 over the length and the bytes of each text, so that no two lists of texts share it."""
    sha = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()
