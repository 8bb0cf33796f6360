"""Demonstrations of another task: what they are worth, and whether tasks that look alike inside help each other.

Formula:  gain[s, t] = mean over questions of task t of log p(answer) behind demonstrations of task s, minus the same
          without any; x_t = mean over questions of the stream after a layer at the last token, without demonstrations,
          minus the mean of that over tasks; similarity_l[s, t] = cos(x_s, x_t);
          correlation_l = Spearman's rank correlation of similarity and gain over all s other than t, beside the same
          with the tasks of the similarity in random order (mean of its absolute value), whose share that is as large
          is the p-value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.explain._shots import Deck, Piece
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model

PAIR = ("group", "group_2")
SHUFFLES = 500


@question(
    "cross_task",
    title="demonstrations of other tasks",
    question="What are demonstrations of one task worth to another, and do tasks that look alike inside help more?",
    columns=(
        Column("gain", "nats", "rise of the answer's log-probability in a task (column) behind demonstrations of "
               "another (row)", "none: 0 is no demonstration", (None, None), PAIR, title="gain"),
        Column("similarity", "cosine", "of the states of two tasks, at the layer of the largest correlation",
               "none: states of unrelated tasks have a cosine of about -1 / (tasks - 1)", (-1, 1), PAIR,
               title="similarity"),
        Column("correlation", "rank correlation", "of similarity and gain over pairs of different tasks",
               "shuffled_correlation", (-1, 1), ("layer",), title="correlation of similarity and gain"),
        Column("shuffled_correlation", "rank correlation", "the mean size of the same with tasks in random order",
               range=(0, 1), dims=("layer",)),
    ),
    source=Source(
        "Chatterjee et al.", "Language Models can Exploit Cross-Task In-context Learning for Data-Scarce Novel Tasks",
        2024, "2405.10548", departs="gain is that of the answer's log-probability; states are centred over tasks; no "
        "pseudo-labels",
    ),
    cost="(tasks + 1) tests forwards of each task",
    check="tests/laws/test_function_vector.py",
    call='mt.explain.cross_task(model, {"capitals": "country-capital.json", "past": "present-past.json"})',
    reading="gain is what demonstrations of the row's task do to the column's; correlation says whether tasks with "
    "similar states help more.",
    needs=("next token", "*.resid_post"),
)  # fmt: skip
def cross_task(
    model: Model,
    tasks: Annotated[
        Mapping[str, Sequence[tuple[Piece, Piece]] | str],
        Argument("by name, pairs of input and output or a JSON file of these", command=False),
    ],
    *,
    shots: Annotated[int, Argument("demonstrations of a prompt", "demonstrations", least=1)] = 4,
    tests: Annotated[int, Argument("questions of each task", "questions", least=2)] = 16,
    template: Annotated[
        str, Argument('how a pair of texts is written; a prompt ends where "{output}" begins')
    ] = "Q: {input}\nA: {output}\n\n",
) -> Found:
    """Put demonstrations of every task before questions of every other.

    Raises:
        DataError: a file cannot be read, or a task has too few pairs.
        ArgumentError: there are fewer than three tasks, or they have no names.
    """
    given: Any = tasks
    if not isinstance(given, Mapping):
        got, do = type(given).__name__, 'name them, such as {"capitals": "country-capital.json", ...}'
        raise error(ArgumentError, "tasks are given by name", got=got, do=do)
    if len(tasks) < 3:
        raise error(ArgumentError, "too few tasks to compare", got=len(tasks), allowed="3 or more", do="give more")
    decks = {str(name): Deck.of(model, task, template, shots, tests) for name, task in tasks.items()}
    n = model.anatomy.n_layers
    base: list[Tensor] = []
    states: list[Tensor] = []
    for deck in decks.values():
        runs = [model.run(deck.prompt(i, shots=False), "*.resid_post@-1") for i in range(tests)]
        base.append(_chances(runs, deck, tests))
        states.append(torch.stack([run["*.resid_post@-1"][:, 0, 0] for run in runs]).double().mean(0).cpu())
    gains = torch.empty(tests, len(decks), len(decks), dtype=torch.float64)
    for s, source in enumerate(decks.values()):
        for t, target in enumerate(decks.values()):
            runs = [model.run(source.shown(i) + target.prompt(i, shots=False)) for i in range(tests)]
            gains[:, s, t] = _chances(runs, target, tests) - base[t]
    centred = torch.stack(states, dim=1)  # [layer, task, d_model]
    unit = normalize(centred - centred.mean(1, keepdim=True), dim=-1)
    similar = unit @ unit.transpose(1, 2)
    found, shuffled, p = _correlations(similar.numpy(), gains.mean(0).numpy())
    best = int(np.abs(found).argmax())
    values: dict[str, Any] = {"correlation": found, "shuffled_correlation": shuffled, "correlation_p": p}
    values["similarity"] = similar[best]
    names = list(decks)
    coords = {"layer": list(range(n)), "group": names, "group_2": names}
    return Found(values, each={"gain": gains}, coords=coords, attrs={"layer": best, "tests": tests})


def _chances(runs: Sequence[Any], deck: Deck, tests: int) -> Tensor:
    """Log-probability of the answer of each question."""
    rows = [
        run.logits[0, -1].double().log_softmax(-1)[deck.answer(i)] for i, run in zip(range(tests), runs, strict=True)
    ]
    return torch.stack(rows).cpu()


def _correlations(similar: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By layer: the rank correlation over pairs of different tasks, its mean size with tasks shuffled, its p-value."""
    apart = ~np.eye(len(gain), dtype=bool)
    draw = np.random.default_rng(current().seed)
    orders = [draw.permutation(len(gain)) for _ in range(SHUFFLES if len(gain) > 3 else math.factorial(len(gain)))]

    def of(table: np.ndarray) -> float:
        same = np.ptp(table[apart]) == 0 or np.ptp(gain[apart]) == 0  # then there is no order to compare
        if same:
            return math.nan
        found: Any = spearmanr(table[apart], gain[apart])
        return float(found.statistic)

    own = np.array([of(layer) for layer in similar])
    other = np.array([[of(layer[np.ix_(order, order)]) for order in orders] for layer in similar])
    larger = (np.abs(other) >= np.abs(own)[:, None] - 1e-12).sum(1)
    return own, np.abs(other).mean(1), (1 + larger) / (1 + len(orders))
