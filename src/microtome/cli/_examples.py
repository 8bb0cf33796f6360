"""Examples in the help of commands, made from the calls that methods declare."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from microtome.cli._hints import Written

if TYPE_CHECKING:
    from microtome.method import Sketch

ENDS = {"change": ("-o", "edits.safetensors")}
"""By kind of a method, what its command needs and its function does not take."""


def example(name: str, method: Sketch, options: Mapping[str, Written]) -> str:
    """The command that does what a method's declared call does.

    Args:
        name: of the command.
        method: whose it is.
        options: how the command takes its arguments.
    """
    call: Any = ast.parse(method.method.call, mode="eval").body
    if method.method.kind == "measure":
        texts = [text for keyword in call.keywords for text in ast.literal_eval(keyword.value).values()]
        return " ".join([f"microtome measure {name}", *(f"--text {text}" for text in texts)])
    words = [_text(value) for value in call.args[1:]]
    for keyword in call.keywords:
        value = _text(keyword.value)
        told = options[keyword.arg].given(value)
        words += [value] if not told.startswith("-") else re.split(" ", told, maxsplit=1)
    return " ".join(["microtome", name, *map(_quoted, (*words, *ENDS.get(method.method.kind, ())))])


def _text(value: ast.expr) -> str:
    """A value as a command takes it: of a list its only one."""
    found = ast.literal_eval(value)
    return str(found[0] if isinstance(found, list) else found)


def _quoted(word: str) -> str:
    return word if shlex.quote(word) == word else f'"{word}"'


def shown(*examples: str) -> str:
    """Examples as the end of a help text."""
    return "Example: " + "\n\n".join(examples).replace("[", "\\[")
