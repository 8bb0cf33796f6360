"""What questions about numbers as waves share: the Fourier transform along an axis of numbers, bands, prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import ArgumentError, PromptError, error
from microtome.method import Argument
from microtome.model import Model
from microtome.run import Prompt

Prompts = Annotated[
    Sequence[Prompt] | str,
    Argument(
        'prompts, read at their last token, or one text with choices, such as "{0-4} + {0-4} = "', positional=True
    ),
]
Answers = Annotated[
    Sequence[int] | str | None,
    Argument('for each prompt, the place of its answer among the numbers; "sum": that of what its numbers add up to'),
]
SUM = "sum"
RANGE = re.compile(r"(\d+)-(\d+)")
SLOT = re.compile(r"\{([^{}]*)\}")


def spectrum(values: Float[Tensor, "*at number"]) -> Float[Tensor, "*at frequency"]:
    """The share of each frequency 1 .. N // 2 in the variance along the axis of N numbers.

    Formula:  F_k = sum_n (x_n - mean x) exp(-2 pi i k n / N);  share_k = (|F_k|^2 + |F_{N-k}|^2) / sum_j |F_j|^2.
    """
    n = values.shape[-1]
    power = torch.fft.rfft(values.double() - values.double().mean(-1, keepdim=True)).abs().square()[..., 1:]
    if n % 2 == 0:
        power = torch.cat([2 * power[..., :-1], power[..., -1:]], dim=-1)
    return power / power.sum(-1, keepdim=True).clamp(min=1e-300)


def waves(n: int, frequencies: Sequence[int]) -> Float[Tensor, "wave number"]:
    """Cosine and sine of some frequencies along N numbers; the highest of an even N has no sine."""
    place = torch.arange(n, dtype=torch.float64)
    rows = [f(2 * math.pi * k * place / n) for k in frequencies for f in (torch.cos, torch.sin)]
    return torch.stack([row for row in rows if float(row.abs().max()) > 1e-9])


def written(prompts: Sequence[Prompt] | str) -> Sequence[Prompt]:
    """The prompts that a text with choices in braces stands for: each choice with every one of the others.

    Raises:
        ArgumentError: the text has no braces, or an empty range in them.
    """
    if not isinstance(prompts, str):
        return prompts
    slots = [in_order(inside) for inside in SLOT.findall(prompts)]
    if not slots or not all(slots):
        do = 'write ranges or words in braces, such as "{0-4} + {0-4} = "'
        raise error(ArgumentError, "a text of prompts needs choices", got=repr(prompts), do=do)
    parts = SLOT.sub("\0", prompts).split("\0")
    return ["".join(x for pair in zip(parts, (*chosen, ""), strict=True) for x in pair) for chosen in product(*slots)]


def in_order(written: str) -> list[str]:
    """An axis as it is written: a range "100-199", words with commas between them, or else letter by letter."""
    match = RANGE.fullmatch(written)
    if match is not None:
        return [str(n) for n in range(int(match[1]), int(match[2]) + 1)]
    return written.split(",") if "," in written else list(written)


def sums_in(prompts: Sequence[Prompt]) -> list[int]:
    """What the numbers that are written in each prompt add up to.

    Raises:
        ArgumentError: a prompt is no text, or has no numbers.
    """
    found: list[int] = []
    for prompt in prompts:
        numbers = re.findall(r"\d+", prompt) if isinstance(prompt, str) else []
        if not numbers:
            do = "give the place of each answer among the numbers"
            raise error(ArgumentError, "there is no sum of numbers in a prompt", got=repr(prompt), do=do)
        found.append(sum(map(int, numbers)))
    return found


def integers(given: Any, what: str) -> list[int]:
    """Integers as they were given, also as floats or numbers of NumPy that are integers.

    Raises:
        ArgumentError: one is none.
    """
    found: list[int] = []
    for one in given if isinstance(given, Iterable) and not isinstance(given, str) else [given]:
        number: Any = one
        try:
            found.append(int(number))
        except (TypeError, ValueError, OverflowError):
            found.append(0)
            number = None
        if isinstance(one, str) or number != found[-1]:
            raise error(ArgumentError, f"{what} must be integers", got=repr(one), do="give one for each prompt")
    return found


def tokens_of_numbers(model: Model, numbers: Any) -> list[int]:
    """The tokens of an axis of numbers, given in their order or as a text (see `in_order`).

    Raises:
        ArgumentError: there are too few, or two are one.
        PromptError: one is several tokens.
    """
    numbers = in_order(numbers) if isinstance(numbers, str) else numbers
    if not isinstance(numbers, Iterable):
        got, do = type(numbers).__name__, "give the tokens of the numbers in their order"
        raise error(ArgumentError, "these are no axis of numbers", got=got, do=do)
    ids = [model.to_id(number) for number in numbers]
    if len(ids) < 4 or len(set(ids)) < len(ids):
        got = f"{len(ids)}, {len(set(ids))} of them different"
        raise error(ArgumentError, "an axis of numbers needs 4 different tokens or more", got=got, do="give more")
    return ids


def rows_of(model: Model, prompts: Sequence[Prompt] | str, least: int = 2) -> list[Tensor]:
    """The tokens [pos] of every prompt.

    Raises:
        PromptError: there are too few.
    """
    rows = [row for prompt in written(prompts) for row in model.to_batch(prompt).rows]
    if len(rows) < least:
        raise error(PromptError, "too few prompts", got=len(rows), allowed=f"{least} or more", do="give more")
    return rows
