"""What one pass over a text shows a measure, and what the measure keeps of it.

A measure is either a function from what it sees to values, one a token or one an example, of which the frame keeps the
mean and its interval; or a `Statistic`, which keeps accumulators of its own. Both merge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.method._declare import DIFFERENCE, Column
from microtome.model import Model
from microtome.stream import ExampleMeans, ExampleMeansResult, TokenBatch, difference_interval, mean_interval

Kept = dict[str, Any]
"""Accumulators by name; each is an `Accumulator` of `microtome.stream`."""

Values = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""By column: values [example, pos, *unit], or these with a mask [example, pos] of the tokens that count; or values
[example, *unit], or these with a mask [*unit] of the units that there are."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a measure sees at a time: one layer of one batch, or of the weights.

    Attributes:
        model: the model.
        layer: the layer, or None for a measure of the whole model.
        batch: the tokens; None where only weights are looked at.
        look: what is looked at, with its arguments.
        mask: [example, pos] the tokens that count: those of the text and, where groups are kept, of one group.
    """

    model: Model
    layer: int | None
    batch: TokenBatch | None
    look: Any
    mask: Bool[Tensor, "example pos"] | None = None
    _held: Mapping[str, Tensor] | None = None

    def __getitem__(self, site: str) -> Tensor:
        """The tensor of a site that the measure declares, [example, pos, ...]."""
        assert self._held is not None
        return self._held[site]

    def __contains__(self, site: str) -> bool:
        return self._held is not None and site in self._held

    @property
    def tokens(self) -> Int[Tensor, "example pos"]:
        """Token ids [example, pos]."""
        assert self.batch is not None
        return self.batch.tokens.to(self.model.device)

    @property
    def examples(self) -> Int[Tensor, " example"]:
        """[example] What each row is called."""
        assert self.batch is not None
        return self.batch.start

    @property
    def lead(self) -> int:
        """How many tokens of every row stand before its text."""
        return 0 if self.batch is None else self.batch.lead

    @property
    def later(self) -> Bool[Tensor, "example pos"]:
        """[example, pos] The tokens that count, without the first one of each row, where attention sinks live."""
        assert self.batch is not None
        mask = torch.ones(self.batch.tokens.shape, dtype=torch.bool) if self.mask is None else self.mask.clone()
        mask[:, 0] = False
        return mask

    def at(self, layer: int) -> Seen:
        """The same batch, in another layer."""
        return replace(self, layer=layer)


class Statistic(ABC):
    """A measure that keeps accumulators of its own; arguments of the measure are those of its `__init__`."""

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """Compute what depends on the weights alone, before the model runs: during a forward its parts are hooked."""
        return

    @abstractmethod
    def start(self, model: Model, layer: int | None) -> Kept:
        """Fresh accumulators, by name, for one layer (None: the whole model)."""

    @abstractmethod
    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in what was seen of one batch; `seen.mask` says which tokens count."""

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The columns, each with the axes of the measure's unit in one layer: the means that were kept by example."""
        return {name: held.mean for name, held in kept.items() if isinstance(held, ExampleMeans)}

    def across(self, kept: Mapping[str, Sequence[Kept]]) -> Mapping[str, Tensor]:
        """The columns of a measure that compares groups, which overrides this: from what was kept of each group.

        Such a measure keeps the groups of its text apart, whether or not they are asked for, and has no `result`.

        Args:
            kept: by group, what was kept layer by layer; of a group of which nothing was read, accumulators as they
                start.

        Returns:
            Each column with the axes of the measure's unit, layers first, or with those that the column declares, such
            as [group, layer, neuron].
        """
        raise TypeError(f"{type(self).__name__} compares no groups")


