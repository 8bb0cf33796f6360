"""One pass over a text for any number of measures: every site is read once, however many need it.

Law:   the measures of one pass give what each gives alone; parts of a look that are merged give what the whole gives.
Check: tests/laws/test_measures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from microtome.anatomy import SITES, Site
from microtome.errors import DataError, error
from microtome.method._control import with_differences
from microtome.method._declare import DIMS
from microtome.method._measure import Measure
from microtome.method._result import column_of
from microtome.method._statistic import Kept, MeanOverExamples, Seen, Statistic, differences, intervals
from microtome.model import Model
from microtome.stream import TokenBatch


@dataclass(eq=False)
class Bound:
    """A measure with its arguments, on one model, and what it has kept: by group (None without) and layer."""

    measure: Measure
    statistic: Statistic
    layers: list[int | None]
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    kept: dict[tuple[int | None, int | None], Kept] = field(default_factory=dict[tuple[int | None, int | None], Kept])
    apart: bool = False
    """Whether it keeps the groups of the text apart and gives what they give together: `Pass.by_group` has each."""

    def together(self) -> Bound:
        """The same, having kept all groups as one."""
        found: dict[tuple[int | None, int | None], Kept] = {}
        for (_, layer), kept in sorted(self.kept.items(), key=lambda item: item[0][0] or 0):
            own = found.setdefault((None, layer), {})
            for name, accumulator in kept.items():
                own[name] = own[name].merge(accumulator) if name in own else accumulator.copy()
        return replace(self, kept=found)

    def sites(self, model: Model, layer: int | None) -> set[str]:
        """The sites that it sees in a layer: those that it needs, and of those that it may see too what is there."""
        points = model.anatomy.hook_points
        return {*self.measure.method.sites, *(n for n in self.measure.optional if Site(n, layer) in points)}


class Pass:
    """Measures that read the same batches.

    Args:
        model: an open model.
        bound: the measures.
        look: what they look at.
        groups: the names of the groups to keep separate, by number; none keeps all tokens together.
        compared: the same for measures that compare groups, which keep them separate in any case.
    """

    def __init__(
        self, model: Model, bound: Sequence[Bound], look: Any, groups: Sequence[str] | None = None,
        compared: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.bound, self.look = model, list(bound), look
        self.groups = None if groups is None else tuple(groups)
        self.compared = self.groups or tuple(compared)
        with torch.no_grad():
            for one in self.bound:
                one.statistic.prepare(model, one.layers)
        self._held: dict[int | None, dict[str, Tensor]] = {}
        self._waiting: dict[int | None, list[tuple[Bound, set[str]]]] = {}

    def update(self, batch: TokenBatch) -> None:
        """Run one batch, and let every measure see its part."""
        self._held, self._waiting = {}, {}
        seeing = [b for b in self.bound if not b.measure.whole]
        for one in seeing:
            for layer in one.layers:
                self._waiting.setdefault(layer, []).append((one, one.sites(self.model, layer)))
        with torch.no_grad():
            if seeing:
                observe = self._observers(batch)
                self.model.run(batch.tokens, observe=observe, logits="logits" in observe)
            for one in self.bound:
                if one.measure.whole:
                    self._show(one, None, batch)
        self._held, self._waiting = {}, {}

    def _observers(self, batch: TokenBatch) -> dict[str, Callable[[Site, Tensor], None]]:
        """What to call at each address that some measure waits for."""
        layers: dict[str, list[int]] = {}
        found: dict[str, Callable[[Site, Tensor], None]] = {}

        def see(site: Site, x: Tensor) -> None:
            self._see(site, x, batch)

        for layer, waiting in self._waiting.items():
            for name in {name for _, sites in waiting for name in sites}:
                if SITES[name].scope == "model":
                    found[name] = see
                elif layer is not None:
                    layers.setdefault(name, []).append(layer)
        for name, numbers in layers.items():
            found[f"{','.join(map(str, sorted(numbers)))}.{name}"] = see
        return found

    def _see(self, site: Site, x: Tensor, batch: TokenBatch) -> None:
        waiting = self._waiting.get(site.layer, [])
        held = self._held.setdefault(site.layer, {})
        held[site.name] = x
        ready = [one for one, sites in waiting if sites <= held.keys()]
        self._waiting[site.layer] = [(one, sites) for one, sites in waiting if not sites <= held.keys()]
        for one in ready:
            self._show(one, site.layer, batch)
        # What nobody waits for any more is let go, so that no more than one layer is ever held.
        needed = {name for _, sites in self._waiting[site.layer] for name in sites}
        self._held[site.layer] = {name: x for name, x in held.items() if name in needed}

    def _show(self, one: Bound, layer: int | None, batch: TokenBatch) -> None:
        text = batch.text
        seen = Seen(self.model, layer, batch, self.look, text, self._held.get(layer))
        statistic = one.statistic
        values = statistic.values(seen) if isinstance(statistic, MeanOverExamples) else None
        for group, mask in self._masks(one, batch, text):
            if (group, layer) not in one.kept:
                one.kept[group, layer] = statistic.start(self.model, layer)
            kept = one.kept[group, layer]
            part = Seen(self.model, layer, batch, self.look, mask, self._held.get(layer))
            if values is None:
                statistic.update(kept, part)
            else:
                assert isinstance(statistic, MeanOverExamples)
                statistic.take(kept, values, part)

    def _masks(self, one: Bound, batch: TokenBatch, text: Tensor | None) -> list[tuple[int | None, Tensor | None]]:
        """The groups of a batch that a measure keeps, with the tokens of each that count."""
        if self.groups is None and not one.measure.compares and not one.apart:
            return [(None, text)]
        masks: list[tuple[int | None, Tensor | None]] = []
        for number in batch.group.unique().tolist():
            mask = batch.group == number
            masks.append((number, mask if text is None else mask & text))
        return masks

    def merge(self, other: Pass) -> Pass:
        """Take in what another pass of the same measures has kept, and return this one.

        Raises:
            DataError: it is of other measures.
        """
        names = [[b.measure.method.name for b in p.bound] for p in (self, other)]
        if names[0] != names[1] or (self.groups, self.compared) != (other.groups, other.compared):
            raise error(DataError, "cannot merge passes of other measures", got=names[1], allowed=str(names[0]))
        for mine, theirs in zip(self.bound, other.bound, strict=True):
            for key, kept in theirs.kept.items():
                own = mine.kept.setdefault(key, {})
                for name, accumulator in kept.items():
                    own[name] = own[name].merge(accumulator) if name in own else accumulator.copy()
        return self

    def results(self) -> dict[str, xr.Dataset]:
        """The columns of every measure, by its name.

        Raises:
            DataError: nothing was counted.
        """
        return {one.measure.method.name: self._result(one, self.groups) for one in self.bound}

    def by_group(self) -> dict[str, xr.Dataset]:
        """The columns of the measures that were kept apart, with an axis `group`; a group without tokens has NaN."""
        return {one.measure.method.name: self._result(one, self.compared) for one in self.bound if one.apart}

    def _result(self, one: Bound, names: Sequence[str] | None) -> xr.Dataset:
        if one.measure.compares:
            return self._compared(one)
        one = one.together() if one.apart and names is None else one
        groups: list[int | None] = [None] if names is None else list(range(len(names)))
        tables = [self._of_group(one, group) for group in groups]
        known = next((table for table in tables if table), None)
        if known is None:
            raise error(DataError, f'the measure "{one.measure.method.name}" has counted nothing', do="give it text")
        return _dataset(self.model, one, tables, known, names)

    def _compared(self, one: Bound) -> xr.Dataset:
        """The columns of a measure that compares groups, and each minus its control."""
        method, groups = one.measure.method, self.compared

        def kept(group: int, layer: int | None) -> Kept:
            return one.kept.get((group, layer)) or one.statistic.start(self.model, layer)

        held = {name: [kept(group, layer) for layer in one.layers] for group, name in enumerate(groups)}
        assert method.of is not None
        variables: dict[str, Any] = {}
        for name, x in one.statistic.across(held).items():
            column, _ = column_of(method, name)
            dims = DIMS[method.of] if column is None or column.dims is None else column.dims
            variables[name] = ((*dims, *(() if column is None else column.extra)), x.cpu().numpy())
        data = xr.Dataset(variables, coords=coordinates(self.model, DIMS[method.of], one.layers, groups))
        return with_differences(method, data, None)

    def _of_group(self, one: Bound, group: int | None) -> dict[str, Tensor]:
        """The columns of one group, layers stacked, NaN where a layer lacks one; empty where nothing was counted."""
        held = [kept for layer in one.layers if (kept := one.kept.get((group, layer))) is not None]
        if len(held) < len(one.layers):
            return {}
        rows = [one.statistic.result(kept) for kept in held]
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            like = next(row[name] for row in rows if name in row)
            nothing = torch.full_like(like, torch.nan if like.is_floating_point() else -1)
            found[name] = torch.stack([row.get(name, nothing) for row in rows])
        columns = one.measure.method.columns
        found |= intervals(held, columns) | differences(held, columns, found)
        return found if one.layers != [None] else {name: x[0] for name, x in found.items()}


def _dataset(
    model: Model, one: Bound, tables: list[dict[str, Tensor]], known: dict[str, Tensor], groups: Sequence[str] | None
) -> xr.Dataset:
    method = one.measure.method
    assert method.of is not None
    unit = DIMS[method.of]
    variables: dict[str, Any] = {}
    for name, like in known.items():
        nothing = torch.nan if like.is_floating_point() else -1  # of a group without tokens
        parts = [table[name] if name in table else torch.full_like(like, nothing) for table in tables]
        x = parts[0] if groups is None else torch.stack(parts)
        column, _ = column_of(method, name)
        dims = (*(() if groups is None else ("group",)), *unit, *(() if column is None else column.extra))
        x = x.squeeze(-1) if x.dim() == len(dims) + 1 else x  # a value without axes is kept as one of one unit
        variables[name] = (dims, x.cpu().numpy())
    return xr.Dataset(variables, coords=coordinates(model, unit, one.layers, groups))


def coordinates(
    model: Model, unit: Sequence[str], layers: Sequence[int | None], groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """The labels of the axes of a measure's unit."""
    a = model.anatomy
    every = list(range(a.n_layers)) if list(layers) == [None] else list(layers)
    sizes: dict[str, Any] = {"layer": every, "head": list(range(a.n_heads)), "neuron": list(range(a.d_mlp))}
    if "expert" in unit:
        sizes |= {dim: list(range(a.size(Site("mlp.experts.post", every[0]), dim))) for dim in ("expert", "neuron")}
    found = {dim: sizes[dim] for dim in unit}
    return found if groups is None else found | {"group": list(groups)}
