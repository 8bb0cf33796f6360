"""Prompts become a batch: tokens, mask and positions, padded on either side without changing any row's result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import Indices, Rule, integer
from microtome.errors import PromptError, SiteError, error

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]
"""Text, texts, token ids, lists of token ids, an integer tensor [pos] or [batch, pos], or what a tokenizer gave."""

SIDES = ("left", "right")


@dataclass(frozen=True)
class Batch:
    """Tokens [batch, pos] with, for every row, how many are real and how many pads precede them."""

    tokens: Tensor
    lengths: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the batch is wide."""
        return any(n != self.tokens.shape[1] for n in self.lengths)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The first column and the number of the real tokens of every row."""
        return tuple(zip(self.pads, self.lengths, strict=True))

    @property
    def mask(self) -> Tensor:
        """[batch, pos] True at real tokens."""
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        start = torch.tensor(self.pads, device=self.tokens.device).unsqueeze(1)
        length = torch.tensor(self.lengths, device=self.tokens.device).unsqueeze(1)
        return (column >= start) & (column < start + length)

    def inputs(self, takes_positions: bool, first_position: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward. Nothing but the tokens where nothing is padded."""
        if not self.padded:
            return {"input_ids": self.tokens}
        inputs = {"input_ids": self.tokens, "attention_mask": self.mask.long()}
        if takes_positions and any(self.pads):
            inputs["position_ids"] = (self.mask.long().cumsum(1) - 1).clamp(min=0) + first_position
        return inputs

    def columns(self, positions: Indices | Rule) -> Tensor | None:
        """Columns [batch, n] of the selected positions of each row, counted over its real tokens; None for all.

        Raises:
            SiteError: a position lies beyond a row, or the rule selects nothing in a run.
        """
        if positions == "prompt" or (isinstance(positions, Indices) and positions.is_all):
            return None
        if positions == "generated":
            raise error(
                SiteError, '"@generated" selects nothing in a run', do="use it with generate, or name positions"
            )
        rows: list[list[int]] = []
        for row, (length, pad) in enumerate(zip(self.lengths, self.pads, strict=True)):
            chosen = [length - 1] if isinstance(positions, str) else positions.resolve(length)
            if chosen is None:
                raise error(
                    SiteError,
                    f"no positions @{positions} in row {row}",
                    allowed=f"0 to {length - 1}, or -{length} to -1",
                    do="choose positions inside the prompt",
                )
            rows.append([pad + p for p in chosen])
        if len({len(r) for r in rows}) > 1:
            raise error(
                SiteError,
                f"@{positions} selects different numbers of positions in different rows",
                got=str([len(r) for r in rows]),
                do="count from one end, or run rows of one length",
            )
        return torch.tensor(rows, device=self.tokens.device)


def to_batch(
    prompt: Prompt, tokenizer: Any, *, n_vocab: int, n_ctx: int, side: Literal["left", "right"], device: torch.device
) -> Batch:
    """Tokens of a prompt; see `Prompt`. Pads that a tokenizer put are left out, and put again on the side asked for.

    Raises:
        PromptError: the prompt is empty, longer than the context, holds ids outside the vocabulary, or is text while
            the model has no tokenizer; or there is no such side.
    """
    if side not in SIDES:
        do = "name one of these"
        raise error(PromptError, "cannot pad on this side", got=repr(side), allowed='"left" or "right"', do=do)
    rows = rows_of(prompt, tokenizer)
    for i, row in enumerate(rows):
        if not row:
            raise error(
                PromptError,
                f"row {i} of the prompt is empty" if len(rows) > 1 else "the prompt is empty",
                do="give at least one token",
            )
        if len(row) > n_ctx:
            raise error(
                PromptError,
                f"row {i} of the prompt is longer than the model's context",
                got=f"{len(row)} tokens",
                allowed=f"at most {n_ctx}",
                do="shorten it, or split it",
            )
        bad = next((t for t in row if not 0 <= t < n_vocab), None)
        if bad is not None:
            raise error(
                PromptError,
                "a token id lies outside the vocabulary",
                got=str(bad),
                allowed=f"0 to {n_vocab - 1}",
                do="tokenise with this model's tokenizer",
            )
    width = max(len(row) for row in rows)
    pad = pad_id(tokenizer, n_vocab) or 0
    pads = tuple(width - len(row) if side == "left" else 0 for row in rows)
    filled = [[pad] * p + row + [pad] * (width - len(row) - p) for row, p in zip(rows, pads, strict=True)]
    return Batch(torch.tensor(filled, device=device), tuple(len(row) for row in rows), pads)


