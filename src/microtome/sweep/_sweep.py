"""Run a sweep: group its cells, run a pass for each group, and read every row with a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import SiteEdit, Zero
from microtome.errors import BudgetError, EditError, SiteError, error
from microtome.metric import Metric, TokenSubsetMetric, in_ids
from microtome.run import FIXED, Batch, LoadedModel, Prompt, free_memory, in_bytes, plan_of
from microtome.run.hook import lock_of
from microtome.shown import brief, shown
from microtome.sweep._edges import Edge, Edges, bytes_of_edges
from microtome.sweep._groups import Group, groups_of, passes_of, prompt_bytes, row_bytes
from microtome.sweep._literal import literal_logits, refuse_unreached
from microtome.sweep._pass import Base, BatchedPass, Cell, Row, base_of, edits_of, rows_of, source_rows
from microtome.sweep._sharing import Sharing, sharing_of
from microtome.sweep._standing import refuse_apart, refuse_other_edits, refuse_unfit_start, standing_of


@shown
@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do.

    Attributes:
        cells: how many edited runs.
        passes: how many passes over the layers they take.
        forwards: their cost in forwards of one whole prompt, without what is shared; where nothing is, one for every
            cell and one for every prompt.
        flops: floating-point operations, two a weight and token.
        bytes: the most that is held at once: the base run of some prompts, the rows of one pass, and for edges
            the changes of their senders and the outputs of their branches.
        seconds: at the pace of this model's last run; a first guess before any.
        shares: what is shared: "layers and positions"; "layers only", where attention is not causal or a prefix of
            positions cannot be cut; or "nothing", where a batch that grows gives something else than literal forwards.
    """

    cells: int
    passes: int
    forwards: float
    flops: float
    bytes: int
    seconds: float
    shares: str

    def __str__(self) -> str:
        seconds = f"{self.seconds:.2g}" if self.seconds < 10 else f"{self.seconds:,.0f}"
        return (
            f"{self.cells} cells in {self.passes} passes, sharing {self.shares}: {self.forwards:.1f} forwards, "
            f"{self.flops:.2g} operations, {self.bytes / 2**20:.0f} MiB at a time, about {seconds} s"
        )


