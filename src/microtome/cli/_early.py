"""What is wrong in a command whatever the model says: refused before anything is loaded that takes seconds.

Only what is certain is refused here; what a tokenizer or a model must be asked is refused after it is opened, by the
method itself.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome.errors import PromptError, error
from microtome.files import PAIRS, text_file, whole_file

if TYPE_CHECKING:
    from microtome.method import Sketch

SPANS = ("subject", "keys", "queries")
"""Arguments that are a text in the prompt, or positions of it."""


def refuse(method: Sketch, given: Mapping[str, Any]) -> None:
    """Refuse arguments of a method that no model could take.

    Args:
        method: what is called.
        given: its arguments, as far as they were given.

    Raises:
        MicrotomeError: of the kind that the method itself would raise, later.
    """
    from microtome.anatomy import parse

    names = {p.name for p in method.parameters}
    for value in given.values():
        if isinstance(value, Path):
            text_file(value)
    for name in ("clean", "prompts"):
        if _is_file(given.get(name)) and given.get("corrupt") is None:
            whole_file(given[name], PAIRS, "as pairs")
    if {"clean", "corrupt"} <= names:
        _refuse_pair(given)
    if "prompt" in names:
        for name in SPANS:
            _refuse_span(given["prompt"], given.get(name), name)
    if method.method.kind == "change" and "sites" in given:
        parse(given["sites"])


def _is_file(prompt: Any) -> bool:
    """Whether a prompt is the name of a file of pairs; a chat is none."""
    return isinstance(prompt, str) and prompt.lower().endswith(PAIRS)


def _refuse_pair(given: Mapping[str, Any]) -> None:
    clean, corrupt = given["clean"], given.get("corrupt")
    if corrupt is None and not _is_file(clean):
        do = f"give it behind the clean one, or name a file of pairs that ends in {' or '.join(PAIRS)}"
        raise error(PromptError, "there is no corrupt prompt", do=do)
    if corrupt == clean:
        what = "the clean and the corrupt prompt are the same, so that there is nothing to patch"
        raise error(PromptError, what, do="change what the answer depends on")
    if corrupt is not None and given.get("answer") is None:
        raise error(PromptError, "there is nothing to read", do="give answer=")


def _refuse_span(prompt: Any, span: Any, what: str) -> None:
    """Refuse a text that is not in the prompt, however a tokenizer changes letters; its own marks are left to it."""
    if (
        isinstance(prompt, str)
        and isinstance(span, str)
        and span.strip()[:1].isalnum()
        and _is_unicode(prompt + span)
        and _letters(span) not in _letters(prompt)
    ):
        do = "write it as it stands there, or give its positions, such as @3 or @3-5"
        raise error(PromptError, f'the prompt has no {what} "{span}"', got=f'"{prompt}"', do=do)


def _is_unicode(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair, which a tokenizer refuses with words of its own."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _letters(text: str) -> str:
    """A text without what tokenizers may change: case, accents, forms of letters, spaces."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter) and not letter.isspace())
