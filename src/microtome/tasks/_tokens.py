"""What a task asks of a tokenizer: ids as the model will get them, where a word lies, and what continues a prompt.

Tokens are those of a run of a causal model, so positions count what stands before a text too; see `run.Codec`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from functools import cached_property
from typing import Any, cast

from microtome.errors import PromptError, error
from microtome.model import Model
from microtome.run import Codec

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
        self.codec = Codec(tokenizer)

    @classmethod
    def of(cls, source: Any) -> Tokens:
        """From an open model, or from a tokenizer.

        Raises:
            PromptError: it is neither.
        """
        if isinstance(source, Model):
            return cls(source.tokenizer, source.anatomy.d_vocab, source.anatomy.n_ctx)
        if not callable(source) or not hasattr(source, "decode"):
            got, do = type(source).__name__, "pass what microtome.open returned, or a tokenizer of transformers"
            raise error(PromptError, "cannot tokenise with this", got=got, allowed="a model or a tokenizer", do=do)
        return cls(source, len(cast("Sized", source)))

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that no text is made of."""
        own = getattr(self.tokenizer, "all_special_ids", [])
        added = getattr(self.tokenizer, "get_added_vocab", dict)()
        return frozenset(own) | frozenset(added.values())

    @property
    def start(self) -> Ids:
        """What stands before every prompt: a beginning-of-text token, or nothing."""
        return () if self.tokenizer is None else self.codec.start

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
        return self.codec.ids(text)

    def words(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, or its number where there is no tokenizer."""
        return [str(i) for i in ids] if self.tokenizer is None else self.codec.words(ids)

    def continuations(self, prompt: str, texts: Sequence[str]) -> list[Ids]:
        """The ids that each text adds to a prompt.

        Raises:
            Misfit: a text changes how the end of the prompt is tokenised.
        """
        before = self.ids(prompt)
        found: list[Ids] = []
        for text, ids in zip(texts, self.codec.ids_of_all([prompt + t for t in texts]), strict=True):
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
        encoding, found = self.codec.encode(text), dict[str, Span]()
        for name, (first, end) in ranges.items():
            span = encoding.whole_tokens_at(first, end)
            if span is None:
                raise Misfit("a word of interest does not begin and end where tokens do", repr(text[first:end]))
            found[name] = span
        return found