@shown
@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        values: [cell, ...] the metric of every cell, in float32; NaN for cells not reached when it was stopped.
        base: [prompt, ...] the metric of the prompts without a cell.
        effects: values minus the base of each cell's prompt.
        plan: what was done.
        done: how many cells were reached.
        prompts: the number of each cell's prompt.
    """

    values: Float[Tensor, " cell *of"]
    base: Float[Tensor, " prompt *of"]
    effects: Float[Tensor, " cell *of"]
    plan: SweepPlan
    done: int
    prompts: tuple[int, ...]

    def whole(self) -> SweepResult:
        """This sweep, if it reached all of its cells.

        Raises:
            KeyboardInterrupt: it was stopped before.
        """
        if self.done < self.plan.cells:
            raise KeyboardInterrupt
        return self


@dataclass(frozen=True)
class _Room:
    """The memory limit of a sweep in bytes, and the part of it that edges take in addition to their cells."""

    allowed: int
    edges: int

    @property
    def left(self) -> int:
        """The bytes left for base runs and passes."""
        return self.allowed - self.edges


@dataclass(frozen=True)
class _Ready:
    """A sweep that is planned and not yet run."""

    which: list[int]
    metric: Metric
    ids: Tensor | None
    groups: list[Group]
    passes: list[tuple[Group, int, list[Row]]]
    plan: SweepPlan
    standing: tuple[SiteEdit, ...]
    sharing: Sharing
    cells: Sequence[Cell]


@shown
class Sweep:
    """A sweep that is prepared: its cost is known, and `run` runs it.

    Attributes:
        plan: its cost.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompt: Prompt,
        cells: Iterable[Cell | Edge],
        metric: Metric,
        *,
        prompts: Iterable[int] | None = None,
        budget: int | None = None,
        start: Tensor | None = None,
    ) -> None:
        """Check, group and plan the cells; see `Model.sweep`."""
        self._cells, self._prompts = list(cells), None if prompts is None else list(prompts)
        self._model, self._metric = model, in_ids(metric, model)
        self._active = list(lock_of(model.hf).active_edits)
        self._standing = standing_of(self._active, edges=any(isinstance(cell, Edge) for cell in self._cells))
        model.require_mapped()
        refuse_apart(model)
        self._batch = model.to_batch(prompt)
        _check(self._batch, self._cells, self._prompts)
        refuse_unfit_start(model, self._batch, start)
        self._sharing = sharing_of(model)
        if any(isinstance(cell, Edge) for cell in self._cells):
            _refuse_edges(model, self._sharing)
        self._start = None if start is None else start.to(model.device, model.dtype)
        self._room = _room(model, self._batch, self._cells, self._prompts, budget)
        # What an edge changes is known only when its branch has run: until then a cell of the same layer represents it.
        self._ready = self._prepare(
            [_stand_in(model, cell) if isinstance(cell, Edge) else cell for cell in self._cells]
        )

    def _facts(self) -> dict[str, str]:
        """What it will run, and its cost."""
        prompts = f"{len(self._batch.lengths)} of up to {self._batch.tokens.shape[1]} tokens"
        return {
            "cells": brief(list(self._cells)),
            "prompts": prompts,
            "metric": brief(self._metric),
            "plan": str(self.plan),
        }

    @property
    def plan(self) -> SweepPlan:
        """Its cost."""
        return self._ready.plan

    def _prepare(self, cells: Sequence[Cell]) -> _Ready:
        given = self._model, self._batch, cells, self._metric, self._prompts, self._room, self._standing, self._sharing
        return _prepare(*given, has_start=self._start is not None)

    def run(self, progress: Callable[[int, int], None] | None = None) -> SweepResult:
        """Run every cell.

        Args:
            progress: called with (done, all) cells.

        Returns:
            Values and effects by cell. Stopped with Ctrl-C it keeps the cells that were reached; `SweepResult.whole` is
            for callers that need all of them.

        Raises:
            EditError: other edits are active than when the sweep was prepared.
        """
        refuse_other_edits(lock_of(self._model.hf).active_edits, self._active)
        if any(isinstance(cell, Edge) for cell in self._cells):
            self._ready = self._prepare(
                _without_edges(self._model, self._batch, self._cells, self._prompts, self._standing)
            )
        return _run(self._model, self._ready, len(self._cells), progress, self._start)


def _stand_in(model: LoadedModel, edge: Edge) -> Zero:
    """A cell that costs what an edge does at most: it acts in the same layer, from the first position on."""
    layer = model.anatomy.n_layers - 1 if edge.layer is None else edge.layer
    return Zero(f"{layer}.resid_pre")


def _without_edges(
    model: LoadedModel,
    batch: Batch,
    cells: Sequence[Cell | Edge],
    prompts: Sequence[int] | None,
    standing: Sequence[SiteEdit],
) -> list[Cell]:
    """The cells, edges made into ordinary ones."""
    found = [cell for cell in cells if not isinstance(cell, Edge)]
    if len(found) == len(cells):
        return found
    by_length: dict[int, list[int]] = {}
    for place, cell in enumerate(cells):
        if isinstance(cell, Edge):
            by_length.setdefault(batch.lengths[0 if prompts is None else prompts[place]], []).append(place)
    made: dict[int, Cell] = {}
    for places in by_length.values():
        which = [0 if prompts is None else prompts[place] for place in places]
        numbers = sorted(set(which))
        tokens = torch.stack([batch.rows[i] for i in numbers])
        edges = [cell for cell in (cells[place] for place in places) if isinstance(cell, Edge)]
        made |= dict(zip(places, Edges(model, tokens, numbers, standing).cells(edges, which), strict=True))
    return [made[place] if isinstance(cell, Edge) else cell for place, cell in enumerate(cells)]


