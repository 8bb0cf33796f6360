"""What is to be probed for: states by layer, labels, folds by group, and the states and labels of the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.anatomy import ALL, Address, Site
from microtome.errors import ArgumentError, DataError, error
from microtome.model import Model, untrained_of
from microtome.probes._examples import Examples, read_examples, read_pairs
from microtome.probes._folds import Folds as Folds
from microtome.probes._folds import folds_of, groups_of, numbered, require_classes, shuffled
from microtome.probes._readers import Reader
from microtome.probes._states import Placed, Pool, addresses, flat, placed, states_of
from microtome.probes._surface import surface
from microtome.stream import mean_interval, share_interval

LEAST = 8
"""Groups below which a share has no interval."""
SIGNED = ("selectivity", "r", "r_turned", "r_untrained")
"""Scores from -1 to 1, which are no shares."""
OF_SCORES = (
    "95 % over groups: of shares that of Agresti and Coull with an effective number of rows (Korn and Graubard, 1998), "
    "else Student's t corrected for skewness (Hall, 1992); none below 8 groups"
)


@dataclass
class Outcome:
    """What probing gave.

    Attributes:
        values: columns, as a question returns them.
        each: columns by group, as sums over its rows.
        readers: by site and layer, the probe that was fitted on all rows that are cross-validated.
        attrs: what else to say.
    """

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    each: dict[str, Any] = field(default_factory=dict[str, Any])
    readers: dict[Site, Reader] = field(default_factory=dict[Site, Reader])
    attrs: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, eq=False)
class Problem:
    """States of examples, and what they are probed for.

    Attributes:
        model: whose states.
        examples: the rows.
        sites: the addresses that are probed.
        parts: the rows as they run; of preferences the chosen and the rejected ones, whose states are subtracted.
        rows: the numbers of the rows that are cross-validated; the others are those of a shift.
        outside: the numbers of the rows of a shift.
        folds: of the rows that are cross-validated.
        labels: [row] numbers of the classes of all rows; of a signal and of preferences, zeros.
        classes: their names.
        signals: [row, repeat] of all rows, of a signal.
        seed: of shuffles, folds and small networks.
        untrained: whether a model with untrained weights is probed too.
        beside: whether the states of both texts of a preference are kept, beside each other.
        shapes: the axes of the states of each site, as an edit needs them.
    """

    model: Model
    examples: Examples
    sites: tuple[Address, ...]
    parts: tuple[Placed, ...]
    rows: np.ndarray
    outside: np.ndarray
    folds: Folds
    labels: np.ndarray
    classes: tuple[str, ...]
    signals: Tensor | None
    seed: int
    untrained: bool
    beside: bool = False
    shapes: dict[Site, tuple[int, ...]] = field(default_factory=dict[Site, tuple[int, ...]])

    @cached_property
    def states(self) -> dict[Site, Tensor]:
        """[row, width] of all rows, float64, by site and layer."""
        found, shapes = self._of(self.model)
        self.shapes.update(shapes)
        return found

    @cached_property
    def blank(self) -> dict[Site, Tensor] | None:
        """The same of a model with untrained weights; None where it was not asked for."""
        return self._of(untrained_of(self.model))[0] if self.untrained else None

    def _of(self, model: Model) -> tuple[dict[Site, Tensor], dict[Site, tuple[int, ...]]]:
        held: dict[Site, Tensor] = {}
        for address in self.sites:
            several = [states_of(model, at, address) for at in self.parts]
            join = torch.sub if not self.beside else lambda a, b: torch.cat([a.flatten(1), b.flatten(1)], 1)
            held |= several[0] if len(several) == 1 else {s: join(x, several[1][s]) for s, x in several[0].items()}
        return flat(held), {site: tuple(x.shape[1:]) for site, x in held.items()}

    @property
    def inside(self) -> np.ndarray:
        """[row] classes of the rows that are cross-validated."""
        return self.labels[self.rows]

    @cached_property
    def control(self) -> np.ndarray:
        """[row] the labels of the control task, of the rows that are cross-validated."""
        return shuffled(self.inside, [self._type(i) for i in self.rows.tolist()], self.seed)

    @cached_property
    def control_folds(self) -> Folds:
        """Folds that are even in the labels of the control task: where they are not, it falls below chance."""
        return folds_of(self.folds.groups, self.control, len(self.folds), self.seed, named=self.folds.named)

    @cached_property
    def types_seen(self) -> float:
        """Share of the rows held out whose type was fitted on: the control task can be above chance on these alone."""
        types = [self._type(i) for i in self.rows.tolist()]
        seen = 0
        for fit, test in self.control_folds.split():
            there = {types[i] for i in fit.tolist()}
            seen += sum(types[i] in there for i in test.tolist())
        return seen / len(types)

    @property
    def told_of_control(self) -> dict[str, Any]:
        """What the result says of the control task."""
        told = f"{self.types_seen:.2f} of the rows held out have a type that was fitted on"
        if self.types_seen == 0:
            told = "no type repeats over folds: the control task is chance whatever the states hold; name types"
        return {"control_types": told}

    def _type(self, row: int) -> Any:
        """What the control task gives one label: the type that is named, else the token of a place, else the row."""
        if self.examples.types is not None:
            return self.examples.types[row]
        at = self.parts[0]
        return at.keys[row] if self.examples.places[row] is None else at.prefix(row)[-1]

    @cached_property
    def counts(self) -> Any:
        """[row, feature] what the surface of the rows that are cross-validated shows; of pairs the difference."""
        found: list[Any] = []
        for at in self.parts:
            prefixes = [at.prefix(i) for i in self.rows.tolist()]
            told = None if self.model.codec is None else [self.model.to_text(list(ids)) for ids in prefixes]
            found.append(surface(prefixes, told))
        return found[0] if len(found) == 1 else found[0] - found[1]

    def each(self, values: Mapping[Site, Tensor]) -> tuple[tuple[str, ...], Tensor]:
        """Scores [row] of each site as sums over groups, (axes, [group, ...])."""
        dims, grid = self.grid({site: self.folds.summed(x) for site, x in values.items()})
        return dims, grid

    def grid(self, values: Mapping[Site, Tensor]) -> tuple[tuple[str, ...], Tensor]:
        """Values by site and layer as (axes, [..., layer]), with an axis of sites first where there are several.

        NaN where a site has no such layer.
        """
        layers = self.layers
        some = next(iter(values.values()))
        nothing = torch.full_like(some.double(), torch.nan)
        rows = [
            torch.stack([values.get(Site(address.name, layer), nothing).double() for layer in layers], -1)
            for address in self.sites
        ]
        return (("layer",), rows[0]) if len(rows) == 1 else (("site", "layer"), torch.stack(rows, -2))

    def scored(self, each: Mapping[str, tuple[tuple[str, ...], Tensor]]) -> dict[str, Any]:
        """Columns with their intervals, of scores held out as sums over groups."""
        found: dict[str, Any] = {}
        for name, (dims, x) in each.items():
            ends = with_ends if name in SIGNED else with_shares
            found |= ends(name, x, dims, self.folds.sizes, self.folds.spread)
        for name in set(SIGNED) & set(found):
            for end in ("_lo", "_hi"):
                found[name + end] = (found[name + end][0], found[name + end][1].clamp(-1, 1))
        return found

    @property
    def layers(self) -> list[int | None]:
        """The layers that any site has, in order; None for a site of the whole model."""
        found = {site.layer for site in self.states}
        return sorted(found, key=lambda layer: -1 if layer is None else layer)

    @property
    def coords(self) -> dict[str, Any]:
        """Labels of the axes."""
        coords: dict[str, Any] = {"layer": [-1 if layer is None else layer for layer in self.layers]}
        names = [str(replace(address, layers=None)) for address in self.sites]
        return coords | ({"site": names} if len(names) > 1 else {})

    @property
    def attrs(self) -> dict[str, Any]:
        """What the result says of the examples."""
        names = ", ".join(str(address) for address in self.sites)
        attrs: dict[str, Any] = {"sites": names, "data": self.examples.name, "rows": len(self.rows)}
        attrs |= {"groups": len(self.folds.sizes), "folds": len(self.folds)}
        kind = "named" if self.folds.named else "rows that are the same up to where they are probed"
        wider = f"those of scores held out are {self.folds.spread:.2f} times as wide as of independent ones"
        attrs |= {"grouped_by": kind, "held_out": wider, "interval": OF_SCORES}
        return attrs | ({"classes": ", ".join(self.classes)} if self.classes else {})


def problem(
    model: Model,
    data: Any,
    *,
    site: str | Sequence[str],
    kind: str,
    field: str,
    label: str,
    group: str | None,
    pool: Pool,
    folds: int,
    shift: Sequence[str],
    seed: int,
    untrained: bool,
) -> Problem:
    """Read what is to be probed for, and refuse what no probe can be fitted and tested on.

    Raises:
        DataError: see `read_examples` and `microtome.probes._folds`.
        SiteError, PromptError: see `microtome.probes._states`.
        ArgumentError: a shift to groups that are not there, or to all of them.
    """
    sites = tuple(addresses(model, site))
    pairs = kind in ("preference", "ideal")
    if pairs:
        both = read_pairs(data, group=group)
        examples, groups = both[0], None
        parts = tuple(placed(model, one, sites[0], pool) for one in both)
        groups = _groups_of_pairs(parts, both[0])
    else:
        examples = read_examples(data, field=field, label=label, group=group, signal=kind == "ridge")
        parts = (placed(model, examples, sites[0], pool),)
        groups = groups_of(parts[0].keys, examples.groups, examples.where)
    rows, outside = _split(examples, shift)
    inner = np.unique(groups[rows], return_inverse=True)[1]
    numbers, classes, signals = np.zeros(len(examples), dtype=np.int64), (), None
    if kind == "ridge":
        signals = _signals(examples)
    elif not pairs:
        numbers, classes = numbered(examples.labels)
        require_classes(numbers[rows], classes, inner)
    made = folds_of(inner, numbers[rows] if classes else None, folds, seed, named=examples.groups is not None)
    if classes:
        require_classes(numbers[rows], classes, inner, made)
    return Problem(
        model, examples, sites, parts, rows, outside, made, numbers, classes, signals, seed, untrained, kind == "ideal"
    )


def _signals(examples: Examples) -> Tensor:
    sizes = sorted({len(x) for x in examples.labels})
    if len(sizes) > 1:
        do = "give every row as many repetitions"
        raise error(DataError, "rows have different numbers of repetitions", got=str(sizes), do=do)
    found = torch.tensor(examples.labels, dtype=torch.float64)
    if bool((found.mean(1) == found.mean(1)[0]).all()):
        raise error(DataError, "the signal never changes", got=f"{float(found.mean(1)[0]):g}", do="give one that does")
    return found


def _groups_of_pairs(parts: tuple[Placed, ...], examples: Examples) -> np.ndarray:
    """[row] groups of pairs: those named, or pairs that share a text, directly or through others."""
    keys = [[at.keys[i] for at in parts] for i in range(len(examples))]
    if examples.groups is not None:
        every = [key for at in parts for key in at.keys]
        return groups_of(every, examples.groups * len(parts), examples.where * len(parts))[: len(examples)]
    top = list(range(len(keys)))

    def root(i: int) -> int:
        while top[i] != i:
            top[i] = top[top[i]]
            i = top[i]
        return i

    first: dict[Any, int] = {}
    for i, pair in enumerate(keys):
        for key in pair:
            top[root(i)] = root(first.setdefault(key, i))
    return np.unique([root(i) for i in range(len(keys))], return_inverse=True)[1]


def _split(examples: Examples, shift: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to cross-validate, and of those that a shift goes to."""
    every = np.arange(len(examples))
    if not shift:
        return every, every[:0]
    names = [] if examples.groups is None else list(dict.fromkeys(examples.groups))
    unknown = [name for name in shift if name not in names]
    if unknown or len(set(shift)) == len(names):
        what = f'no group "{unknown[0]}" to shift to' if unknown else "a shift to all groups leaves none to fit on"
        raise error(
            ArgumentError, what, allowed=", ".join(names[:12]) or "groups that the data name", do="name some groups"
        )
    there = np.array([group in shift for group in examples.groups or ()])
    return every[~there], every[there]


