"""Prompts become a batch: tokens, mask and positions, padded on either side without changing any row's result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from microtome.anatomy import integer
from microtome.edit import Frame, Span
from microtome.errors import PromptError, error
from microtome.run._codec import Codec, Encoding
from microtome.shown import shown

SIDES = ("left", "right")
UNREADABLE = (bytes, bytearray, memoryview, set, frozenset)
"""What could be iterated over as if it were ids: bytes are no ids, and sets have no order."""


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
    | Sequence[Mapping[str, Any]]
    | Sequence[Sequence[Mapping[str, Any]]]
    | Batch
)
"""Text, texts, token ids, lists of token ids or tensors [pos] of them, an integer tensor [pos] or [batch, pos], what a
tokenizer gave, a chat as a list of messages {"role", "content"}, several chats, or a `Batch`, which keeps its padding.
Ids are run as they are; for text see `Codec`."""

CALLED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
ABOUT = ("special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping", "num_truncated_tokens")
"""What a tokenizer may say about its tokens beside them; it changes no forward."""


def to_batch(
    prompt: Prompt,
    codec: Codec | None,
    *,
    n_vocab: int,
    n_ctx: int,
    side: Literal["left", "right"],
    device: torch.device,
    first_position: int = 0,
) -> Batch:
    """Tokens of a prompt; see `Prompt`. Pads of a tokenizer are dropped, and added again on the side that is named.

    Raises:
        PromptError: the prompt is empty, longer than the context, holds ids outside the vocabulary, or is text while
            the model has no tokenizer; or the side is neither left nor right.
    """
    if side not in SIDES:
        do = "name one of these"
        raise error(PromptError, "cannot pad on this side", got=repr(side), allowed='"left" or "right"', do=do)
    rows = prompt.rows if isinstance(prompt, Batch) else rows_of(prompt, codec, first_position)
    _validate(rows, n_vocab, n_ctx, device)
    if isinstance(prompt, Batch):
        return Batch(prompt.tokens.to(device), prompt.lengths, prompt.pads)
    lengths = tuple(len(row) for row in rows)
    width = max(lengths)
    pads = tuple(width - n if side == "left" else 0 for n in lengths)
    tokens = torch.full(
        (len(rows), width), pad_id(None if codec is None else codec.tokenizer, n_vocab) or 0, device=device
    )
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


def encodings_of(prompt: Any, codec: Codec | None) -> list[Encoding] | None:
    """Text, texts, a chat or chats as tokens with the characters of each; None if the prompt is none of these.

    Raises:
        PromptError: there is no tokenizer to read it, or it cannot be read.
    """
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if _are_messages(items):
        items = [items]
    elif not items or not all(isinstance(item, str) or _are_messages(item) for item in items):
        return None
    if codec is None:
        raise error(
            PromptError,
            "this model was opened without a tokenizer, so it cannot read text",
            do="pass token ids, or open it with tokenizer=",
        )
    return [codec.encode(item) if isinstance(item, str) else codec.chat(item) for item in items]


def _are_messages(items: object) -> bool:
    several = isinstance(items, Sequence) and not isinstance(items, str | bytes) and len(items) > 0
    return several and all(isinstance(item, Mapping) for item in cast("Sequence[Any]", items))


def prompt_from_text(text: str) -> Any:
    """A prompt as a command takes it: text, or a chat as a JSON list of messages with "role" and "content"."""
    if text.lstrip().startswith("["):
        try:
            found: Any = json.loads(text)
        except ValueError:
            return text
        if _are_messages(found) and all({"role", "content"} <= message.keys() for message in found):
            return found
    return text


def rows_of(prompt: Any, codec: Codec | None, first_position: int = 0) -> list[Tensor]:
    """Token ids [pos] by row of whatever was given as a prompt.

    Raises:
        PromptError: it is none.
    """
    if isinstance(prompt, Mapping):
        return _encoded(prompt, first_position)
    if isinstance(prompt, Tensor):
        return _of_tensor(prompt)
    if isinstance(prompt, UNREADABLE) or not isinstance(prompt, Iterable):
        raise _unreadable(prompt)
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = encodings_of(items, codec)
    if texts is not None:
        return [torch.tensor(text.ids, dtype=torch.long) for text in texts]
    odd = next((item for item in items if isinstance(item, (str, Mapping, *UNREADABLE))), None)
    if odd is not None:
        raise _unreadable(odd if isinstance(odd, UNREADABLE) else prompt)
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
        allowed="text, texts, token ids, lists of token ids, an integer tensor, a list of chat messages, or a Batch",
        do="decode it first" if isinstance(prompt, bytes | bytearray | memoryview) else "pass one of these",
    )


def _encoded(prompt: Mapping[str, Any], first_position: int) -> list[Tensor]:
    """The real tokens of each row of what a tokenizer gave."""
    prompt = {key: value for key, value in prompt.items() if value is not None}
    if "input_ids" not in prompt:
        raise error(
            PromptError,
            "the prompt holds no input_ids",
            got=", ".join(map(str, prompt)) or "nothing",
            do="put a single message into a list" if "role" in prompt else "pass what a tokenizer gave",
        )
    unknown = [str(key) for key in prompt if key not in (*CALLED, *ABOUT)]
    if unknown:
        raise error(
            PromptError,
            f"a run cannot use the {unknown[0]} of a prompt",
            allowed=", ".join(CALLED),
            do="leave it out; embeddings are changed by an edit, such as Add at the site embed"
            if unknown[0] == "inputs_embeds"
            else "leave it out",
        )
    rows = rows_of(prompt["input_ids"], None)
    if "token_type_ids" in prompt and any(bool(row.any()) for row in rows_of(prompt["token_type_ids"], None)):
        raise error(PromptError, "the prompt has a second segment (token_type_ids)", do="run its segments separately")
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    if "attention_mask" in prompt:
        masks = [mask != 0 for mask in _like(rows, prompt, "attention_mask")]
    for i, mask in enumerate(masks):
        real = mask.nonzero().squeeze(1)
        if len(real) and len(real) <= int(real[-1] - real[0]):
            raise error(
                PromptError, f"the attention_mask hides tokens inside row {i}", do="mask only pads, or use KnockOut"
            )
    if "position_ids" in prompt:
        _refuse_other_positions(_like(rows, prompt, "position_ids"), masks, first_position)
    return [row[mask] for row, mask in zip(rows, masks, strict=True)]


def _like(rows: Sequence[Tensor], prompt: Mapping[str, Any], key: str) -> list[Tensor]:
    """What a prompt says of every token; one row of positions may serve all."""
    found = rows_of(prompt[key], None)
    if key == "position_ids" and len(found) == 1:
        found = found * len(rows)
    if [len(row) for row in found] != [len(row) for row in rows]:
        raise error(PromptError, f"the prompt's {key} does not fit its input_ids", do="pass what a tokenizer gave")
    return found


def _refuse_other_positions(given: Sequence[Tensor], masks: Sequence[Tensor], first: int) -> None:
    """A run counts the real tokens of a row: that is what these positions must do.

    Raises:
        PromptError: they do not.
    """
    for i, (row, mask) in enumerate(zip(given, masks, strict=True)):
        real = row[mask]
        if not torch.equal(real, torch.arange(first, first + len(real), device=real.device)):
            raise error(
                PromptError,
                f"a run cannot use the position_ids of row {i}",
                got=str(real[:8].tolist()).replace("]", ", ...]" if len(real) > 8 else "]"),
                allowed=f"{first}, {first + 1}, ... over its real tokens",
                do="leave them out, or call model.hf with them",
            )
