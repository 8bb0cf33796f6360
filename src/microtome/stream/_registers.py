"""English of several registers, from what every machine that runs this has.

    documentation   the documentation topics of the standard library
    code            modules of the standard library
    science         descriptions of the data sets that come with scikit-learn
    law             the licences of the packages that are installed

Check: tests/unit/test_stream_corpus.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from importlib.metadata import distributions

from microtome.stream._corpus import Corpus, joined, standard_library_code, standard_library_text

LEAST = 200
"""Characters of a text that counts; shorter ones name a licence and do not hold it."""


def registers() -> Corpus:
    """Texts of four registers, each a group; what they are differs a little from machine to machine, as `sha256` says.

    Raises:
        DataError: this Python was built without its documentation topics or source code.
    """
    documentation, code = standard_library_text(), standard_library_code()
    parts = [
        Corpus.of("documentation", tuple(documentation), "documentation"),
        Corpus.of("code", tuple(code), "code"),
        Corpus.of("science", _descriptions(), "science"),
        Corpus.of("law", _licences(), "law"),
    ]
    return joined("registers", parts)


def _descriptions() -> Iterator[str]:
    """What scikit-learn says of its data sets, in the order of their names."""
    folder = resources.files("sklearn.datasets.descr")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".rst"):
            yield file.read_text(encoding="utf-8")


def _licences() -> Iterator[str]:
    """The licences of installed packages in the order of their names, each text once."""
    known: set[str] = set()
    for package in sorted(distributions(), key=lambda one: str(one.metadata["Name"]).lower()):
        for file in package.files or ():
            if "licen" not in file.name.lower() or file.suffix not in ("", ".txt", ".md", ".rst"):
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # named by the package, and not there, or in bytes of an older time
            plain = " ".join(text.split())
            if len(plain) >= LEAST and plain not in known:
                known.add(plain)
                yield text
