"""The frame of forwards that others call, such as those of `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from microtome.edit import Frame, Span


class Generation:
    """Follows the forwards of a generation, with a key/value cache or without, and gives the frame of each.

    The first forward of a generation reads the prompt, and positions are the prompt's from then on. `generated` names
    what came after it; `last` names every token that was the newest when it was computed: the prompt's last one, and
    all that came after it. A forward outside of `generate` that has no cache is a prompt of its own.
    """

    def __init__(self) -> None:
        self._prompt: tuple[tuple[Span, ...], int] | None = None
        self._mask: Tensor | None = None
        self._prompts: int | None = None

    @contextmanager
    def generating(self, prompts: int, mask: Tensor | None) -> Iterator[None]:
        """Treat the forwards of this block as one generation from prompts with this mask [batch, pos]."""
        outer = self._prompts, self._prompt, self._mask
        self._prompts, self._prompt, self._mask = prompts, None, mask
        try:
            yield
        finally:
            self._prompts, self._prompt, self._mask = outer

    def frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frame:
        """The frame of a forward of the model with these arguments."""
        tokens = kwargs.get("input_ids")
        tokens = tokens if tokens is not None else (args[0] if args else kwargs.get("inputs_embeds"))
        assert tokens is not None
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        rows, end = int(tokens.shape[0]), before + int(tokens.shape[1])
        if self._prompt is None or not (before or self._prompts):
            self._prompt = self._spans(kwargs.get("attention_mask"), rows, end), end
        spans, width = self._prompt
        spans = tuple(spans[row * len(spans) // rows] for row in range(rows))
        beams = max(1, rows // self._prompts) if self._prompts else 1
        return Frame(spans, width, generated=end - width, begin=before, beams=beams)

    def _spans(self, mask: object, rows: int, end: int) -> tuple[Span, ...]:
        """The real tokens of each row: by the forward's mask, or by the call's where a static cache has changed it."""
        if not isinstance(mask, Tensor) or mask.shape != (rows, end):
            mask = self._mask
            if mask is None or mask.dim() != 2 or mask.shape[1] != end or rows % mask.shape[0]:
                return ((0, end),) * rows
            mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)  # a row for each beam of a prompt
        mask = mask.int()
        return tuple(zip(mask.argmax(1).tolist(), mask.sum(1).tolist(), strict=True))
