"""What a task asks of a tokenizer: ids as the model will get them, where a word lies, and what continues a prompt.

Only the interface that every tokenizer of `transformers` has is used: a call on a text. Special tokens are added as a
run adds them, so positions count them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from functools import cached_property
from typing import Any, cast

from microtome.errors import PromptError, error
from microtome.model import Model

Ids = tuple[int, ...]
Span = tuple[int, int]


class Misfit(Exception):
    """A draft that does not become a pair under this tokenizer.

    Attributes:
        kind: the reason, in words that are the same for all drafts.
        got: what was found in this one.
        do: what would help.
    """

    def __init__(self, kind: str, got: str | None = None, do: str | None = None) -> None:
        super().__init__(kind if got is None else f"{kind}: {got}")
        self.kind, self.got, self.do = kind, got, do


class Tokens:
    """A tokenizer as tasks see it.

    Attributes:
        tokenizer: the tokenizer itself, or None where only ids are known.
        n_vocab: how many ids there are.
        n_ctx: the longest prompt, or None where no model was given.
    """

    def __init__(self, tokenizer: Any, n_vocab: int, n_ctx: int | None = None) -> None:
        self.tokenizer, self.n_vocab, self.n_ctx = tokenizer, n_vocab, n_ctx
        self.is_fast = bool(getattr(tokenizer, "is_fast", False))
        if tokenizer is not None:
            self._refuse_endings()

    @classmethod
    def of(cls, source: Any) -> Tokens:
        """From an open model, or from a tokenizer.

        Raises:
            PromptError: it is neither, or the tokenizer puts a special token behind every text.
        """
        if isinstance(source, Model):
            return cls(source.tokenizer, source.anatomy.d_vocab, source.anatomy.n_ctx)
        if not callable(source) or not hasattr(source, "decode"):
            got, do = type(source).__name__, "pass what microtome.open returned, or a tokenizer of transformers"
            raise error(PromptError, "cannot tokenise with this", got=got, allowed="a model or a tokenizer", do=do)
        return cls(source, len(cast("Sized", source)))

    def _refuse_endings(self) -> None:
        ids, special = self.ids("a"), self.special
        if len(ids) > 1 and ids[-1] in special:
            raise error(
                PromptError,
                "this tokenizer ends every text with a special token, so that no prompt can be continued",
                got=repr(self.tokenizer.decode([ids[-1]])),
                do="open the model with a tokenizer that adds none at the end",
            )

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that no text is made of."""
        own = getattr(self.tokenizer, "all_special_ids", [])
        added = getattr(self.tokenizer, "get_added_vocab", dict)()
        return frozenset(own) | frozenset(added.values())

    @property
    def start(self) -> Ids:
        """What stands before every prompt: a beginning-of-text token, or nothing."""
        return () if self.tokenizer is None else self.ids("")

    def require(self, task: str) -> None:
        """Refuse a task of texts where there is no tokenizer.

        Raises:
            PromptError: there is none.
        """
        if self.tokenizer is None:
            do = "open the model with tokenizer=, or build induction, which needs none"
            raise error(PromptError, f'the task "{task}" is made of text, and this model has no tokenizer', do=do)

    def ids(self, text: str) -> Ids:
        """The ids of a text, as a run would have them."""
        return tuple(int(i) for i in self.tokenizer(text)["input_ids"])

    def words(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, or its number where there is no tokenizer."""
        return [str(i) if self.tokenizer is None else self.tokenizer.decode([i]) for i in ids]

    def continuations(self, prompt: str, texts: Sequence[str]) -> list[Ids]:
        """The ids that each text adds to a prompt.

        Raises:
            Misfit: a text changes how the end of the prompt is tokenised.
        """
        before = self.ids(prompt)
        found: list[Ids] = []
        for text, row in zip(texts, self.tokenizer([prompt + t for t in texts])["input_ids"], strict=True):
            ids = tuple(int(i) for i in row)
            if ids[: len(before)] != before or len(ids) == len(before):
                raise Misfit("the answer merges with the end of the prompt", f"{prompt[-12:]!r} and {text!r}")
            found.append(ids[len(before) :])
        return found

    def spans(self, text: str, ranges: Mapping[str, Span]) -> dict[str, Span]:
        """Where stretches of a text lie: (first, end) token positions for (first, end) characters.

        Raises:
            Misfit: a stretch does not begin and end where tokens do.
        """
        if not ranges:
            return {}
        if not self.is_fast:
            return {name: self._by_prefix(text, *r) for name, r in ranges.items()}
        offsets: list[Span] = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return {name: _by_offset(text, offsets, *r) for name, r in ranges.items()}

    def _by_prefix(self, text: str, start: int, end: int) -> Span:
        """For tokenizers that keep no offsets: the text up to a place must be tokenised as it is inside the whole."""
        whole, through = self.ids(text), self.ids(text[:end])
        for stop in (start, len(text[:start].rstrip())):  # a space may be a token, or begin the next one
            before = self.ids(text[:stop])
            if whole[: len(before)] == before and whole[: len(through)] == through and len(before) < len(through):
                return len(before), len(through)
        raise _broken(text[start:end])


def _by_offset(text: str, offsets: Sequence[Span], start: int, end: int) -> Span:
    touched = [i for i, (a, b) in enumerate(offsets) if b > start and a < end and b > a]
    if touched:
        first, last = touched[0], touched[-1]
        if text[offsets[first][0] : offsets[last][1]].strip() == text[start:end].strip():
            return first, last + 1
    raise _broken(text[start:end])


def _broken(word: str) -> Misfit:
    return Misfit("a word of interest does not begin and end where tokens do", repr(word))
