"""ACDC: edges are tried one by one from the logits back, and each that costs less than a threshold goes for good.

Formula:  receivers from the last to the first, of each its senders from the last to the first:
          u -> v goes if cost(circuit without it) - cost(circuit) < tau, else it stays; cost is KL(clean || circuit) or
          minus the metric, in the mean over pairs.
          What is tried at once are the circuits without the next edge, the next two, the next three ... of a receiver.
          Up to the first that costs too much each is the one that the literal algorithm reaches, so what is found is
          what it finds, to rounding. An edge into a node that no way leads from to the logits costs nothing, and is
          not run. A row is computed from its receiver's layer on, and only where it differs from the circuit so far.
Cost:     a row for each edge into a node that the circuit uses, of the layers and branches behind it that its edges
          reach; the literal algorithm takes a forward an edge.
Check:    the literal algorithm with plain hooks finds the same edges; tests/laws/test_acdc.py. The edges of compiled
          programs; tests/planted/test_circuits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.errors import ArgumentError, error
from microtome.sweep import Circuits

FIRST, MOST = 8, 96
"""How many edges are tried at once at first, and at most; fewer where memory does not allow for them."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """What ACDC found.

    Attributes:
        kept: [sender, receiver] the edges that stayed.
        costs: [sender, receiver] what each edge cost when it was tried; NaN where it was not.
        rows: how many circuits were run, and how many of them count.
        cost: of the circuit that is left.
    """

    kept: Bool[Tensor, "sender receiver"]
    costs: Float[Tensor, "sender receiver"]
    rows: tuple[int, int]
    cost: float


class _Search:
    """The circuit so far, on engines of one model."""

    def __init__(self, engines: Sequence[Circuits], sign: float) -> None:
        self.engines, self.sign = engines, sign
        self.pairs = sum(len(engine.tokens) for engine in engines)
        self.states = [engine.clean for engine in engines]
        self.kept = engines[0].edges.clone()
        self.cost = sign * sum(float(s.values.double().sum()) for s in self.states) / self.pairs
        self.run = self.counted = 0

    def most(self, receiver: int) -> int:
        """How many edges into a receiver may be tried at once: a row holds what it reads and what behind it changes."""
        n = self.engines[0].numbering
        behind = n.senders - n.before(receiver) + 1
        rows = min(min(MOST, e.room() // e.bytes_of_row(behind)) // len(e.tokens) for e in self.engines)
        return max(1, rows)

    def needed(self, receiver: int) -> bool:
        """Whether a way leads from a receiver to the logits."""
        n = self.engines[0].numbering
        if receiver == n.receivers - 1:
            return True
        layer, place = divmod(receiver, 3 * n.n_heads + 1)
        own = n.mlp(layer) if place == 3 * n.n_heads else n.heads(layer).start + place % n.n_heads
        return bool(n.needed(self.kept.unsqueeze(0))[0, own])

    def drop(self, senders: Sequence[int], receiver: int) -> None:
        """Take edges out that change nothing."""
        self.kept[list(senders), receiver] = False
        self.states = [replace(state, kept=self.kept.clone()) for state in self.states]

    def try_all(self, senders: Sequence[int], receiver: int, tau: float) -> tuple[int, Tensor]:
        """Try edges, take out those before the first that costs too much, and say how many and what each cost."""
        ran = [
            engine.removing(state, receiver, senders) for engine, state in zip(self.engines, self.states, strict=True)
        ]
        costs = sum(r.values.double().unflatten(0, (len(senders), n)).sum(1).cpu() for r, n in ran)
        costs = self.sign * torch.as_tensor(costs) / self.pairs
        steps = torch.diff(costs, prepend=torch.tensor([self.cost], dtype=torch.float64))
        over = (~(steps < tau)).nonzero().flatten()
        gone = int(over[0]) if len(over) else len(senders)
        if gone:
            self.kept[list(senders[:gone]), receiver] = False
            self.states = [
                engine.accept(state, r, self.kept.clone(), torch.arange(n, device=r.values.device) + n * (gone - 1))
                for engine, state, (r, n) in zip(self.engines, self.states, ran, strict=True)
            ]
            self.cost = float(costs[gone - 1])
        tried = min(gone + 1, len(senders))
        self.run += len(senders)
        self.counted += tried
        return gone, steps[:tried]


def acdc(
    engines: Sequence[Circuits],
    tau: float,
    *,
    sign: float = 1.0,
    receivers: Sequence[int] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Run ACDC.

    Args:
        engines: prompts, all of one model; their metric, in the mean over all of them, is the cost.
        tau: what an edge must cost to stay.
        sign: -1 where the metric falls as the circuit gets worse.
        receivers: only these are tried, in the order given; the edges of the others stay.
        report: called with (done, all) edges.

    Returns:
        The edges that stay, and what each cost.

    Raises:
        ArgumentError: tau is NaN.
    """
    if tau != tau:
        raise error(ArgumentError, "tau must be a number", got=str(tau), do="say what an edge must cost to stay")
    search, n = _Search(engines, sign), engines[0].numbering
    costs = torch.full(search.kept.shape, torch.nan, dtype=torch.float64)
    order = list(reversed(range(n.receivers))) if receivers is None else list(receivers)
    total, done, size = sum(n.before(v) for v in order), 0, FIRST
    for receiver in order:
        senders = list(reversed(range(n.before(receiver))))
        if not search.needed(receiver):
            costs[senders, receiver] = 0.0
            if tau > 0:
                search.drop(senders, receiver)
            done += len(senders)
            continue
        at = 0
        while at < len(senders):
            chunk = senders[at : at + min(size, search.most(receiver))]
            gone, steps = search.try_all(chunk, receiver, tau)
            costs[chunk[: len(steps)], receiver] = steps
            at += len(steps)
            done += len(steps)
            size = min(2 * size, MOST) if gone == len(chunk) else max(FIRST // 2, gone)
            if report is not None:
                report(done, total)
    return Pruned(search.kept, costs, (search.run, search.counted), search.cost)
