"""What a measure reads: the weights alone, a text, or repeated random tokens.

A look gives batches of tokens. Measures whose looks are equal share one pass over them. Its fields are arguments of
every measure that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch

from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.method._declare import Argument
from microtome.method._texts import Batches, batches_of
from microtome.run import LoadedModel
from microtome.stream import TokenBatch, bos_id


@dataclass(frozen=True)
class Weights:
    """The weights, layer by layer: no text is read."""

    def fitted(self, model: LoadedModel) -> Weights:
        """The same: weights have no sizes to choose."""
        return self


@dataclass(frozen=True)
class Text:
    """A text, read once in rows of tokens.

    Attributes:
        text: a corpus, the path of a file, texts, a `Task` (its clean prompts), tokens [row, pos], batches, or a
            mapping from groups to any of these; the documentation topics of the standard library by default.
        tokens, length, rows: see `TokenBatches`; groups have equal shares of the tokens, and no row holds two groups.
        sequences: read only this many rows, each cut to `width` tokens, shared equally between groups,
            or so many of each where groups are reported separately.
        width: tokens of those rows.
    """

    text: Any = field(default=None, compare=False)
    tokens: Annotated[int, Argument("how many tokens of the text to read", "tokens", least=2)] = 20_000
    length: Annotated[int, Argument("tokens per row", "tokens", least=2)] = 256
    rows: Annotated[int, Argument("rows per batch", "rows", least=1)] = 4
    sequences: int | None = None
    width: int | None = None

    def fitted(self, model: LoadedModel) -> Text:
        """The same: rows longer than the context are cut when they are made."""
        return self

    def batches(self, model: LoadedModel, *, apart: bool = False) -> Batches:
        """The rows of tokens; `apart` reads so many `sequences` of every group, as each has intervals of its own.

        Raises:
            DataError: it is not text, or there is too little of it.
        """
        length = min(self.length, model.anatomy.n_ctx)
        found = batches_of(self.text, model, tokens=self.tokens, length=length, rows=self.rows)
        if self.sequences is None:
            return found
        return found.first(self.sequences * (len(found.groups) if apart else 1), self.width)


@dataclass(frozen=True)
class RepeatedTokens:
    """Random tokens repeated once: r_0 .. r_{T-1} r_0 .. r_{T-1}, after the beginning-of-text token if there is one.

    Attributes:
        sequences: how many.
        period: T, the tokens before the repeat; by default 50, or as many as fit twice into the context.
    """

    sequences: Annotated[int, Argument("how many random sequences", "sequences", least=1)] = 16
    period: Annotated[
        int | None, Argument("tokens before the repeat; by default 50, or as many as the context fits", "tokens", 12)
    ] = None

    def fitted(self, model: LoadedModel) -> RepeatedTokens:
        """The same with a period, if it has none."""
        if self.period is not None:
            return self
        return replace(self, period=max(12, min(50, _longest_period(model))))

    def batches(self, model: LoadedModel) -> Batches:
        """The sequences, drawn by the seed of the settings evenly from the vocabulary without special tokens.

        Raises:
            ArgumentError: the repeat does not fit into the model's context.
        """
        bos, period, most = bos_id(model.tokenizer), self.fitted(model).period, _longest_period(model)
        assert period is not None
        lead = 0 if bos is None else 1
        if period > most:
            what = f"period must be an integer from 12 to {most} (tokens) for {model.anatomy.name}"
            raise error(ArgumentError, what, got=period, do="choose another value")
        special: set[int] = set(getattr(model.tokenizer, "all_special_ids", None) or ())
        allowed = torch.tensor([t for t in range(model.anatomy.d_vocab) if t not in special])
        generator = torch.Generator().manual_seed(current().seed)
        half = allowed[torch.randint(len(allowed), (self.sequences, period), generator=generator)]
        first = torch.full((self.sequences, lead), bos or 0)
        tokens = torch.cat([first, half, half], dim=1)
        starts = torch.arange(self.sequences) * tokens.shape[1]
        parts = zip(tokens.split(16), starts.split(16), strict=True)
        return Batches([TokenBatch.of(part, start, lead) for part, start in parts])


def _longest_period(model: LoadedModel) -> int:
    """How many tokens fit twice into the context, behind the token that begins a text."""
    return (model.anatomy.n_ctx - (0 if bos_id(model.tokenizer) is None else 1)) // 2


Look = Weights | Text | RepeatedTokens
