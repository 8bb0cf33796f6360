"""The referee: which estimate finds what exact effects, and circuits that are known, show.

Formula:  of nodes and edges, on pairs of tasks: rank correlation and recall of the estimate's |scores| against |exact
          effects|, see `_contest`; a value a pair. Of edges, on compiled programs: the area under the ROC curve of the
          exact and the estimated scores against the edges of the program, see `circuit_recovery`; a value a program.
          cost = floating-point operations of the estimate over those of a forward of the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from microtome import planted, tasks
from microtome.claims._contest import Outcome, contest, operations, timed
from microtome.context import current
from microtome.errors import ArgumentError, error, nearest
from microtome.explain import POINTS, RELP, attribute, circuit_recovery, patch
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval
from microtome.tasks import Task

NODES = ("atp", "relp", "atp*", "ig")
EDGES = ("eap", "eap-relp", "clean-corrupted", "eap-ig")
METHODS = ("exact", *NODES, *EDGES)
SITES = ("attn.q[head]", "attn.k[head]", "attn.z[head]", "mlp_out")
TASKS = ("indirect_object", "greater_than", "subject_verb_agreement", "induction")
EXACT = "none: what it is compared with is exact"
CHANCE = "none: 0.5 is chance"
ESTIMATE = ("estimate",)


@question(
    "referee",
    command="referee",
    title="referee",
    question="Which estimate of causal effects finds what exact effects and known circuits show?",
    columns=(
        Column("rank_correlation", "correlation", "of sizes of estimated and exact effects of all nodes, or of the "
               "edges that were measured, mean over pairs", "none: 0 is chance", (-1, 1), ESTIMATE),
        Column("recall", "share", "share of the largest exact effects among the largest estimates, mean over pairs",
               "recall_random", (0, 1), ESTIMATE),
        Column("recall_random", "share", "the same of estimates in a random order", range=(0, 1), dims=ESTIMATE),
        Column("cost", "forwards", "operations for one pair, in those of one forward",
               "none: a count", (0, None), ESTIMATE),
        Column("auc", "AUC", "how well scores of edges separate the circuit of a program from the rest, mean over "
               "programs", CHANCE, (0, 1), ESTIMATE),
        Column("perfect", "share", "share of programs whose circuit is separated without an error", "none: compare auc",
               (0, 1), ESTIMATE),
        Column("by_task", "correlation", "rank_correlation, mean over the pairs of a task", EXACT, (-1, 1),
               ("estimate", "task")),
        Column("by_program", "AUC", "auc of each program", CHANCE, (0, 1), ("estimate", "program"), drawn=False),
    ),
    source=(
        Source("Mueller et al.", "MIB: A Mechanistic Interpretability Benchmark", 2025, "2504.13151",
               departs="judges estimates by exact effects of the same cells, beside circuits that are known"),
        Source("Gupta et al.", "InterpBench", 2024, "2407.14494"),
    ),
    cost="a pair: exact patching of all nodes, each estimate, and 2 * top exact edges for each estimate of edges; a "
    "program: exact effects of all its edges",
    check="tests/laws/test_referee.py",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
    call="mt.claims.referee(model)",
    reading="Sizes are compared, not signs. Estimates of nodes are judged on all nodes, those of edges on the edges "
    "that any of them ranks highest and as many random others.",
)  # fmt: skip
def referee(
    model: Model,
    *,
    of: Annotated[Sequence[str], Argument("tasks whose pairs are scored")] = TASKS,
    pairs: Annotated[int, Argument("pairs of each task", "pairs", least=1)] = 4,
    top: Annotated[int, Argument("edges of the largest estimates that are measured, and largest cells of a recall",
                                 "cells", least=1)] = 50,
    programs: Annotated[int, Argument("compiled programs that are scored", "programs", least=0)] = 29,
    inputs: Annotated[int, Argument("inputs of each program", "inputs", least=1)] = 24,
    estimates: Annotated[Sequence[str], Argument("the estimates that are judged")] = (*NODES, *EDGES),
) -> Found:  # fmt: skip
    """Judge estimates of causal effects by exact effects on tasks, and by circuits that are known.

    Over (estimate), NaN where a method scores nothing of the kind: nodes are not scored on programs.

    Raises:
        ArgumentError: there is no such estimate.
        PromptError: there is no such task, or it does not fit the tokenizer.
    """
    _require_known(estimates, of)
    built = [tasks.build(name, model, pairs, seed=current().seed, fewer=True) for name in of]
    every = [replace(task, pairs=(pair,)) for task in built for pair in task.pairs]
    board = _Board(tuple(m for m in METHODS if m in estimates or (m == "exact" and programs)), len(every))
    report = current().counting("pairs")
    for i, one in enumerate(every):
        _judge(model, one, board, i, top)
        report(i + 1, len(every))
    names = list(planted.PROGRAMS)[:programs]
    report = current().counting("programs")
    for i, name in enumerate(names):
        board.take_program(name, inputs)
        report(i + 1, len(names))
    return board.found([task.name for task in built for _ in task.pairs], [task.name for task in built], names)


def _require_known(estimates: Sequence[str], of: Sequence[str]) -> None:
    """Refuse a name that no estimate has, and empty lists.

    Raises:
        ArgumentError: it is one of these.
    """
    known = [*NODES, *EDGES]
    if not estimates or not of:
        got = "no estimate" if of else "no task"
        raise error(ArgumentError, "there is nothing to judge", got=got, allowed=", ".join(known if of else TASKS))
    for name in estimates:
        if name not in known:
            do = f"choose from these.{nearest(name, known)}"
            raise error(ArgumentError, f'there is no estimate "{name}"', allowed=", ".join(known), do=do)


@dataclass
class _Board:
    """What is known so far: by method and pair, and by method and program."""

    methods: tuple[str, ...]
    pairs: int
    values: dict[str, Float[Tensor, "example method"]] = field(default_factory=dict[str, Tensor])
    aucs: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def put(self, column: str, pair: int, method: str, value: float) -> None:
        """Keep a value of a pair."""
        table = self.values.setdefault(column, torch.full((self.pairs, len(self.methods)), torch.nan).double())
        table[pair, self.methods.index(method)] = value

    def put_outcome(self, pair: int, method: str, outcome: Outcome) -> None:
        """Keep how a method did on a pair."""
        self.put("rank_correlation", pair, method, outcome.rank_correlation)
        self.put("recall", pair, method, outcome.recall)
        self.put("recall_random", pair, method, outcome.random)

    def take_program(self, name: str, inputs: int) -> None:
        """Score the edges of a compiled program."""
        asked: Any = [m for m in self.methods if m in POINTS]
        found = circuit_recovery(planted.program(name), pairs=inputs, estimates=asked)
        scored = {
            str(m): float(x) for m, x in zip(found["estimate"].values, found["auc_estimated"].values, strict=True)
        }
        self.aucs.append({"exact": float(found["auc"])} | scored)

    def found(self, names: Sequence[str], of: Sequence[str], programs: Sequence[str]) -> Found:
        """All columns; `names` are the tasks of the pairs."""
        rows = [[row.get(method, np.nan) for method in self.methods] for row in self.aucs]
        aucs = torch.tensor(rows, dtype=torch.float64).reshape(len(programs), len(self.methods))
        values: dict[str, Any] = {}
        if programs:
            values |= zip(("auc", "auc_lo", "auc_hi"), mean_interval(aucs), strict=True)
            values["perfect"] = (aucs == 1).double().where(aucs.isfinite(), torch.nan).mean(0)
            values["by_program"] = aucs.T
        correlation = self.values["rank_correlation"]
        by_task = [torch.tensor([name == task for name in names]) for task in of]
        values["by_task"] = torch.stack([correlation[mine].mean(0) for mine in by_task], 1)
        values |= {name: self.values[name].nanmean(0) for name in ("recall_random", "cost")}
        each = {name: self.values[name] for name in ("rank_correlation", "recall")}
        coords = {"estimate": list(self.methods), "task": list(of)} | ({"program": list(programs)} if programs else {})
        seconds = self.values["seconds"].nanmean(0).tolist()  # no column: they differ from run to run
        told = {f"seconds_{m}": round(s, 3) for m, s in zip(self.methods, seconds, strict=True) if s == s}
        return Found(values, each=each, coords=coords, attrs=told)


def _judge(model: Model, one: Task, board: _Board, pair: int, top: int) -> None:
    """Score one pair: its nodes, then its edges."""
    forward = operations(lambda: model.run(one.pairs[0].clean_tokens))
    nodes = [method for method in board.methods if method in NODES]
    edges = [method for method in board.methods if method in EDGES]
    effects = _flat(patch(model, one, share=False, sites=SITES)) if nodes else np.zeros(0)
    for method in nodes:
        found = _estimated(model, one, board, pair, method, forward, 0)
        board.put_outcome(pair, method, contest(_flat(found), effects, top))
    scores = {method: _estimated(model, one, board, pair, method, forward, top) for method in edges}
    if not edges:
        return
    exact = np.stack([x["score_exact"].values for x in scores.values()])
    effects = np.nanmax(np.where(np.isfinite(exact), exact, -np.inf), 0)  # what any of them had measured
    effects = np.where(np.isfinite(effects), effects, np.nan).reshape(-1)
    for method, found in scores.items():
        board.put_outcome(pair, method, contest(found["score"].values.reshape(-1), effects, top))


def _estimated(model: Model, one: Task, board: _Board, pair: int, method: str, forward: int, verify: int) -> xr.Dataset:
    """What an estimate gives of one pair, with its cost; the best edges are measured too where `verify` asks."""
    given: Any = {"method": "eap", "rules": RELP} if method == "eap-relp" else {"method": method}
    given |= {"sites": SITES} if method in NODES else {}
    if pair == 0:
        board.put("cost", pair, method, operations(lambda: attribute(model, one, verify=0, **given)) / forward)
    found, seconds = timed(lambda: attribute(model, one, verify=0, **given))
    board.put("seconds", pair, method, seconds)
    return attribute(model, one, verify=verify, **given) if verify else found


def _flat(data: xr.Dataset) -> Float[ndarray, " cell"]:
    """The values of all sites, one after the other."""
    return np.concatenate([data[name].values.reshape(-1) for name in SITES if name in data])
