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
    Argument(
        'for each prompt, the place of its answer among the numbers; "sum": that of the number that its choices add up '
        "to"
    ),
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
    slots, parts = slots_of(prompts), SLOT.sub("\0", prompts).split("\0")
    return ["".join(x for pair in zip(parts, (*chosen, ""), strict=True) for x in pair) for chosen in product(*slots)]


def slots_of(prompts: str) -> list[list[str]]:
    """The choices of each pair of braces.

    Raises:
        ArgumentError: the text has no braces, or an empty range in them.
    """
    slots = [in_order(inside) for inside in SLOT.findall(prompts)]
    if not slots or not all(slots):
        do = 'write ranges or words in braces, such as "{0-4} + {0-4} = "'
        raise error(ArgumentError, "a text of prompts needs choices", got=repr(prompts), do=do)
    return slots


def in_order(written: str) -> list[str]:
    """An axis as it is written: a range "100-199", words with commas between them, or else letter by letter.

    Raises:
        ArgumentError: it looks like a range, and is none of numbers.
    """
    match = RANGE.fullmatch(written)
    if match is not None:
        return [str(n) for n in range(int(match[1]), int(match[2]) + 1)]
    if "," not in written and "-" in written and len(written) > 1:
        do = "write 0-9, or all of them with commas between"
        raise error(ArgumentError, "only a range of numbers is written with a hyphen", got=repr(written), do=do)
    return written.split(",") if "," in written else list(written)


def sums_in(prompts: Any) -> list[int]:
    """What the choices in braces add up to, by the prompts that a text stands for; other numbers of it do not count.

    Raises:
        ArgumentError: it is no such text, a choice is no number, or one is subtracted.
    """
    do = "give the place of each answer among the numbers"
    if not isinstance(prompts, str):
        got = type(prompts).__name__
        raise error(ArgumentError, "sums are those of one text with choices in braces", got=got, do=do)
    slots = slots_of(prompts)
    wrong = next((choice for slot in slots for choice in slot if not re.fullmatch(r"\s*\d+\s*", choice)), None)
    if wrong is not None:
        raise error(ArgumentError, "a choice is no number to add up", got=repr(wrong), do=do)
    if re.search(r"[-\u2212*/\u00d7]\s*\{", prompts):
        raise error(ArgumentError, "the choices of this text are not added up", got=repr(prompts), do=do)
    return [sum(map(int, chosen)) for chosen in product(*slots)]


def places_of_sums(words: Sequence[str], prompts: Any) -> list[int]:
    """Where the sum of each prompt's choices stands among the numbers, written as words with or without spaces.

    Raises:
        ArgumentError: a sum is none of the numbers, or there is nothing to add up.
    """
    axis, sums = [word.strip() for word in words], [str(x) for x in sums_in(prompts)]
    missing = next((x for x in sums if x not in axis), None)
    if missing is not None:
        do = "let the numbers hold every sum"
        raise error(ArgumentError, "a sum is none of the numbers", got=missing, allowed=", ".join(axis), do=do)
    return [axis.index(x) for x in sums]


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