class MeanOverExamples(Statistic):
    """A measure that is a function from what is seen to values: their mean is kept, example by example."""

    def __init__(self, function: Callable[..., Values], dims: int, arguments: Mapping[str, Any]) -> None:
        """Keep the means of what a function gives; `dims` is how many axes a value has behind its example (and pos)."""
        self.function, self.dims, self.arguments = function, dims, dict(arguments)

    def start(self, model: Model, layer: int | None) -> Kept:
        """Nothing yet: the sizes are known with the first values."""
        return {}

    def values(self, seen: Seen) -> Values:
        """What the function gives for one batch."""
        return self.function(seen, **self.arguments)

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch."""
        self.take(kept, self.values(seen), seen)

    def take(self, kept: Kept, values: Values, seen: Seen) -> None:
        """Take in the values of one batch, of which `seen.mask` says what counts; those of one form go together."""
        together: dict[tuple[object, ...], list[tuple[str, Tensor, Tensor | None]]] = {}
        for name, given in values.items():
            x, own = given if isinstance(given, tuple) else (given, None)
            together.setdefault((id(own), x.shape, x.dtype, x.device), []).append((name, x, own))
        for alike in together.values():
            _, like, own = alike[0]
            by_token = like.dim() - 1 > self.dims
            lead = 2 if by_token else 1
            shape = tuple(like.shape[lead:]) or (1,)
            mask = _counting(own, seen) if by_token else _whole(seen)
            stacked = torch.stack([x.reshape(*x.shape[:lead], *shape) for _, x, _ in alike], dim=-1)
            batch = ExampleMeans((*shape, len(alike)))
            absent = None if by_token or own is None else ~own.unsqueeze(-1).expand(*shape, len(alike))
            batch.update(stacked, seen.examples, mask, absent)
            for (name, _, _), part in zip(alike, batch.along_last(), strict=True):
                kept[name] = kept[name].merge(part) if name in kept else part


def intervals(layers: Sequence[Kept], columns: Sequence[Column]) -> dict[str, Tensor]:
    """The ends `_lo` and `_hi` [layer, *unit] of columns whose means were kept by example, all layers at once."""
    found: dict[str, Tensor] = {}
    for column in columns:
        means = _means(layers, column.name) if column.interval else None
        if means is not None:
            found |= _named(column.name, mean_interval(_stacked(means), weights=means[0].count)[1:])
    return found


def differences(layers: Sequence[Kept], columns: Sequence[Column], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each column minus its control, [layer, *unit], with the ends of its interval where both were kept by example."""
    made: dict[str, Tensor] = {}
    for column in columns:
        if column.control not in found or column.name not in found:
            continue
        name = f"{column.name}_{DIFFERENCE}"
        made[name] = found[column.name].double() - found[column.control].double()
        means, control = (_means(layers, of) for of in (column.name, column.control))
        if means is None or control is None:
            continue
        nothing = torch.full_like(made[name], torch.nan)
        made |= _named(name, (nothing, nothing.clone()))
        if torch.equal(means[0].example, control[0].example):
            counts = means[0].count, control[0].count
            both = _stacked(means), _stacked(control)
            made |= _named(name, difference_interval(*both, weights=counts[0], control_weights=counts[1])[1:])
    return made


def paired_changes(
    before: Sequence[Kept], after: Sequence[Kept], columns: Sequence[Column]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The ends of the 95 % intervals of changes [layer, *unit], of columns that were kept by the same examples."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for column in columns if before else ():
        ours, theirs = (_means(layers, column.name) for layers in (before, after))
        if not column.interval or ours is None or theirs is None or not torch.equal(ours[0].example, theirs[0].example):
            continue
        counts = ours[0].count, theirs[0].count
        both = _stacked(theirs), _stacked(ours)
        low, high = difference_interval(*both, weights=counts[1], control_weights=counts[0])[1:]
        found[column.name] = low, high
    return found


def _means(layers: Sequence[Kept], name: str) -> list[ExampleMeansResult] | None:
    """The means of a column that were kept by example, layer by layer, NaN in one without it; None if none has it."""
    held = [kept.get(name) for kept in layers]
    means = [one for one in held if isinstance(one, ExampleMeans)]
    if not means or any(one is not None and not isinstance(one, ExampleMeans) for one in held):
        return None
    if all(one.examples for one in means):
        like = means[0].result()
        nothing = replace(like, total=torch.full_like(like.total, torch.nan))
        return [one.result() if isinstance(one, ExampleMeans) else nothing for one in held]
    none = torch.zeros(0, dtype=torch.float64)  # a group of which this value counted nothing
    return [ExampleMeansResult(none.long(), none, none.new_zeros((0, *means[0].shape))) for _ in held]


def _stacked(means: Sequence[ExampleMeansResult]) -> Tensor:
    """The sums [example, layer, *unit]."""
    return torch.stack([one.total for one in means], dim=1)


def _named(name: str, ends: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_lo": ends[0], f"{name}_hi": ends[1]}


def _counting(own: Tensor | None, seen: Seen) -> Tensor | None:
    """[example, pos] The tokens that a value counts: those of the text, of which its own mask may choose some.

    A value with a mask of its own also has what stands before the text in each row, where its mask counts it.
    """
    if own is None or seen.mask is None:
        return seen.mask if own is None else own
    mask = seen.mask.clone()
    mask[:, : seen.lead] = mask.any(1, keepdim=True)
    return own & mask.to(own.device)


def _whole(seen: Seen) -> Tensor | None:
    """[example] Which whole examples count.

    Raises:
        DataError: some of an example counts and some does not, because a row holds several groups.
    """
    if seen.mask is None or seen.batch is None:
        return None
    text = seen.batch.text
    text = torch.ones_like(seen.mask) if text is None else text
    some, every = (seen.mask & text).any(1), (seen.mask | ~text).all(1)
    if bool((some & ~every).any()):
        raise error(
            DataError, "a row of the text holds several groups, and this measure has one value per row",
            do="give each group as a separate text: text={name: corpus}, with length= so that rows fill",
        )  # fmt: skip
    return every
