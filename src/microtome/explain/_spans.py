"""Where words stand in a prompt: a text, a position or a span becomes a range of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, cast

from torch import Tensor

from microtome.errors import PromptError, error
from microtome.method import Span
from microtome.model import Model

COUNT = "count tokens, with the end left out"


def span_of(model: Model, tokens: Tensor | Sequence[int], span: Span, what: str = "span") -> tuple[int, int]:
    """The tokens (first, end) of a prompt that a text, a position or a span means; of a text its first occurrence.

    An occurrence as words of their own comes before one inside longer words, which counts only if whole tokens make it.

    Args:
        model: whose tokenizer made the tokens.
        tokens: [pos], one row without padding.
        span: text, position, or (first, end), with an end of 0 for that of the prompt.
        what: its name, for the error.

    Raises:
        PromptError: the text is not in the prompt, the span lies outside it, or it is none.
    """
    ids: list[int] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if isinstance(span, str):
        return _of_text(model, ids, span, what)
    n = len(ids)
    first, end = _places(span, what)
    first, end = first + n if first < 0 else first, end + n if end <= 0 else end
    if not 0 <= first < end <= n:
        got, allowed = str(span if isinstance(span, int) else tuple(span)), f"(first, end) with 0 <= first < end <= {n}"
        raise error(PromptError, f"the prompt has no such {what}", got=got, allowed=allowed, do=COUNT)
    return first, end


def _places(span: object, what: str) -> tuple[int, int]:
    """A position or a span as (first, end), as it was counted."""
    try:
        if isinstance(span, Iterable):
            first, end = (index(place) for place in cast("Iterable[Any]", span))
            return first, end
        place = index(cast("Any", span))
    except (TypeError, ValueError):
        allowed = "a text, a position, or (first, end)"
        raise error(PromptError, f"cannot read the {what}", got=repr(span), allowed=allowed, do=COUNT) from None
    return place, place + 1


def _of_text(model: Model, ids: list[int], text: str, what: str) -> tuple[int, int]:
    if model.tokenizer is None:
        raise error(PromptError, f"{what} given as text, but the model has no tokenizer", do="give (first, end)")
    # The text of growing beginnings, because single tokens may lose the space before them; one that ends inside a
    # character ends with a replacement character instead.
    begun = [model.tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    ends = [len(text.rstrip("\ufffd")) for text in begun]
    whole, wanted = model.tokenizer.decode(ids), text.strip()
    starts = [found.start() for found in re.finditer(f"(?={re.escape(wanted)})", whole)] if wanted else []

    def tokens_of(start: int) -> tuple[int, int]:
        before = [i for i, end in enumerate(ends) if end == len(begun[i]) and end <= start]
        last = next(i for i, end in enumerate(ends) if end >= start + len(wanted))
        return before[-1] + 1 if before else 0, last + 1

    def alone(start: int) -> bool:
        return not _inside_a_word(whole, start) and not _inside_a_word(whole, start + len(wanted))

    def whole_tokens(start: int) -> bool:
        first, end = tokens_of(start)
        return whole[ends[first - 1] if first else 0 : ends[end - 1]].strip() == wanted

    found = next(filter(alone, starts), None)
    found = next(filter(whole_tokens, starts), None) if found is None else found
    if found is None:
        why = f'"{text}" only inside longer words' if starts else f'no {what} "{text}"'
        do = "write it as it stands there, or give its tokens as (first, end)"
        raise error(PromptError, f"the prompt has {why}", got=f'"{whole}"', do=do)
    return tokens_of(found)


def _inside_a_word(text: str, cut: int) -> bool:
    """Whether a cut parts two letters of one word; in scripts without spaces every letter may begin one."""
    beside = text[cut - 1 : cut + 1] if 0 < cut < len(text) else " "
    # Tokenizers without a decoder leave their own marks of a space.
    return all(letter.isalnum() and ord(letter) < 0x2E80 and letter not in "\u0120\u2581" for letter in beside)


def one_row(tokens: Tensor) -> Tensor:
    """The tokens [pos] of one prompt [1, pos].

    Raises:
        PromptError: there are several.
    """
    if tokens.shape[0] != 1:
        raise error(PromptError, "one prompt at a time", got=f"{tokens.shape[0]}", do="call it once per prompt")
    return tokens[0]


def at(first: int, end: int) -> str:
    """The positions of a span as part of an address: "@3" or "@3-5"."""
    return f"@{first}" if end == first + 1 else f"@{first}-{end - 1}"


def window_of(layer: int, width: int, n_layers: int) -> tuple[int, int]:
    """The first and last layer of a window of some width around a layer, cut at the ends of the model."""
    return max(0, layer - width // 2), min(n_layers, layer - (-width // 2)) - 1


def layers_at(first: int, last: int) -> str:
    """Layers as the beginning of an address: "3" or "3-12"."""
    return f"{first}" if first == last else f"{first}-{last}"
