"""Prompts become a batch: tokens, mask and positions, padded on either side without changing any row's result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import integer
from microtome.edit import Frame, Span
from microtome.errors import PromptError, error
from microtome.shown import shown

SIDES = ("left", "right")


@shown
@dataclass(frozen=True)
class Batch:
    """Tokens [batch, pos] with, for every row, how many are real and how many pads precede them."""

    tokens: Tensor
    lengths: tuple[int, ...]
    pads: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, width = self.tokens.shape if self.tokens.dim() == 2 else (-1, 0)
        inside = all(first >= 0 and first + n <= width for first, n in zip(self.pads, self.lengths, strict=False))
        if not rows == len(self.lengths) == len(self.pads) or not inside:
            raise error(
                PromptError,
                "the lengths and pads of a batch do not fit its tokens",
                got=f"lengths {self.lengths}, pads {self.pads}, tokens {list(self.tokens.shape)}",
                allowed="tokens [batch, pos], and for every row pads and a length that lie inside it",
                do="let model.to_batch make it",
            )

    @cached_property
    def frame(self) -> Frame:
        """Its rows and columns."""
        return Frame(self.spans, self.tokens.shape[1])

    @property
    def spans(self) -> tuple[Span, ...]:
        """The first column and the number of the real tokens of every row."""
        return tuple(zip(self.pads, self.lengths, strict=True))

    @property
    def rows(self) -> list[Tensor]:
        """The real tokens [pos] of every row, as views."""
        return [row[first : first + n] for row, (first, n) in zip(self.tokens, self.spans, strict=True)]

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the batch is wide."""
        return self.frame.padded

    @property
    def mask(self) -> Tensor:
        """[batch, pos] True at real tokens."""
        return self.frame.real(self.tokens.shape[1], self.tokens.device).expand(self.tokens.shape)

    def inputs(self, takes_positions: bool, first_position: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward. Nothing but the tokens where nothing is padded."""
        if not self.padded:
            return {"input_ids": self.tokens}
        inputs = {"input_ids": self.tokens, "attention_mask": self.mask.long()}
        if takes_positions and any(self.pads):
            inputs["position_ids"] = (self.mask.long().cumsum(1) - 1).clamp(min=0) + first_position
        return inputs


Prompt = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[Tensor]
    | Tensor
    | Mapping[str, Any]
    | Batch
)
"""Text, texts, token ids, lists of token ids or tensors [pos] of them, an integer tensor [pos] or [batch, pos], what a
tokenizer gave, or a `Batch`, which keeps its padding."""


def to_batch(
    prompt: Prompt, tokenizer: Any, *, n_vocab: int, n_ctx: int, side: Literal["left", "right"], device: torch.device
) -> Batch:
    """Tokens of a prompt; see `Prompt`. Pads of a tokenizer are dropped, and added again on the side that is named.

    Raises:
        PromptError: the prompt is empty, longer than the context, holds ids outside the vocabulary, or is text while
            the model has no tokenizer; or the side is neither left nor right.
    """
    if side not in SIDES:
        do = "name one of these"
        raise error(PromptError, "cannot pad on this side", got=repr(side), allowed='"left" or "right"', do=do)
    rows = prompt.rows if isinstance(prompt, Batch) else rows_of(prompt, tokenizer)
    _validate(rows, n_vocab, n_ctx, device)
    if isinstance(prompt, Batch):
        return Batch(prompt.tokens.to(device), prompt.lengths, prompt.pads)
    lengths = tuple(len(row) for row in rows)
    width = max(lengths)
    pads = tuple(width - n if side == "left" else 0 for n in lengths)
    tokens = torch.full((len(rows), width), pad_id(tokenizer, n_vocab) or 0, device=device)
    for row, ids, first in zip(tokens, rows, pads, strict=True):
        row[first : first + len(ids)] = ids
    return Batch(tokens, lengths, pads)


def _validate(rows: Sequence[Tensor], n_vocab: int, n_ctx: int, device: torch.device) -> None:
    """Refuse token ids by row that the model cannot run."""
    if not rows:
        raise error(PromptError, "the prompt is empty", do="give at least one token")
    for i, row in enumerate(rows):
        if not len(row):
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
    ids = torch.cat([row.to(device) for row in rows])
    bad = ids[(ids < 0) | (ids >= n_vocab)]
    if len(bad):
        raise _outside_vocabulary(int(bad[0]), n_vocab)


def _outside_vocabulary(token: int, n_vocab: int | None = None) -> PromptError:
    return error(
        PromptError,
        "a token id lies outside the vocabulary",
        got=str(token),
        allowed=None if n_vocab is None else f"0 to {n_vocab - 1}",
        do="tokenise with this model's tokenizer",
    )


def pad_id(tokenizer: Any, n_vocab: int) -> int | None:
    """The id by which a tokenizer fills rows, if the embedding has it. Pads are masked, so that any such id does."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int) and 0 <= value < n_vocab:
            return value
    return None


def rows_of(prompt: Any, tokenizer: Any) -> list[Tensor]:
    """Token ids [pos] by row of whatever was given as a prompt.

    Raises:
        PromptError: it is none.
    """
    if isinstance(prompt, Mapping):
        return _encoded(prompt)
    if isinstance(prompt, Tensor):
        return _of_tensor(prompt)
    if not isinstance(prompt, Iterable):
        raise _unreadable(prompt)
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if all(isinstance(item, str) for item in items):
        if items and tokenizer is None:
            raise error(
                PromptError,
                "this model was opened without a tokenizer, so it cannot read text",
                do="pass token ids, or open it with tokenizer=",
            )
        return [_ids(tokenizer(item)["input_ids"]) for item in items]
    if any(isinstance(item, str) for item in items):
        raise _unreadable(prompt)
    if all(isinstance(item, Sequence) or getattr(item, "ndim", 0) == 1 for item in items):
        return [_ids(item) for item in items]
    return [_ids(items)]


def _of_tensor(prompt: Tensor) -> list[Tensor]:
    fits = not (prompt.dtype.is_floating_point or prompt.dtype.is_complex or prompt.dtype == torch.bool)
    if not fits or prompt.dim() not in (1, 2):
        raise error(
            PromptError,
            "a prompt tensor must hold integer token ids",
            got=f"{prompt.dtype} {list(prompt.shape)}",
            allowed="[pos] or [batch, pos] of an integer type",
            do="pass token ids",
        )
    return list(prompt.long().unbind(0)) if prompt.dim() == 2 else [prompt.long()]


def _ids(items: Any) -> Tensor:
    """The token ids [pos] of one row: integers, and neither truth values nor numbers that would have to be rounded."""
    if isinstance(items, Tensor):
        return _of_tensor(items)[0]
    ids = [_id(item) for item in items]
    bad = next((i for i in ids if not -(2**63) <= i < 2**63), None)
    if bad is not None:
        raise _outside_vocabulary(bad)
    return torch.tensor(ids, dtype=torch.long)


def _id(item: Any) -> int:
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
        allowed="text, texts, token ids, lists of token ids, an integer tensor, or a Batch",
        do="pass one of these",
    )


def _encoded(prompt: Mapping[str, Any]) -> list[Tensor]:
    """The real tokens of each row of what a tokenizer gave."""
    if "input_ids" not in prompt:
        raise error(
            PromptError,
            "the prompt holds no input_ids",
            got=", ".join(prompt) or "nothing",
            do="pass what a tokenizer gave",
        )
    rows = rows_of(prompt["input_ids"], None)
    if "token_type_ids" in prompt and any(bool(row.any()) for row in rows_of(prompt["token_type_ids"], None)):
        raise error(PromptError, "the prompt has a second segment (token_type_ids)", do="run its segments separately")
    if "attention_mask" not in prompt:
        return rows
    masks = [mask != 0 for mask in rows_of(prompt["attention_mask"], None)]
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise error(
            PromptError, "the prompt's attention_mask does not fit its input_ids", do="pass what a tokenizer gave"
        )
    for i, mask in enumerate(masks):
        real = mask.nonzero().squeeze(1)
        if len(real) and len(real) <= int(real[-1] - real[0]):
            raise error(
                PromptError, f"the attention_mask hides tokens inside row {i}", do="mask only pads, or use KnockOut"
            )
    return [row[mask] for row, mask in zip(rows, masks, strict=True)]
