"""The arguments that questions about prompts share: the prompt itself, answers, spans of a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from microtome.method._declare import Argument
from microtome.run import Prompt, prompt_from_text

Span = str | int | Sequence[int]
"""A text in the prompt, one position, or (first, end) with the end left out; negative ones count from the end."""

_POSITIONS = re.compile(r"@(-?\d+)(?:-(-?\d+))?")


def span_from_text(text: str) -> Span:
    """A span as a command takes it: a text in the prompt, or positions written as in an address: "@3", "@3-5"."""
    match = _POSITIONS.fullmatch(text)
    if match is None:
        return text
    first = int(match[1])
    return first if match[2] is None else (first, int(match[2]) + 1)


PromptText = Annotated[
    Prompt,
    Argument("the prompt, as text or as a JSON list of chat messages", positional=True, from_text=prompt_from_text),
]
AnswerToken = Annotated[
    str | int | None, Argument('the answer, one token, such as " Paris"; by default the model\'s own')
]