def _prepare(
    model: LoadedModel,
    batch: Batch,
    cells: Sequence[Cell],
    metric: Metric,
    prompts: Sequence[int] | None,
    room: _Room,
    standing: tuple[SiteEdit, ...],
    sharing: Sharing,
    *,
    has_start: bool,
) -> _Ready:
    which = [0] * len(cells) if prompts is None else list(prompts)
    _check_metric(model, metric, len(batch.lengths))
    rows = rows_of(model, batch, cells, which, standing, has_start=has_start)
    _refuse_unread(model, batch, metric, rows)
    refuse_unreached(model, [edits_of(cell, place) for place, cell in enumerate(cells)], sharing.unreached)
    ids, over = _narrowed(model, metric) if sharing.layers else (None, metric)
    vocab = model.anatomy.size(Site("logits"), "vocab") if ids is None else len(ids)
    groups = groups_of(model, batch, metric, room.left, vocab)
    passes: list[tuple[Group, int, list[Row]]] = []
    most = 0
    for group in groups:
        length, read = group.batch.tokens.shape[1], group.read.shape[1]
        held = room.edges + len(group.prompts) * prompt_bytes(model, length, read, vocab)
        each = row_bytes(model, length, read, vocab)
        step = _step(held, each, room.allowed)
        mine = [(group, first, part) for first, part in passes_of(model, group, rows, step, sharing)]
        passes += mine
        most = max(most, held + each * max((len(part) for _, _, part in mine), default=0))
    plan = _plan(model, len(rows), passes, most, sharing)
    return _Ready(which, over, ids, groups, passes, plan, standing, sharing, cells)


def _run(
    model: LoadedModel,
    ready: _Ready,
    cells: int,
    progress: Callable[[int, int], None] | None,
    start: Tensor | None = None,
) -> SweepResult:
    """Run a sweep that is ready, group by group and pass by pass."""
    values: Tensor | None = None
    base_values: list[Tensor | None] = [None] * sum(len(group.prompts) for group in ready.groups)
    done = 0
    try:
        for group in ready.groups:
            own = None if start is None else start[list(group.prompts)]
            base, of_pass = (
                _shared(model, ready, group, own) if ready.sharing.layers else _alone(model, ready, group, own)
            )
            read = ready.metric.read(base, torch.tensor(group.prompts, device=base.device))
            for prompt_number, value in zip(group.prompts, read.float(), strict=True):
                base_values[prompt_number] = value
            for _, first, part in (w for w in ready.passes if w[0] is group):
                found = of_pass(part, first).float()
                if values is None:
                    values = torch.full((cells, *found.shape[1:]), torch.nan, dtype=found.dtype)
                values[torch.tensor([r.place for r in part])] = found.cpu()
                done += len(part)
                if progress is not None:
                    progress(done, cells)
    except KeyboardInterrupt:
        if values is None:
            raise
    known = next(v for v in base_values if v is not None)
    bases = torch.stack([torch.full_like(known, torch.nan) if v is None else v for v in base_values]).cpu()
    if values is None:
        values = torch.empty((0, *bases.shape[1:]))
    effects = values - bases[torch.tensor(ready.which, dtype=torch.long)]
    return SweepResult(values, bases, effects, ready.plan, done, tuple(ready.which))


def _narrowed(model: LoadedModel, metric: Metric) -> tuple[Int[Tensor, " id"] | None, Metric]:
    """The tokens that a metric reads, and the metric over these alone, if it names them; None for all."""
    # A head with a transform of its own between the stream and the unembedding, as BERT's, is left whole.
    if not isinstance(metric, TokenSubsetMetric) or not model.anatomy.causal:
        return None, metric
    ids, over = metric.token_subset()
    return torch.tensor(ids, device=model.device), over


