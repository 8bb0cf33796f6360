"""Which cells run together: prompts of one length in a group, and cells of one first column in a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from microtome.metric import Metric
from microtome.run import FIXED, Batch, LoadedModel
from microtome.sweep._pass import Row
from microtome.sweep._sharing import Sharing


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts of one length, with the columns that the metric reads."""

    prompts: tuple[int, ...]
    batch: Batch
    read: Int[Tensor, "prompt read"]


def groups_of(model: LoadedModel, batch: Batch, metric: Metric, room: int, vocab: int) -> list[Group]:
    """Prompts of one length together, as many as fit in half of the room."""
    lengths: dict[tuple[int, int], list[int]] = {}
    columns = {i: metric.columns(i, n) for i, n in enumerate(batch.lengths)}
    for i, n in enumerate(batch.lengths):
        lengths.setdefault((n, len(columns[i])), []).append(i)
    groups: list[Group] = []
    rows = batch.rows
    for (length, read_at), members in sorted(lengths.items()):
        step = max(1, room // 2 // prompt_bytes(model, length, read_at, vocab))
        for first in range(0, len(members), step):
            part = members[first : first + step]
            tokens = torch.stack([rows[i] for i in part])
            read = torch.tensor([columns[i] for i in part], device=tokens.device)
            groups.append(Group(tuple(part), Batch(tokens, (length,) * len(part), (0,) * len(part)), read))
    return groups


def passes_of(
    model: LoadedModel, group: Group, rows: Sequence[Row], step: int, sharing: Sharing
) -> Iterator[tuple[int, list[Row]]]:
    """The rows of a group, cut into passes by first column and by the memory limit; alone where nothing is shared."""
    mine = [r for r in rows if r.prompt in set(group.prompts)]
    if not sharing.layers:
        yield from ((0, [row]) for row in mine)
        return
    by_first: dict[int, list[Row]] = {}
    for row in mine:
        by_first.setdefault(row.first if sharing.positions else 0, []).append(row)
    for first, together in _joined(by_first, group.batch.tokens.shape[1], model.anatomy.n_layers):
        together.sort(key=lambda r: r.entry)
        for at in range(0, len(together), step):
            yield first, together[at : at + step]


def _joined(by_first: dict[int, list[Row]], length: int, n_layers: int) -> list[tuple[int, list[Row]]]:
    """Join neighbouring groups where one pass over more columns is cheaper than two.

    The cost of a pass is, summed over the layers it computes, FIXED plus rows times columns; the best cut of the
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


def row_bytes(model: LoadedModel, length: int, read: int, vocab: int) -> int:
    """What one row of a pass holds: streams and neurons of a layer, keys and values, a pattern, and logits."""
    a = model.anatomy
    kv = 4 * a.n_heads * a.d_head * length
    return 4 * (length * (6 * a.d_model + 3 * a.d_mlp) + kv + a.n_heads * length * length + 3 * read * vocab)


def prompt_bytes(model: LoadedModel, length: int, read: int, vocab: int) -> int:
    """What the base run keeps of one prompt: the stream before every layer, keys and values, and what is read."""
    a = model.anatomy
    return 4 * (a.n_layers * length * (a.d_model + 2 * a.n_kv_heads * a.d_head) + read * vocab)
