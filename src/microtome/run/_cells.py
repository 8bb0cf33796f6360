"""Run a sweep: group its cells, walk each group, and read every row with a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microtome.errors import EditError, error
from microtome.model import Site
from microtome.run._batch import Batch, Prompt
from microtome.run._plan import free_memory
from microtome.run._sweep import Base, Cell, Row, Walk, base_of, rows_of

if TYPE_CHECKING:
    from microtome.run._metrics import Metric
    from microtome.run._model import Model

FIXED = 32
"""What a layer costs before its first token, in tokens: reading its weights takes as long as computing so many."""


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do.

    Attributes:
        cells: how many edited runs.
        walks: how many passes over the layers they take.
        forwards: their cost in forwards of one whole prompt, without what is shared.
        bytes: the most that one walk holds.
        shares: what is shared: "layers and positions", or "layers" where attention is not causal.
    """

    cells: int
    walks: int
    forwards: float
    bytes: int
    shares: str

    def __str__(self) -> str:
        return (
            f"{self.cells} cells in {self.walks} walks, sharing {self.shares}: "
            f"the cost of {self.forwards:.1f} forwards, {self.bytes / 2**20:.0f} MiB at a time"
        )


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        values: [cell, ...] the metric of every cell; NaN for cells that were not reached when it was stopped.
        base: [prompt, ...] the metric of the unedited prompts.
        effects: values minus the base of each cell's prompt.
        plan: what was done.
        done: how many cells were reached.
    """

    values: Tensor
    base: Tensor
    effects: Tensor
    plan: SweepPlan
    done: int


@dataclass(frozen=True)
class _Group:
    """Prompts of one length, with the columns that the metric reads."""

    prompts: tuple[int, ...]
    batch: Batch
    read: Tensor


def sweep(
    model: Model,
    prompt: Prompt,
    cells: Sequence[Cell],
    metric: Metric,
    *,
    prompts: Sequence[int] | None = None,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Run many edited copies of prompts, exactly, sharing all that no edit touches; see `Model.sweep`."""
    batch = model.to_batch(prompt)
    which = [0] * len(cells) if prompts is None else list(prompts)
    _check(batch, cells, which)
    rows = rows_of(model, batch, cells, which)
    groups = _by_length(model, batch, metric)
    room = budget if budget is not None else min(int(0.5 * free_memory(model.device)), 2 * 2**30)
    walks = [(g, first, part) for g in groups for first, part in _walks(model, g, rows, room)]
    plan = _plan(model, batch, rows, walks)
    values: Tensor | None = None
    base_values: list[Tensor | None] = [None] * len(batch.lengths)
    done = 0
    base: Base | None = None
    try:
        for group in groups:
            base = base_of(model, group.batch, group.prompts, group.read, cached=model.anatomy.causal)
            read = metric.read(base.logits, torch.tensor(group.prompts, device=base.logits.device))
            for prompt_number, value in zip(group.prompts, read, strict=True):
                base_values[prompt_number] = value
            for _, first, part in (w for w in walks if w[0] is group):
                found = _run_walk(model, base, part, first, metric)
                if values is None:
                    values = torch.full((len(cells), *found.shape[1:]), torch.nan, dtype=found.dtype)
                values[torch.tensor([r.place for r in part])] = found.cpu()
                done += len(part)
                if progress is not None:
                    progress(done, len(cells))
    except KeyboardInterrupt:
        if values is None:
            raise
    known = next(v for v in base_values if v is not None)
    bases = torch.stack([torch.full_like(known, torch.nan) if v is None else v for v in base_values]).cpu()
    if values is None:
        values = torch.empty((0, *bases.shape[1:]))
    return Sweep(values, bases, values - bases[torch.tensor(which, dtype=torch.long)], plan, done)


def _check(batch: Batch, cells: Sequence[Cell], prompts: Sequence[int]) -> None:
    n = len(batch.lengths)
    if len(prompts) != len(cells):
        raise error(EditError, "a sweep needs one prompt number a cell", got=f"{len(prompts)} for {len(cells)} cells")
    if any(not 0 <= p < n for p in prompts):
        raise error(EditError, "a cell names a prompt that is not there", got=max(prompts), allowed=f"0 to {n - 1}")


