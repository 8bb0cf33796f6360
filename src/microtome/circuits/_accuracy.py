"""How many prompts the model answers, and a circuit by itself.

Formula:  a prompt is answered where no token has a higher logit than the answer at the last position; accuracy is the
          share of pairs answered where all edges outside of the circuit give what replaces them (`ablation`). The ends
          are those of shares of pairs (`share_interval`), at the pairs as they are; random circuits stand in the mean.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from microtome.circuits._bench import Bench
from microtome.method import Column
from microtome.metric import Rank
from microtome.stream import share_interval

NAMES = ("accuracy", "accuracy_control", "answered")
ACCURACY = (
    Column("accuracy", "share", "pairs that the circuit alone answers: its likeliest next token; NaN where answers are "
           "no single tokens", "accuracy_control", (0, 1), ()),
    Column("accuracy_control", "share", "the mean of random circuits of as many edges", range=(0, 1), dims=()),
    Column("answered", "share", "pairs that the model answers", "none: what a circuit's are compared with", (0, 1), ()),
)  # fmt: skip


def accuracy_of(bench: Bench, kept: Bool[Tensor, "circuit sender receiver"]) -> dict[str, Any]:
    """Of the first circuit, of the others in the mean, and of the model; those of the first and the model with ends."""
    pairs = bench.pairs
    if not pairs.answer_ids:
        return dict.fromkeys(NAMES, float("nan"))
    ranks = Bench(bench.model, pairs, Rank(list(pairs.answer_ids)), bench.ablation)
    right = (ranks.measure(kept, "answering alone") == 0).double()  # [circuit, pair]
    found: dict[str, Any] = {"accuracy_control": float(right[1:].mean())}
    for name, own in (("accuracy", right[0]), ("answered", (ranks.clean == 0).double())):
        found |= share_of(name, float(own.sum()), len(own))
    return found


def share_of(name: str, hits: float, n: int) -> dict[str, Any]:
    """A share of pairs with its ends, as values of a result."""
    low, high = share_interval(hits, n)
    return {name: hits / n, f"{name}_lo": ((), low), f"{name}_hi": ((), high)}
