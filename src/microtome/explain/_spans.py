"""Where words stand in a prompt: a text, a position or a span becomes a range of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor

from microtome.anatomy import Site
from microtome.axes import Tokens
from microtome.errors import PromptError, error
from microtome.method import Span
from microtome.model import Model
from microtome.run import Encoding, Prompt, require_text

COUNT = "count tokens, with the end left out"


def span_of(
    model: Model, tokens: Int[Tensor, " pos"] | Sequence[int] | Encoding, span: Span, what: str = "span"
) -> tuple[int, int]:
    """The tokens (first, end) of a prompt that a text, a position or a span means; of a text its first occurrence.

    An occurrence as words of their own comes before one inside longer words, which counts only if whole tokens make it.
    Letters with their accents as marks of their own (NFD) are the same as without (NFC), and a text is found as the
    tokenizer writes it too, in lower case for one that knows no other.

    Args:
        model: whose tokenizer made the tokens.
        tokens: [pos], one row without padding, or what `model.encodings` gives of it.
        span: text, position, or (first, end), with an end of 0 for that of the prompt.
        what: its name, for the error.

    Raises:
        PromptError: the text is not in the prompt, the span lies outside it, or it is none.
    """
    if isinstance(span, str):
        return _of_text(model, tokens, span, what)
    n = len(tokens.ids) if isinstance(tokens, Encoding) else len(tokens)
    first, end = _places(span, what)
    first, end = first + n if first < 0 else first, end + n if end <= 0 else end
    if not 0 <= first < end <= n:
        got, allowed = str(span if isinstance(span, int) else tuple(span)), f"(first, end) with 0 <= first < end <= {n}"
        raise error(PromptError, f"the prompt has no such {what}", got=got, allowed=allowed, do=COUNT)
    return first, end


def _places(span: object, what: str) -> tuple[int, int]:
    """A position or a span as (first, end), as it was counted."""
    try:
        if isinstance(span, Iterable) and not isinstance(span, bytes | bytearray):
            first, end = (index(place) for place in cast("Iterable[Any]", span))
            return first, end
        place = index(cast("Any", span))
    except (TypeError, ValueError):
        allowed = "a text, a position, or (first, end)"
        raise error(PromptError, f"cannot read the {what}", got=repr(span), allowed=allowed, do=COUNT) from None
    return place, place + 1


def _of_text(model: Model, tokens: Tensor | Sequence[int] | Encoding, text: str, what: str) -> tuple[int, int]:
    codec = model.codec
    if codec is None:
        raise error(PromptError, f"{what} given as text, but the model has no tokenizer", do="give (first, end)")
    require_text(text, f"the {what}")
    prompt = tokens if isinstance(tokens, Encoding) else codec.decode([int(token) for token in tokens])
    # As it was written, and as the tokenizer would give it back; in the text as it was given, and as it is given back.
    back = codec.decode(codec.alone(text))
    known = getattr(codec.tokenizer, "unk_token_id", None) not in back.ids
    wanted, there = dict.fromkeys([text, back.text] if known else [text]), False
    for own in (prompt, codec.decode(prompt.ids)):
        for form in wanted:
            found = own.find(form)
            alone = [place for place in found if own.stands_alone(*place)]
            spans = [own.tokens_at(*place) for place in alone] or [own.whole_tokens_at(*place) for place in found]
            if span := next(filter(None, spans), None):
                return span
            there = there or bool(found)
    why = f'"{text}" only inside longer words' if there else f'no {what} "{text}"'
    do = "write it as it stands there, or give its tokens as (first, end)"
    raise error(PromptError, f"the prompt has {why}", got=f'"{prompt.text}"', do=do)


def one_row(tokens: Tokens) -> Int[Tensor, " pos"]:
    """The tokens [pos] of one prompt [1, pos].

    Raises:
        PromptError: there are several.
    """
    if tokens.shape[0] != 1:
        raise error(PromptError, "one prompt at a time", got=f"{tokens.shape[0]}", do="call it once per prompt")
    return tokens[0]


def one_prompt(model: Model, prompt: Prompt) -> Encoding | Tensor:
    """One prompt as text with its tokens; the tokens [pos] alone where there is no tokenizer.

    Raises:
        PromptError: there are several.
    """
    row = one_row(model.to_tokens(prompt))
    return row if model.tokenizer is None else model.encodings(prompt)[0]


def at(first: int, end: int) -> str:
    """The positions of a span as part of an address: "@3" or "@3-5"."""
    return f"@{first}" if end == first + 1 else f"@{first}-{end - 1}"


def window_of(layer: int, width: int, n_layers: int) -> tuple[int, int]:
    """The first and last layer of a window of some width around a layer, cut at the ends of the model."""
    return max(0, layer - width // 2), min(n_layers, layer - (-width // 2)) - 1


def windows_of(model: Model, site: str, width: int) -> dict[int, str]:
    """By layer, those layers of the window around it that have a site, as the beginning of an address: "3,5-12".

    A layer whose window has no such layer is left out.
    """
    a = model.anatomy
    found: dict[int, str] = {}
    for layer in range(a.n_layers):
        first, last = window_of(layer, width, a.n_layers)
        there = [i for i in range(first, last + 1) if Site(site, i) in a.hook_points]
        if there:
            found[layer] = ",".join(map(str, there))
    return found