def pad_id(tokenizer: Any, n_vocab: int) -> int | None:
    """The id by which a tokenizer fills rows, if the embedding has it. Pads are masked, so that any such id does."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int) and 0 <= value < n_vocab:
            return value
    return None


def rows_of(prompt: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids by row of whatever was given as a prompt.

    Raises:
        PromptError: it is none.
    """
    if isinstance(prompt, Mapping):
        return _encoded(prompt)
    if isinstance(prompt, Tensor):
        fits = not (prompt.dtype.is_floating_point or prompt.dtype.is_complex or prompt.dtype == torch.bool)
        if not fits or prompt.dim() not in (1, 2):
            raise error(
                PromptError,
                "a prompt tensor must hold integer token ids",
                got=f"{prompt.dtype} {list(prompt.shape)}",
                allowed="[pos] or [batch, pos] of an integer type",
                do="pass token ids",
            )
        tokens: list[Any] = prompt.tolist()
        if not tokens:
            raise error(PromptError, "the prompt is empty", do="give at least one token")
        return tokens if prompt.dim() == 2 else [tokens]
    if not isinstance(prompt, Iterable):
        raise _unreadable(prompt)
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if not items:
        raise error(PromptError, "the prompt is empty", do="give at least one token")
    if all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise error(
                PromptError,
                "this model was opened without a tokenizer, so it cannot read text",
                do="pass token ids, or open it with tokenizer=",
            )
        return [list(tokenizer(item)["input_ids"]) for item in items]
    if any(isinstance(item, str) for item in items):
        raise _unreadable(prompt)
    if all(isinstance(item, Sequence) or getattr(item, "ndim", 0) == 1 for item in items):
        return [[_id(t) for t in item] for item in items]
    return [[_id(item) for item in items]]


def _id(item: Any) -> int:
    """One token id: what is an integer, and neither a truth value nor a number that would have to be rounded."""
    try:
        return integer(item)
    except TypeError:
        shown = f"{item!r}"
        raise error(
            PromptError,
            "a token id must be an integer",
            got=shown if len(shown) < 60 else type(item).__name__,
            do="pass text, or the ids that a tokenizer gives",
        ) from None


def _unreadable(prompt: object) -> PromptError:
    return error(
        PromptError,
        "cannot read the prompt",
        got=type(prompt).__name__,
        allowed="text, texts, token ids, lists of token ids, or an integer tensor",
        do="pass one of these",
    )


def _encoded(prompt: Mapping[str, Any]) -> list[list[int]]:
    """The real tokens of each row of what a tokenizer gave."""
    if "input_ids" not in prompt:
        raise error(
            PromptError,
            "the prompt holds no input_ids",
            got=", ".join(prompt) or "nothing",
            do="pass what a tokenizer gave",
        )
    rows = rows_of(prompt["input_ids"], None)
    masks = rows_of(prompt["attention_mask"], None) if "attention_mask" in prompt else [[1] * len(row) for row in rows]
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise error(
            PromptError, "the prompt's attention_mask does not fit its input_ids", do="pass what a tokenizer gave"
        )
    for i, mask in enumerate(masks):
        if "0" in "".join(str(int(m != 0)) for m in mask).strip("0"):
            raise error(
                PromptError, f"the attention_mask hides tokens inside row {i}", do="mask pads alone, or use KnockOut"
            )
    if "token_type_ids" in prompt and any(any(row) for row in rows_of(prompt["token_type_ids"], None)):
        raise error(PromptError, "the prompt has a second segment (token_type_ids)", do="run its segments apart")
    return [[t for t, m in zip(row, mask, strict=True) if m] for row, mask in zip(rows, masks, strict=True)]