def whole(problem: Problem, site: Site) -> str:
    """The address of a site of a problem, with its units and all positions."""
    address = next(address for address in problem.sites if address.name == site.name)
    return str(replace(address, positions=ALL).at(site.layer))


def with_ends(
    name: str, each: Tensor, dims: tuple[str, ...], weights: Tensor | None = None, spread: float = 1.0
) -> dict[str, Any]:
    """A column with its interval, of values [example, ...]: what has examples of its own."""
    mean, low, high = mean_interval(each, weights=weights)
    low, high = (mean + spread * (end - mean) for end in (low, high))
    return {f"{name}{end}": (dims, x) for end, x in (("", mean), ("_lo", low), ("_hi", high))}


def with_shares(
    name: str, each: Tensor, dims: tuple[str, ...], weights: Tensor | None = None, spread: float = 1.0
) -> dict[str, Any]:
    """A column with its interval, of shares: sums of hits [group, ...] over as many rows as the weights say.

    Formula:  that of `share_interval` with n = p (1 - p) / (spread^2 var p) (z / t)^2 rows, var p over groups, t the
              quantile of as many groups; n / spread^2 before (z / t)^2 is at least the number of groups as they weigh,
              which it is where all rows are alike, and at most that of rows.
    Source:   Korn and Graubard, "Confidence Intervals for Proportions with Small Expected Number of Positive Counts
              Estimated from Survey Data", 1998. Departs: Agresti and Coull's interval; the bounds.
    """
    from scipy.special import ndtri, stdtrit

    counts = torch.ones(len(each), dtype=torch.float64) if weights is None else weights.double()
    rows, groups, shape = float(counts.sum()), len(each), each.shape[1:]
    sums = each.double().reshape(groups, -1)
    mean = sums.sum(0) / rows
    ends = torch.full((2, sums.shape[1]), torch.nan, dtype=torch.float64)
    if groups >= LEAST:
        variance = (sums - counts.unsqueeze(1) * mean).square().sum(0) * groups / (groups - 1) / rows**2
        least, most = (x / spread**2 for x in (rows**2 / float(counts.square().sum()), rows))
        narrower = float((ndtri(0.975) / stdtrit(groups - 1, 0.975)) ** 2)
        for i, (p, v) in enumerate(zip(mean.tolist(), variance.tolist(), strict=True)):
            n = narrower * (min(max(p * (1 - p) / (v * spread**2), least), most) if v > 1e-15 else least)
            ends[:, i] = torch.tensor(share_interval(p * n, n) if p == p else (p, p), dtype=torch.float64)
    parts = {"": mean, "_lo": ends[0], "_hi": ends[1]}
    return {f"{name}{end}": (dims, x.reshape(shape)) for end, x in parts.items()}
