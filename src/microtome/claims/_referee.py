"""The referee: which estimate finds what exact effects, and circuits that are known, show.

Formula:  of nodes and edges, on pairs of tasks: rank correlation and recall of the estimate's |scores| against |exact
          effects|, see `_contest`; a value a pair. On compiled and on trained programs: the area under the ROC curve of
          the exact and the estimated scores against the edges and the nodes of the circuit, see `circuit_recovery` and
          `node_recovery`; a value a program. "random" draws the scores of all of these at random; where estimates of
          nodes and of edges are judged together, its rank correlation and recall are of nodes, and those of
          "random-edges" of edges.
          cost = floating-point operations of the estimate over those of a forward of the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from microtome.explain import RELP, attribute, circuit_recovery, node_recovery, patch, verify
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.planted import Planted
from microtome.stream import mean_interval
from microtome.tasks import Task

NODES = ("atp", "relp", "atp*", "ig")
EDGES = ("eap", "eap-relp", "clean-corrupted", "eap-ig", "eap-ig-activations")
CONTROL = "random"
CONTROL_OF_EDGES = "random-edges"
"""Drawn scores of edges, where `random` is of nodes."""
METHODS = ("exact", *NODES, *EDGES, CONTROL, CONTROL_OF_EDGES)
SITES = ("attn.q[head]", "attn.k[head]", "attn.z[head]", "mlp_out")
TASKS = ("indirect_object", "greater_than", "subject_verb_agreement", "induction")
EXACT = "none: what it is compared with is exact"
CHANCE = "none: compare the estimate `random`, about 0.5"
CHANCE_PERFECT = "none: compare the estimate `random`"
CHANCE_RANKS = "none: compare `random` with estimates of nodes, `random-edges` with those of edges"
ESTIMATE = ("estimate",)


@question(
    "referee",
    command="referee",
    title="referee",
    question="Which estimate of causal effects finds what exact effects and known circuits show?",
    columns=(
        Column("rank_correlation", "correlation", "of sizes of estimated and exact effects of all nodes, or of the "
               "edges that were measured, mean over pairs", CHANCE_RANKS, (-1, 1), ESTIMATE),
        Column("recall", "share", "share of the largest exact effects among the largest estimates, mean over pairs",
               "recall_random", (0, 1), ESTIMATE),
        Column("recall_random", "share", "the same of estimates in a random order", range=(0, 1), dims=ESTIMATE),
        Column("cost", "forwards", "operations for one pair, in those of one forward",
               "none: a count", (0, None), ESTIMATE),
        Column("auc", "AUC", "how well scores of edges separate the circuit of a compiled program from the rest, mean "
               "over programs", CHANCE, (0, 1), ESTIMATE),
        Column("auc_nodes", "AUC", "the same of scores of heads and MLPs, over programs that have any outside", CHANCE,
               (0, 1), ESTIMATE),
        Column("auc_trained", "AUC", "auc over networks that were trained to have the circuit of a program, but those "
               "whose edges are not known (histogram): of fewer than 8 it has no interval", CHANCE, (0, 1), ESTIMATE),
        Column("auc_nodes_trained", "AUC", "auc_nodes over these networks", CHANCE, (0, 1), ESTIMATE),
        Column("perfect", "share", "share of compiled programs whose edges, or nodes for estimates of nodes, are "
               "separated without an error", CHANCE_PERFECT, (0, 1), ESTIMATE),
        Column("by_task", "correlation", "rank_correlation, mean over the pairs of a task", EXACT, (-1, 1),
               ("estimate", "task")),
        Column("by_program", "AUC", "of the edges of each program", CHANCE, (0, 1), ("estimate", "program"),
               drawn=False),
        Column("by_program_nodes", "AUC", "of its heads and MLPs", CHANCE, (0, 1), ("estimate", "program"),
               drawn=False),
    ),
    source=(
        Source("Mueller et al.", "MIB: A Mechanistic Interpretability Benchmark", 2025, "2504.13151",
               departs="judges estimates by exact effects of the same cells, beside circuits that are known"),
        Source("Gupta et al.", "InterpBench", 2024, "2407.14494"),
    ),
    cost="a pair: exact patching of all nodes, each estimate, and 2 * top exact edges for each estimate of edges; a "
    "program: exact effects of all its edges and nodes, and each estimate",
    check="tests/laws/test_referee.py",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
    call="mt.claims.referee(model)",
    reading="Sizes are compared, not signs. Estimates of nodes are judged on all nodes, those of edges on the edges "
    "that any of them ranks highest and as many random others.",
)  # fmt: skip
def referee(
    model: Model,
    *,
    of: Annotated[Sequence[str], Argument("tasks whose pairs are scored; none where programs are")] = TASKS,
    pairs: Annotated[int, Argument("pairs of each task", "pairs", least=1)] = 4,
    top: Annotated[int, Argument("edges of the largest estimates that are measured, and largest cells of a recall",
                                 "cells", least=1)] = 50,
    programs: Annotated[int, Argument("compiled programs that are scored", "programs", least=0)] = 29,
    trained: Annotated[int, Argument("trained programs that are scored", "programs", least=0)] = 3,
    inputs: Annotated[int, Argument("inputs of each program", "inputs", least=1)] = 24,
    estimates: Annotated[Sequence[str], Argument("the estimates that are judged")] = (*NODES, *EDGES),
) -> Found:  # fmt: skip
    """Judge estimates of causal effects by exact effects on tasks, and by circuits that are known.

    Over (estimate), NaN where a method scores nothing of the kind. The estimate "random", scores of nodes or edges that
    are drawn, says what chance gives; of pairs it is of nodes if any estimate of nodes is judged, and "random-edges"
    then stands beside the estimates of edges.

    Raises:
        ArgumentError: there is no such estimate.
        PromptError: there is no such task, or it does not fit the tokenizer.
    """
    _require_known(estimates, of or list(planted.PROGRAMS)[:programs] or planted.TRAINED[:trained])
    built = [tasks.build(name, model, pairs, seed=current().seed, fewer=True) for name in of]
    every = [replace(task, pairs=(pair,)) for task in built for pair in task.pairs]
    compiled = list(planted.PROGRAMS)[:programs]
    known = [planted.program(name) for name in compiled]
    known += [planted.trained(name) for name in planted.TRAINED[:trained]]
    both = {*estimates} & {*NODES} and {*estimates} & {*EDGES}
    asked = {*estimates, CONTROL, *([CONTROL_OF_EDGES] if both else []), *(["exact"] if known else [])}
    board = _Board(tuple(m for m in METHODS if m in asked), len(every), len(compiled))
    report = current().counting("pairs")
    for i, one in enumerate(every):
        _judge(model, one, board, i, top)
        report(i + 1, len(every))
    report = current().counting("programs")
    for i, it in enumerate(known):
        board.take_program(it, inputs)
        report(i + 1, len(known))
    return board.found([task.name for task in built for _ in task.pairs], [task.name for task in built])


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
    """What is known so far: by method and pair, and by method and program, of which the first are compiled."""

    methods: tuple[str, ...]
    pairs: int
    compiled: int = 0
    values: dict[str, Float[Tensor, "example method"]] = field(default_factory=dict[str, Tensor])
    programs: list[str] = field(default_factory=list[str])
    edges: list[list[float]] = field(default_factory=list[list[float]])
    nodes: list[list[float]] = field(default_factory=list[list[float]])

    def put(self, column: str, pair: int, method: str, value: float) -> None:
        """Keep a value of a pair."""
        table = self.values.setdefault(column, torch.full((self.pairs, len(self.methods)), torch.nan).double())
        table[pair, self.methods.index(method)] = value

    def put_outcome(self, pair: int, method: str, outcome: Outcome) -> None:
        """Keep how a method did on a pair."""
        self.put("rank_correlation", pair, method, outcome.rank_correlation)
        self.put("recall", pair, method, outcome.recall)
        self.put("recall_random", pair, method, outcome.random)

    def take_program(self, it: Planted, inputs: int) -> None:
        """Score the edges and the nodes of a program."""
        named = it.model.anatomy.name
        self.programs.append(named if len(self.programs) < self.compiled else f"{named} (trained)")
        for table, kind, recovery in (
            (self.edges, EDGES, circuit_recovery),
            (self.nodes, NODES, node_recovery),
        ):
            if table is self.edges and not it.truth.get("edges"):  # only its nodes are known
                table.append([np.nan] * len(self.methods))
                continue
            asked: Any = [m for m in self.methods if m in kind or m == CONTROL]
            found = recovery(it, pairs=inputs, estimates=asked)
            scored = dict(zip(asked, found["auc_estimated"].values.tolist(), strict=True))
            scored["exact"] = float(found["auc"])
            if table is self.edges:
                scored[CONTROL_OF_EDGES] = scored[CONTROL]
            table.append([scored.get(method, np.nan) for method in self.methods])

    def _of_programs(self) -> dict[str, Any]:
        """The columns over programs."""
        found: dict[str, Any] = {}
        for kind, rows in (("", self.edges), ("_nodes", self.nodes)):
            aucs = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(self.methods))
            found[f"by_program{kind}"] = aucs.T
            for origin, some in (("", aucs[: self.compiled]), ("_trained", aucs[self.compiled :])):
                there = some[some.isfinite().any(1)]  # a circuit of all nodes separates nothing
                if len(there):
                    ends = (f"auc{kind}{origin}{end}" for end in ("", "_lo", "_hi"))
                    found |= zip(ends, mean_interval(there), strict=True)
        if self.compiled:
            perfect = [
                (x == 1).double().where(x.isfinite(), torch.nan).nanmean(0)
                for x in (found[f"by_program{kind}"].T[: self.compiled] for kind in ("", "_nodes"))
            ]
            found["perfect"] = perfect[0].where(perfect[0].isfinite(), perfect[1])
        return found

    def found(self, names: Sequence[str], of: Sequence[str]) -> Found:
        """All columns; `names` are the tasks of the pairs."""
        values = self._of_programs() if self.programs else dict[str, Any]()
        coords = {"estimate": list(self.methods)} | ({"program": self.programs} if self.programs else {})
        if not of:
            return Found(values, coords=coords)
        correlation = self.values["rank_correlation"]
        by_task = [torch.tensor([name == task for name in names]) for task in of]
        values["by_task"] = torch.stack([correlation[mine].mean(0) for mine in by_task], 1)
        values |= {name: self.values[name].nanmean(0) for name in ("recall_random", "cost")}
        each = {name: self.values[name] for name in ("rank_correlation", "recall")}
        coords["task"] = list(of)
        seconds = self.values["seconds"].nanmean(0).tolist()  # no column: they differ from run to run
        taken = {f"seconds_{m}": round(s, 3) for m, s in zip(self.methods, seconds, strict=True) if s == s}
        return Found(values, each=each, coords=coords, attrs=taken)


def _judge(model: Model, one: Task, board: _Board, pair: int, top: int) -> None:
    """Score one pair: its nodes, then its edges."""
    _, forward = operations(lambda: model.run(one.pairs[0].clean_tokens))
    nodes = [method for method in board.methods if method in NODES]
    edges = [method for method in board.methods if method in EDGES]
    draw = np.random.default_rng([current().seed, pair])
    of_edges = CONTROL_OF_EDGES if nodes else CONTROL
    for name in (CONTROL, of_edges if edges else CONTROL):
        board.put("cost", pair, name, 0.0)
    if nodes:
        effects = _flat(patch(model, one, share=False, sites=SITES))
        for method in nodes:
            found = _estimated(model, one, board, pair, method, forward, 0)
            board.put_outcome(pair, method, contest(_flat(found), effects, top))
        board.put_outcome(pair, CONTROL, contest(draw.random(effects.shape), effects, top))
    if not edges:
        return
    scores = {method: _estimated(model, one, board, pair, method, forward, top) for method in edges}
    exact = np.stack([x["score_exact"].values for x in scores.values()])
    effects = np.nanmax(np.where(np.isfinite(exact), exact, -np.inf), 0)  # what any of them had measured
    effects = np.where(np.isfinite(effects), effects, np.nan).reshape(-1)
    for method, found in scores.items():
        board.put_outcome(pair, method, contest(found["score"].values.reshape(-1), effects, top))
    board.put_outcome(pair, of_edges, contest(draw.random(effects.shape), effects, top))


def _estimated(model: Model, one: Task, board: _Board, pair: int, method: str, forward: int, top: int) -> xr.Dataset:
    """What an estimate gives of one pair, with its cost; so many of the best edges are measured too."""
    given: Any = {"method": "eap", "rules": RELP} if method == "eap-relp" else {"method": method}
    given |= {"sites": SITES} if method in NODES else {}
    work = partial(attribute, model, one, verify=0, **given)
    if pair == 0:
        (found, seconds), count = operations(lambda: timed(work))
        board.put("cost", pair, method, count / forward)
    else:
        found, seconds = timed(work)
    if pair or board.pairs == 1:  # counting takes time of its own
        board.put("seconds", pair, method, seconds)
    if not top:
        return found
    top = min(top, int(np.isfinite(found["score"].values).sum()))
    if "answer_id" in found.attrs:
        return verify(model, found, top=top)
    return attribute(model, one, verify=top, **given)  # sets of answers are not recorded with the scores


def _flat(data: xr.Dataset) -> Float[ndarray, " cell"]:
    """The values of all sites, one after the other."""
    return np.concatenate([data[name].values.reshape(-1) for name in SITES if name in data])
