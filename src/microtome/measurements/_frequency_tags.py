"""Neurons that follow a rhythm of the text: its power at the rate of a sentence, in rows of equally long sentences.

Formula:  for each row, X_k = the discrete Fourier transform of a neuron's activation over the tokens behind the first
          one, of which as many are taken as are a multiple of the period P; n of them;
          tag_power = |X_k|^2 / sum_j>0 |X_j|^2 at k = n / P, over j = 1 .. n/2; tag2_power the same at 2 n / P;
          controls: the mean over the 8 nearest bins, 4 on either side, without the two of the tags.
          A neuron that fires at one place of every sentence of P words has all of its power at multiples of n / P.
          In a text without such a rhythm a tag has no more power than what is beside it.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import DataError, error
from microtome.method import Argument, Column, Seen, Source, Text, measure

BESIDE = 4
EVEN = 1e-6
"""What varies less than this, relative to its size, has no rhythm: it is rounding."""


def tagged(x: Float[Tensor, "example pos neuron"], period: int) -> dict[str, Float[Tensor, "example neuron"]]:
    """The shares of power [example, neuron] at the tags and beside them, of activations [example, pos, neuron].

    Raises:
        DataError: there are fewer than two periods.
    """
    n = x.shape[1] // period * period
    if n < 2 * period:
        what = f"a row is too short for a period of {period}"
        raise error(DataError, what, got=f"{x.shape[1]} tokens", allowed=f"{2 * period} or more", do="give longer rows")
    power = torch.fft.rfft(x[:, :n].double(), dim=1).abs().square()[:, 1:]  # without the mean
    whole, size = power.sum(1, keepdim=True), x[:, :n].double().abs().amax(1, keepdim=True)
    share = torch.where(whole > (EVEN * n * size).square(), power / whole, 0.0)
    tags = [n // period, 2 * n // period]
    found: dict[str, Tensor] = {}
    for name, k in zip(("tag", "tag2"), tags, strict=True):
        around = range(max(1, k - BESIDE), min(n // 2, k + BESIDE) + 1)
        beside = [j - 1 for j in around if j not in tags]
        found[f"{name}_power"] = share[:, k - 1]
        found[f"{name}_power_beside"] = share[:, beside].mean(1)
    return found


def _power(name: str, what: str) -> tuple[Column, Column]:
    meaning = f"share of the activation's power, its mean left out, at {what}"
    return (
        Column(name, "share", meaning, f"{name}_beside", (0, 1)),
        Column(f"{name}_beside", "share", f"mean share of the 8 frequencies nearest to {what}", range=(0, 1)),
    )


@measure(
    "frequency_tags",
    of="neuron",
    on=Text(sequences=16, width=257),
    sites="mlp.post",
    atlas=False,
    title="rhythm of neurons",
    question="Which neurons follow the rhythm of sentences of one length?",
    columns=(*_power("tag_power", "once per period"), *_power("tag2_power", "twice per period")),
    source=Source(
        "An et al.", "Hierarchical Frequency Tagging Probe (HFTP): A Unified Approach to Investigate Syntactic "
        "Structure Representations in Large Language Models and the Human Brain", 2025, "2510.13255",
        departs="shares of power with intervals over rows, beside the 8 nearest frequencies",
    ),
    cost="one Fourier transform of the activations of each row, in float64",
    check="tests/laws/test_neuron_events.py, tests/planted/test_neurons.py",
)  # fmt: skip
def frequency_tags(
    seen: Seen, period: Annotated[int, Argument("words, a token each, of every sentence", "tokens", 2, 64)] = 4
) -> dict[str, Float[Tensor, "example neuron"]]:
    """The power of every neuron's activation once and twice per sentence, beside that of other frequencies.

    Raises:
        DataError: a row holds fewer than two periods behind its first token.
    """
    return tagged(seen["mlp.post"][:, max(1, seen.lead) :], period)