def _by_length(model: Model, batch: Batch, metric: Metric) -> list[_Group]:
    lengths: dict[tuple[int, int], list[int]] = {}
    columns = {i: metric.columns(i, n) for i, n in enumerate(batch.lengths)}
    for i, n in enumerate(batch.lengths):
        lengths.setdefault((n, len(columns[i])), []).append(i)
    groups: list[_Group] = []
    for (length, _), members in sorted(lengths.items()):
        tokens = torch.stack([batch.tokens[i, :length] for i in members])
        read = torch.tensor([columns[i] for i in members], device=tokens.device)
        groups.append(_Group(tuple(members), Batch(tokens, (length,) * len(members), (0,) * len(members)), read))
    return groups


def _walks(model: Model, group: _Group, rows: Sequence[Row], room: int) -> Iterator[tuple[int, list[Row]]]:
    """The rows of a group, cut into walks by first column and by what memory allows."""
    mine = [r for r in rows if r.prompt in set(group.prompts)]
    by_first: dict[int, list[Row]] = {}
    for row in mine:
        by_first.setdefault(row.first if model.anatomy.causal else 0, []).append(row)
    length = group.batch.tokens.shape[1]
    step = max(1, room // _row_bytes(model, length, group.read.shape[1]))
    for first, together in _joined(by_first, length, model.anatomy.n_layers):
        together.sort(key=lambda r: r.entry)
        for at in range(0, len(together), step):
            yield first, together[at : at + step]


def _joined(by_first: dict[int, list[Row]], length: int, n_layers: int) -> list[tuple[int, list[Row]]]:
    """Join neighbouring groups where one walk over more columns is cheaper than two walks.

    The cost of a walk is, summed over the layers it computes, FIXED plus rows times columns; the best cut of the
    groups, sorted by first column, into runs of neighbours is found by dynamic programming.
    """
    firsts = sorted(by_first)
    entries = [torch.bincount(torch.tensor([r.entry for r in by_first[f]]), minlength=n_layers) for f in firsts]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(firsts) + 1):
        options: list[tuple[float, int]] = []
        joined = torch.zeros(n_layers, dtype=torch.long)
        for start in range(stop - 1, -1, -1):
            joined = joined + entries[start]
            active = joined.cumsum(0)
            cost = FIXED * int((active > 0).sum()) + int(active.sum()) * (length - firsts[start])
            options.append((best[start][0] + cost, start))
        best.append(min(options))
    runs: list[tuple[int, list[Row]]] = []
    stop = len(firsts)
    while stop:
        start = best[stop][1]
        runs.append((firsts[start], [row for f in firsts[start:stop] for row in by_first[f]]))
        stop = start
    return runs


def _row_bytes(model: Model, length: int, read: int) -> int:
    a = model.anatomy
    kv = 4 * a.n_heads * a.d_head * length
    return 4 * (
        length * (6 * a.d_model + 3 * a.d_mlp)
        + kv
        + a.n_heads * length * length
        + 3 * read * a.size(Site("logits"), "vocab")
    )


def _plan(model: Model, batch: Batch, rows: Sequence[Row], walks: Sequence[tuple[Any, int, list[Row]]]) -> SweepPlan:
    n = model.anatomy.n_layers
    cost = sum(
        (n - row.entry) / n * (group.batch.tokens.shape[1] - first) / group.batch.tokens.shape[1]
        for group, first, part in walks
        for row in part
    )
    most = max((_row_bytes(model, g.batch.tokens.shape[1], g.read.shape[1]) * len(p) for g, _, p in walks), default=0)
    shares = "layers and positions" if model.anatomy.causal else "layers only, as attention sees both ways"
    return SweepPlan(len(rows), len(walks), cost, most, shares)


def _run_walk(model: Model, base: Base, part: list[Row], first: int, metric: Metric) -> Tensor:
    walk = Walk(model, base, part, first)
    logits = walk.run()
    owners = [base.prompts.index(r.prompt) for r in walk.rows]
    before = base.read[owners] < first
    if bool(before.any()):
        logits = torch.where(before.unsqueeze(-1), base.logits[owners], logits)
    prompts = torch.tensor([r.prompt for r in walk.rows], device=logits.device)
    values = metric.read(logits, prompts)
    order = {row.place: i for i, row in enumerate(walk.rows)}
    return values[torch.tensor([order[r.place] for r in part], device=values.device)]
