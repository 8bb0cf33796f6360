"""How many prompts the model answers, and a circuit by itself.

Formula:  a prompt is answered where no token has a higher logit than the answer at the last position; accuracy is the
          share of pairs answered with the other run's values on all edges outside of the circuit.
"""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from microtome.circuits._bench import Bench
from microtome.method import Column
from microtome.metric import Rank

NAMES = ("accuracy", "accuracy_control", "answered")
ACCURACY = (
    Column("accuracy", "share", "pairs that the circuit alone answers: its likeliest next token; NaN where answers are "
           "no single tokens", "accuracy_control", (0, 1), ()),
    Column("accuracy_control", "share", "the mean of random circuits of as many edges", range=(0, 1), dims=()),
    Column("answered", "share", "pairs that the model answers", "none: what a circuit's are compared with", (0, 1), ()),
)  # fmt: skip


def accuracy_of(bench: Bench, kept: Bool[Tensor, "circuit sender receiver"]) -> dict[str, float]:
    """Of the first circuit, of the others in the mean, and of the model."""
    pairs = bench.pairs
    if not pairs.answer_ids:
        return dict.fromkeys(NAMES, float("nan"))
    ranks = Bench(bench.model, pairs, Rank(list(pairs.answer_ids)), bench.ablation)
    right = (ranks.measure(kept, "answering alone") == 0).double().mean(1)
    return {
        "accuracy": float(right[0]), "accuracy_control": float(right[1:].mean()),
        "answered": float((ranks.clean == 0).double().mean()),
    }  # fmt: skip