def _check(batch: Batch, cells: Sequence[Cell | Edge], prompts: Sequence[int] | None) -> None:
    n = len(batch.lengths)
    if prompts is None:
        if n > 1:
            raise error(EditError, f"a sweep over {n} prompts needs the prompt of each cell", do="give prompts=")
        prompts = [0] * len(cells)
    if len(prompts) != len(cells):
        raise error(EditError, "a sweep needs one prompt number per cell", got=f"{len(prompts)} for {len(cells)} cells")
    if any(not 0 <= p < n for p in prompts):
        raise error(EditError, "a cell names a prompt that does not exist", got=max(prompts), allowed=f"0 to {n - 1}")
    for edit in (edit for cell in cells for edit in (cell if isinstance(cell, Sequence) else (cell,))):
        rows = source_rows(edit)
        if rows not in (None, 1, n):
            raise error(
                EditError,
                f"the source of {edit!r} has another number of rows than there are prompts",
                got=f"{rows} rows for {n} prompts",
                do="run one other prompt, or one per prompt",
            )


def _check_metric(model: LoadedModel, metric: Metric, prompts: int) -> None:
    """Refuse a metric that names tokens outside the vocabulary, or another number of answers than there are prompts."""
    vocab = model.anatomy.size(Site("logits"), "vocab")
    for name in ("answer", "foil"):
        named = getattr(metric, name, None)
        if named is None:
            continue
        ids = torch.as_tensor(named).reshape(-1).tolist()
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise error(
                EditError, f"the {name} of a metric lies outside the vocabulary", got=bad, allowed=f"0 to {vocab - 1}"
            )
        if len(ids) not in (1, prompts):
            raise error(
                EditError,
                f"a metric has another number of {name}s than there are prompts",
                got=f"{len(ids)} for {prompts} prompts",
                do="give one, or one per prompt",
            )


def _refuse_unread(model: LoadedModel, batch: Batch, metric: Metric, rows: Sequence[Row]) -> None:
    """Refuse a metric that reads only what comes before every cell: no value could differ from the base."""
    last = {i: max(metric.columns(i, batch.lengths[i])) for i in {row.prompt for row in rows}}
    if rows and model.anatomy.causal and all(last[row.prompt] < row.first for row in rows):
        row = rows[0]
        raise error(
            EditError,
            "the metric does not depend on what is edited, so that every effect would be 0",
            got=f"it reads up to position {last[row.prompt]}, and the first cell edits from {row.first} on",
            do="read a later position",
        )


def _room(
    model: LoadedModel, batch: Batch, cells: Sequence[Cell | Edge], prompts: Sequence[int] | None, budget: int | None
) -> _Room:
    """The memory limit of a sweep, and the part of it that its edges take.

    Raises:
        BudgetError: the edges take all of it.
    """
    budget = current().budget if budget is None else budget
    allowed = budget if budget is not None else min(int(0.5 * free_memory(model.device)), 2 * 2**30)
    which = [0] * len(cells) if prompts is None else prompts
    edges = [(cell, prompt) for cell, prompt in zip(cells, which, strict=True) if isinstance(cell, Edge)]
    room = _Room(allowed, bytes_of_edges(model, edges, batch.lengths))
    if room.left <= 0 and edges:
        raise error(
            BudgetError,
            f"{len(edges)} edges need more than memory allows",
            got=in_bytes(room.edges),
            allowed=in_bytes(allowed),
            do="measure fewer edges at a time, or raise budget=",
        )
    return room


def _step(held: int, each: int, allowed: int) -> int:
    """How many rows a pass may hold in addition to what is held already.

    Raises:
        BudgetError: not even one.
    """
    if held + each > allowed:
        raise error(
            BudgetError,
            "one cell of this sweep needs more than memory allows",
            got=in_bytes(held + each),
            allowed=f"{in_bytes(allowed)}, which is {in_bytes(held + each - allowed)} less",
            do="shorten the prompt, read fewer positions, or raise budget=",
        )
    return (allowed - held) // each


