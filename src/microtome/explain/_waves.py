"""What questions about numbers as waves share: the Fourier transform along an axis of numbers, bands, prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import ArgumentError, PromptError, error
from microtome.method import Argument
from microtome.model import Model
from microtome.run import Prompt

Prompts = Annotated[Sequence[Prompt], Argument("prompts, read at their last token", command=False)]
Answers = Annotated[
    Sequence[int] | None, Argument("for each prompt, the place of its answer among the numbers", command=False)
]


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
    """The tokens of an axis of numbers.

    Raises:
        ArgumentError: there are too few, or two are one.
        PromptError: one is several tokens.
    """
    if not isinstance(numbers, Iterable):
        got, do = type(numbers).__name__, "give the tokens of the numbers in their order"
        raise error(ArgumentError, "these are no axis of numbers", got=got, do=do)
    ids = [model.to_id(number) for number in numbers]
    if len(ids) < 4 or len(set(ids)) < len(ids):
        got = f"{len(ids)}, {len(set(ids))} of them different"
        raise error(ArgumentError, "an axis of numbers needs 4 different tokens or more", got=got, do="give more")
    return ids


def rows_of(model: Model, prompts: Sequence[Prompt], least: int = 2) -> list[Tensor]:
    """The tokens [pos] of every prompt.

    Raises:
        PromptError: there are too few.
    """
    rows = [row for prompt in prompts for row in model.to_batch(prompt).rows]
    if len(rows) < least:
        raise error(PromptError, "too few prompts", got=len(rows), allowed=f"{least} or more", do="give more")
    return rows
