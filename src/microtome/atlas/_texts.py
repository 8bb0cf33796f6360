"""The text of an atlas: one list of tokens, of one group or of several, whose rows hold one group each.

Formula:  flat = the rows of the first group, then those of the second, ...; each has an equal share of the tokens.
          Documents of one group are joined, as `TokenBatches` does; no row holds two groups.
Check:    tests/laws/test_atlas_groups.py: the places of examples are places in `flat`, whatever the group.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from microtome.errors import DataError, MicrotomeWarning, error
from microtome.method import by_group, corpus_of
from microtome.stream import Corpus, TokenBatches, standard_library_text


@dataclass(frozen=True)
class Reading:
    """What an atlas read.

    Attributes:
        parts: by group, its rows; None of a group that has fewer than 2 tokens.
        asked: how many tokens were asked for.
    """

    parts: Mapping[str, TokenBatches | None]
    asked: int

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of all groups."""
        return tuple(self.parts)

    @property
    def read(self) -> dict[str, TokenBatches]:
        """The groups that have rows."""
        return {name: part for name, part in self.parts.items() if part is not None}

    @property
    def text(self) -> Any:
        """What measures read."""
        return next(iter(self.read.values())) if len(self.parts) == 1 else self.read

    @cached_property
    def flat(self) -> list[int]:
        """Every token, in order."""
        return [token for part in self.read.values() for token in part.flat]

    @property
    def name(self) -> str:
        """What the text is called."""
        return "; ".join(dict.fromkeys(part.corpus.name for part in self.read.values()))

    @property
    def length(self) -> int:
        """Tokens of a row; a group of less than a row has a shorter one."""
        return max(part[0].tokens.shape[1] for part in self.read.values())

    @property
    def sequences(self) -> int:
        """How many rows there are."""
        return sum(-(-len(part.flat) // part[0].tokens.shape[1]) for part in self.read.values())

    @property
    def beginning(self) -> int | None:
        """The token that every row begins with, or None."""
        return next(iter(self.read.values())).bos_id

    @property
    def short(self) -> bool:
        """Whether a group has fewer tokens than its share."""
        return any(part is None or part.short for part in self.parts.values())

    def tokens(self, group: str) -> int:
        """How many tokens were read of a group."""
        part = self.parts[group]
        return 0 if part is None else len(part.flat)

    def documents(self, group: str) -> int:
        """How many documents were reached of a group."""
        part = self.parts[group]
        return 0 if part is None else len(part.ranges)


def reading_of(text: Any, tokenizer: Any, *, tokens: int, length: int, rows: int) -> Reading:
    """The text of an atlas in rows of tokens.

    Args:
        text: a corpus, the path of a file, texts, or a mapping from groups to these; a corpus of several groups is cut
            into these; the documentation topics of the standard library by default.
        tokenizer: of the model.
        tokens: how many to read, shared equally between groups.
        length: tokens of a row.
        rows: rows of a batch.

    Raises:
        DataError: it is no text, or no group has 2 tokens.
    """
    corpora = _corpora(text)
    share = max(2, tokens // len(corpora))
    parts = {
        name: _rows(name, corpus, tokenizer, share, length, rows, len(corpora)) for name, corpus in corpora.items()
    }
    if not any(parts.values()):
        what = "no group of the text has 2 tokens or more"
        raise error(DataError, what, got=", ".join(parts), do="give them more text")
    return Reading(parts, tokens)


def _corpora(text: Any) -> dict[str, Corpus]:
    """A corpus for each group."""
    if isinstance(text, Mapping):
        given = cast("Mapping[Any, Any]", text)
        if not given:
            raise error(DataError, "the mapping from groups to texts is empty", do="give one group or more")
        return {str(name): corpus_of(part) for name, part in given.items()}
    corpus = standard_library_text() if text is None else corpus_of(text)
    names = tuple(dict.fromkeys(corpus.groups))
    return {names[0]: corpus} if len(names) == 1 else by_group(corpus)


def _rows(
    name: str, corpus: Corpus, tokenizer: Any, tokens: int, length: int, rows: int, groups: int
) -> TokenBatches | None:
    """The rows of one group; None, with a warning, of one of several that has fewer than 2 tokens."""
    try:
        return TokenBatches(corpus, tokenizer, length=length, rows=rows, tokens=tokens)
    except DataError:
        if groups == 1:
            raise
    what = f'group "{name}" has fewer than 2 tokens: nothing is known of it, its values are not numbers'
    warnings.warn(str(error(DataError, what, do="give it more text")), MicrotomeWarning, stacklevel=4)
    return None
