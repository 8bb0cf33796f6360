"""Every error a user of Microtome can meet, in one tree.

    MicrotomeError
    ├── ModelError            a model cannot be opened
    │   ├── ModelNotFound     no such model here, or no network to fetch it
    │   ├── ModelBroken       its files are damaged or incomplete
    │   └── ModelUnsupported  it opens, but it is not a language model we can map
    ├── ProofError            the map of a model failed one of its identities
    ├── SiteError             an address that matches nothing, or cannot be read that way
    ├── PromptError           text or tokens that the model cannot take
    ├── EditError             an edit whose value does not fit its site
    ├── BudgetError           a run that would not fit in memory
    ├── ArgumentError         an argument or a setting outside what is allowed
    ├── FitError              a training that cannot go on
    ├── DeclarationError      a method whose declaration lacks something, or clashes with another's
    ├── OutputError           a file or folder that cannot be written
    └── DataError             text, tables or shards that cannot be read

Each says what failed, where, what was got, what is allowed and what to do; `error()` builds that sentence, so that all
errors read alike.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeVar


class MicrotomeWarning(UserWarning):
    """Something that was done as asked and is likely not what was meant; the command line says it on stderr."""


class MicrotomeError(Exception):
    """The root of the tree: catch it to catch every error that Microtome raises on purpose.

    Attributes:
        told: its text without advice.
        do: what it advises, if it advises anything.
    """

    exit_code = 1
    told: str = ""
    do: str | None = None


class ModelError(MicrotomeError):
    """A model cannot be opened."""

    exit_code = 3


class ModelNotFound(ModelError):
    """No such model here, or no network to fetch it."""


class ModelBroken(ModelError):
    """The files of a model are damaged or incomplete."""


class ModelUnsupported(ModelError):
    """The model opens, but it is not a language model whose parts can be mapped."""


class ProofError(MicrotomeError):
    """The map of a model failed one of the identities that would prove it."""

    exit_code = 4


class SiteError(MicrotomeError):
    """An address that matches nothing, or that cannot be read or written in the way asked."""

    exit_code = 5


class PromptError(MicrotomeError):
    """Text or tokens that the model cannot take."""

    exit_code = 6


class EditError(MicrotomeError):
    """An edit whose value does not fit its site."""

    exit_code = 7


class BudgetError(MicrotomeError):
    """A run that would not fit in the memory that it may use."""

    exit_code = 8


class ArgumentError(MicrotomeError):
    """An argument or a setting outside what is allowed."""

    exit_code = 2


class FitError(MicrotomeError):
    """A training that cannot go on: its loss is not finite, or depends on nothing that is trained.

    Attributes:
        fitted: what the training had reached when its loss was last finite, a `microtome.training.Fitted`.
    """

    exit_code = 11
    fitted: Any = None


class DeclarationError(MicrotomeError):
    """A method whose declaration lacks something, names what does not exist, or clashes with another's."""

    exit_code = 2


class OutputError(MicrotomeError):
    """A file or folder that cannot be written."""

    exit_code = 9


class DataError(MicrotomeError):
    """Text, tables or shards that cannot be read."""

    exit_code = 10


E = TypeVar("E", bound=MicrotomeError)


def error(kind: type[E], what: str, *, got: object = None, allowed: object = None, do: str | None = None) -> E:
    """Build an error whose sentence says what failed, what was got, what is allowed and what to do.

    >>> str(error(SiteError, 'no site "30.mlp.post"', allowed="layers 0 to 29", do='try "29.mlp.post"'))
    'no site "30.mlp.post"; allowed: layers 0 to 29. To do: try "29.mlp.post".'
    """
    text = what
    if got is not None:
        text += f"; got {got}"
    if allowed is not None:
        text += f"; allowed: {allowed}"
    text += "."
    problem = kind(text if do is None else f"{text} To do: {do}.")
    problem.told, problem.do = text, do
    return problem


def nearest(word: str, words: list[str], most: int = 3) -> str:
    """The words nearest to `word`, as text that ends an error: ' Did you mean "a" or "b"?', or '' if none is near."""
    near = get_close_matches(word, words, n=most, cutoff=0.5)
    if not near:
        return ""
    return " Did you mean " + " or ".join(f'"{w}"' for w in near) + "?"
