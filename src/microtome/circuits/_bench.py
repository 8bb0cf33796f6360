"""Pairs of prompts on which circuits are run, in groups of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.circuits._optimal import first_order, optimal
from microtome.circuits._traced import signal_scores
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.explain import Pairs
from microtome.metric import Divergence, Metric, TokenSubsetMetric
from microtome.model import Model
from microtome.sweep import Circuits, written

ABLATIONS = ("resample", "mean", "zero")
OPTIMAL = "optimal"
JUDGED = (*ABLATIONS, OPTIMAL)
"""What edges that are out may give; the last is a training for each circuit."""
ROOM = 3 * 2**28
"""Bytes that the writes of the prompts of one group may take."""


@dataclass(frozen=True)
class _Numbered:
    """A metric of many prompts, read of some by their numbers among all."""

    metric: Metric
    numbers: tuple[int, ...]

    def columns(self, prompt: int, length: int) -> list[int]:
        """The columns of one of them."""
        return self.metric.columns(self.numbers[prompt], length)

    def read(self, logits: Tensor, prompts: Tensor) -> Tensor:
        """Values of rows that belong to some of them."""
        return self.metric.read(logits, torch.tensor(self.numbers, device=prompts.device)[prompts])


class _NumberedTokens(_Numbered):
    """The same of a metric that reads few tokens."""

    def token_subset(self) -> tuple[tuple[int, ...], Metric]:
        """The tokens, and the metric over them."""
        assert isinstance(self.metric, TokenSubsetMetric)
        ids, over = self.metric.token_subset()
        return ids, _Numbered(over, self.numbers)


class Bench:
    """Pairs on engines.

    Attributes:
        groups: the numbers of the pairs of each engine, and the engine.
    """

    def __init__(self, model: Model, pairs: Pairs, metric: Metric | None = None, ablation: str = "resample") -> None:
        """Run all prompts; `ablation` says what edges that are out give."""
        self.model, self.pairs, self.ablation = model, pairs, ablation
        self.fitting = Bench(model, _required(pairs), divergence(model, pairs), "mean") if ablation == OPTIMAL else None
        metric = pairs.metric if metric is None else metric
        lengths: dict[int, list[int]] = {}
        for i, length in enumerate(pairs.lengths):
            lengths.setdefault(length, []).append(i)
        a, self.groups = model.anatomy, list[tuple[list[int], Circuits]]()
        mean = _mean(model, pairs) if ablation in ("mean", OPTIMAL) else None
        for length, numbers in sorted(lengths.items()):
            step = max(1, ROOM // (12 * length * a.d_model * (1 + a.n_layers * (a.n_heads + 1))))
            for first in range(0, len(numbers), step):
                mine = numbers[first : first + step]
                clean, corrupt = (
                    torch.stack([pairs.tokens[i][side] for i in mine]).to(model.device) for side in (0, 1)
                )
                other = corrupt if ablation == "resample" else torch.zeros(1, 1, 1, 1) if mean is None else mean
                kind = _NumberedTokens if isinstance(metric, TokenSubsetMetric) else _Numbered
                self.groups.append((mine, Circuits(model, clean, other, kind(metric, tuple(mine)))))

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def edges(self) -> Bool[Tensor, "sender receiver"]:
        """All edges."""
        return self.groups[0][1].edges

    @property
    def clean(self) -> Float[Tensor, " pair"]:
        """The metric with all edges."""
        return self._together([engine.clean.values.reshape(1, -1) for _, engine in self.groups])[0]

    def measure(
        self, kept: Bool[Tensor, "circuit sender receiver"], stage: str = "running circuits"
    ) -> Float[Tensor, "circuit pair"]:
        """The metric of circuits on every pair; with optimal constants those of each pair are fitted on others."""
        if self.fitting is not None:
            return self._with_constants(kept, self.fitting, stage)
        report, done, total = current().counting(stage), 0, len(kept) * len(self.pairs)
        found: list[Tensor] = []
        for numbers, engine in self.groups:
            before = done

            def progress(now: int, _: int, before: int = before) -> None:
                report(before + now, total)

            found.append(engine.measure(kept, progress=progress))
            done += len(numbers) * len(kept)
        return self._together(found)

    def first_order(self) -> Float[Tensor, "sender receiver"]:
        """What taking each edge out does to the mean metric, to first order, whatever edges that are out give."""
        return first_order(self.groups)

    def by_signals(self) -> Float[Tensor, "sender receiver"]:
        """What taking each edge out does to the mean metric, as far as the signals of attention scores say."""
        none = self.measure(torch.zeros(1, *self.edges.shape, dtype=torch.bool))[0]
        gap = float((self.clean - none).mean().abs())
        return signal_scores(self.model, self.pairs, self.groups, gap).scores.mean(0)

    def _with_constants(self, kept: Tensor, fitting: Bench, stage: str) -> Float[Tensor, "circuit pair"]:
        """Constants are fitted on either half of the pairs, and measured on the other."""
        halves = [list(range(start, len(self), 2)) for start in (0, 1)]
        found = self.clean.repeat(len(kept), 1)
        report = current().counting(stage)
        for i, (row, mask) in enumerate(zip(found, kept, strict=True)):
            report(i, len(kept))
            if bool((mask.to(self.edges) == self.edges).all()):
                continue  # no edge gives a constant
            for own, rest in (halves, halves[::-1]):
                given = optimal(self.model, fitting.groups, mask, rest).values
                row[own] = self.given(mask, given, own)
        report(len(kept), len(kept))
        return found

    def given(
        self, kept: Bool[Tensor, "sender receiver"], constants: Float[Tensor, "sender d_model"], numbers: Sequence[int]
    ) -> Float[Tensor, " number"]:
        """The metric of a circuit on some pairs, where edges that are out give constants."""
        other, found = constants[None, :, None], dict[int, float]()
        for own, engine in self.groups:
            mine = [i for i, pair in enumerate(own) if pair in set(numbers)]
            if mine:
                rows = torch.tensor(mine, device=engine.own.device)
                values = engine.giving(other).measure(kept.expand(len(mine), -1, -1), rows)
                found |= dict(zip((own[i] for i in mine), values.tolist(), strict=True))
        return torch.tensor([found[i] for i in numbers], dtype=torch.float64)

    def _together(self, found: Sequence[Tensor]) -> Tensor:
        """[circuit, pair] in the order of the pairs."""
        order = torch.tensor([i for numbers, _ in self.groups for i in numbers])
        return torch.cat([x.double().cpu() for x in found], dim=1)[:, order.argsort()]


def divergence(model: Model, pairs: Pairs) -> Metric:
    """KL from what the model says of the clean prompts, at the last position."""
    return Divergence.of(model.run([pair[0].tolist() for pair in pairs.tokens]))


def _required(pairs: Pairs) -> Pairs:
    """The pairs, if constants can be fitted on some and measured on others.

    Raises:
        ArgumentError: there is one pair.
    """
    if len(pairs) < 2:
        raise error(ArgumentError, "optimal constants are fitted on one half of the pairs and measured on the other",
                    got="1 pair", allowed="2 or more", do="give more pairs, or another ablation")  # fmt: skip
    return pairs


def _mean(model: Model, pairs: Pairs) -> Float[Tensor, "1 sender 1 d_model"]:
    """What every sender writes in the clean prompts, in the mean over them and their positions."""
    sums, count = torch.zeros(()), 0
    for pair in pairs.tokens:
        run = model.run(pair[:1], capture=["embed", "*.attn.z", "*.mlp_out"], logits=False)
        with torch.no_grad():
            sums = sums + written(model, run)[0].sum(1, keepdim=True)
        count += pair.shape[1]
    return (sums / count).unsqueeze(0)