def _plan(
    model: LoadedModel, cells: int, passes: Sequence[tuple[Group, int, list[Row]]], most: int, sharing: Sharing
) -> SweepPlan:
    n = model.anatomy.n_layers
    forwards = flops = work = 0.0
    for group in dict.fromkeys(group for group, _, _ in passes):
        length = group.batch.tokens.shape[1]
        one = plan_of(model, Batch(group.batch.tokens[:1], (length,), (0,)), [], logits=False, grad=False, pace=1.0)
        mine = [(first, part) for g, first, part in passes if g is group]
        if sharing.layers:
            cost = sum((n - row.entry) / n * (length - first) / length for first, part in mine for row in part)
            # Every pass reads the weights of the layers that it computes, which takes as long as FIXED tokens.
            read = sum((n - min(row.entry for row in part)) / n for _, part in mine) + 1
            forwards += cost
        else:
            cost = float(len(mine))
            read = cost + len(group.prompts)
            forwards += read
        flops += (cost + len(group.prompts)) * one.flops
        work += (cost + len(group.prompts) + read * FIXED / length) * one.flops
    return SweepPlan(cells, len(passes), forwards, flops, most, work / model.pace, sharing.describe(model))


def _refuse_edges(model: LoadedModel, sharing: Sharing) -> None:
    """Refuse edges where layers cannot be run without those before them.

    Raises:
        SiteError: a batch that grows inside the model gives something else than literal forwards.
    """
    if not sharing.layers:
        raise error(
            SiteError,
            f"{model.anatomy.name} has no edges that can be measured",
            got="a branch run alone, or a batch that grows inside it, gives something else than literal forwards",
            allowed="models whose sweeps share layers",
            do="patch the nodes themselves: their cells are run one by one",
        )


OfPass = Callable[[list[Row], int], Shaped[Tensor, "row ..."]]
"""The metric of the rows of a pass from its first column on."""


def _shared(
    model: LoadedModel, ready: _Ready, group: Group, start: Tensor | None
) -> tuple[Float[Tensor, "prompt read vocab"], OfPass]:
    """Logits of a group's base run, and how its passes are run: on what that run left."""
    sharing = ready.sharing
    base = base_of(model, group.batch, group.prompts, group.read, ready.ids, ready.standing, sharing.positions, start)
    return base.logits, lambda part, first: _run_pass(model, base, part, first, ready.metric, narrow=sharing.narrow)


def _alone(
    model: LoadedModel, ready: _Ready, group: Group, start: Tensor | None
) -> tuple[Float[Tensor, "prompt read vocab"], OfPass]:
    """Logits of a group's prompts, and how its passes are run: a literal forward for every cell."""

    def logits(prompt: int, edits: Sequence[SiteEdit] = ()) -> Float[Tensor, "one read vocab"]:
        place = group.prompts.index(prompt)
        one = slice(place, place + 1)
        own = None if start is None else start[one]
        whole = literal_logits(model, group.batch.tokens[one], edits, prompt=prompt, standing=ready.standing, start=own)
        return whole[:, group.read[place]]

    def of_pass(part: list[Row], first: int) -> Tensor:
        found = torch.cat([logits(row.prompt, edits_of(ready.cells[row.place], row.place)) for row in part])
        return ready.metric.read(found, torch.tensor([row.prompt for row in part], device=found.device))

    return torch.cat([logits(prompt) for prompt in group.prompts]), of_pass


def _run_pass(
    model: LoadedModel, base: Base, part: list[Row], first: int, metric: Metric, *, narrow: bool
) -> Shaped[Tensor, "row ..."]:
    batched_pass = BatchedPass(model, base, part, first, narrow=narrow)
    logits = batched_pass.run()
    owners = [base.prompts.index(r.prompt) for r in batched_pass.rows]
    before = base.read[owners] < first
    if bool(before.any()):
        logits = torch.where(before.unsqueeze(-1), base.logits[owners], logits)
    prompts = torch.tensor([r.prompt for r in batched_pass.rows], device=logits.device)
    values = metric.read(logits, prompts)
    order = {row.place: i for i, row in enumerate(batched_pass.rows)}
    return values[torch.tensor([order[r.place] for r in part], device=values.device)]
