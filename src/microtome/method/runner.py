"""Run any set of measures on a model in as few passes as their inputs allow."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, SiteError, error, nearest
from microtome.method._arguments import checked, require_model
from microtome.method._control import with_differences
from microtome.method._declare import DIMS, Method
from microtome.method._feed import feed
from microtome.method._look import Look, Text, Weights
from microtome.method._measure import Measure
from microtome.method._parts import Parts
from microtome.method._pass import Bound, Pass, coordinates
from microtome.method._registry import Methods, declared, methods
from microtome.method._result import Cost, Result, counting, labelled, provenance, said_of_intervals
from microtome.method._statistic import Seen
from microtome.method._texts import Batches
from microtome.model import Model


def measure(model: Model, *names: str, text: Any = None, groups: Any = None, **options: Any) -> Result:
    """Run measures on a model: those that read the same text share one pass over it.

    Cost:  one forward over every text that is read, and the cost each measure declares; see docs/methods.md.
    Check: each measure gives the same result as when run alone; tests/laws/test_measures.py.

    Args:
        model: an open model.
        names: of the measures; `mt.methods("measure")` lists them.
        text: for those that read a text: a corpus, the path of a file, texts, a `Task` (its clean prompts), tokens
            [row, pos], or a mapping from groups to any of these; the documentation topics of the standard library by
            default. A measure that compares groups needs a text of several.
        groups: report groups of the text separately, all of them or those that are named: the results then have an
            axis `group`.
        options: arguments of the measures and of what they read, such as ``tokens=5_000`` or ``period=20``.

    Returns:
        A `Result`, an `xarray.Dataset` with one variable per column, its interval ends as `_lo` and `_hi`, a column
        minus its control as `_diff` with the same, units, meanings and controls in the variables' attributes, and the
        provenance in its own.

    Raises:
        ArgumentError: there is no such measure, argument or group, or one is outside its limits.
        SiteError: the model lacks a site that a measure reads.
        DataError: there is too little text.

    >>> mt.measure(model, "induction", "firing", tokens=5_000)
    """
    require_model(model)
    measured = run_measures(model, names, text=text, groups=groups, options=options)
    parts = _alike(list(measured.datasets.values()))
    result = Result.of(xr.merge(parts, join="outer", compat="no_conflicts", combine_attrs="drop"))
    for data in parts:
        for name, array in data.data_vars.items():
            result[name].attrs.update(array.attrs)
    return result.assign_attrs(measured.attrs)


def _alike(parts: list[xr.Dataset]) -> list[xr.Dataset]:
    """Datasets that merge: an axis without labels that has several sizes is numbered, and then filled up with NaN."""
    sizes = [(str(dim), size) for data in parts for dim, size in data.sizes.items() if dim not in data.coords]
    several = {dim for dim, size in sizes if any(other != (dim, size) for other in sizes if other[0] == dim)}
    return [data.assign_coords({d: range(data.sizes[d]) for d in several & set(data.dims)}) for data in parts]


def measures() -> Methods:
    """All measures by name."""
    return methods("measure")


@dataclass(frozen=True)
class Measured:
    """What measures gave, before it is merged.

    Attributes:
        datasets: by method.
        attrs: provenance of all of them.
        looks: by name, what each looked at.
        seconds: by what was looked at, how long that took.
        left_out: by name, why a measure could not run on this model.
        by_group: by method, the values of each group of the text, of the measures for which that was asked.
    """

    datasets: Mapping[Method, xr.Dataset]
    attrs: Mapping[str, Any]
    looks: Mapping[str, str]
    seconds: Mapping[str, float]
    left_out: Mapping[str, str]
    by_group: Mapping[Method, xr.Dataset] = field(default_factory=dict[Method, xr.Dataset])


def run_measures(
    model: Model,
    names: Sequence[str],
    *,
    text: Any = None,
    groups: Any = None,
    options: Mapping[str, Any] | None = None,
    lenient: bool = False,
    by_group: Collection[str] = (),
) -> Measured:
    """Run measures, each dataset by itself; `lenient` leaves out those that the model lacks the sites for.

    What `by_group` names gives each group of the text besides: in the same pass, whose groups it keeps and then merges.
    Where it reads only the first rows, of which each group has a share, a second pass reads so many of each group, as
    where groups are reported separately.
    """
    options, kept = {} if options is None else options, groups_of(groups)
    chosen = chosen_measures(names, options)
    found: dict[str, xr.Dataset] = {}
    grouped: dict[str, xr.Dataset] = {}
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}
    sources: list[str] = []
    unfinished: list[Parts] = []
    with counting() as cost:
        bound = bound_by_look(model, chosen, text, options, left_out if lenient else None)
        if kept is not None and not any(isinstance(look, Text) for look in bound):
            what = "groups belong to a text, and none of these measures reads one"
            raise error(ArgumentError, what, got=", ".join(names), do="leave groups= out")
        for look, some in bound.items():
            started = time.perf_counter()
            if isinstance(look, Weights):
                found |= of_weights(model, some, left_out if lenient else None)
            else:
                for one in some:
                    one.apart = isinstance(look, Text) and kept is None and one.measure.method.name in by_group
                datasets, of_groups, source = _of_batches(model, look, some, kept, unfinished)
                found |= datasets
                grouped |= of_groups | _of_each_group(model, look, some, of_groups, unfinished)
                sources.append(source)
            stage = _stage(look)
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - started, 2)
        ran = [one for one in chosen if one.method.name in found]
        datasets = {one.method: labelled(one.method, found[one.method.name]) for one in ran}
        arguments = {k: v for some in bound.values() for one in some for k, v in one.arguments.items()}
        read = {"text": "; ".join(dict.fromkeys(filter(None, sources)))} if any(sources) else {}
        said = said_of_intervals(name for data in datasets.values() for name in data.data_vars)
        attrs = _attrs(model, ran, arguments | read, cost) | said
    for parts in unfinished:
        parts.clear()
    looks = {one.measure.method.name: _described(look) for look, some in bound.items() for one in some}
    apart = {one.method: labelled(one.method, grouped[one.method.name]) for one in ran if one.method.name in grouped}
    return Measured(datasets, attrs, looks, seconds, left_out, apart)


def chosen_measures(names: Sequence[str], options: Mapping[str, Any]) -> list[Measure]:
    """Measures by name.

    Raises:
        ArgumentError: a name is none of theirs, or none of them has such an option.
    """
    given: Sequence[Any] = names
    if not all(isinstance(name, str) for name in given):
        raise error(ArgumentError, "measures are named one by one", got=repr(given[0]), do='write "firing", "loss"')
    chosen = [_measure(name) for name in dict.fromkeys(names)]
    if not chosen:
        raise error(ArgumentError, "no measure is named", do='name one or more, such as "induction"')
    _check_options(chosen, options)
    return chosen


def _described(look: Look) -> str:
    """What is read, in words."""
    if isinstance(look, Weights):
        return "weights"
    if isinstance(look, Text):
        cut = (
            "" if look.sequences is None else f", its first {look.sequences} rows, at most {look.width} tokens of each"
        )
        return f"text{cut}"
    return f"{look.sequences} sequences of {look.period} random tokens that repeat once"


def _measure(name: str) -> Measure:
    """A measure by name.

    Raises:
        ArgumentError: there is none, or it is a method of another kind.
    """
    made = declared(name)
    if not isinstance(made, Measure):
        what = f'"{name}" is a {made.method.kind}, not a measure'
        raise error(ArgumentError, what, do=f"call {made.method.call or f'mt.explain.{name}'}")
    return made


def _check_options(measures: Sequence[Measure], options: Mapping[str, Any]) -> None:
    known = sorted({p.name for m in measures for p in (*m.parameters, *m.look_parameters) if p.argument is not None})
    for name in options:
        if name not in known:
            near = nearest(name, known)
            what = f"none of these measures has an argument {name}"
            raise error(ArgumentError, what, allowed=", ".join(known), do=near.strip() or "name one of these")


def bound_by_look(
    model: Model, measures: Sequence[Measure], text: Any, options: Mapping[str, Any], left_out: dict[str, str] | None
) -> dict[Look, list[Bound]]:
    """The measures with their arguments, by what they read."""
    found: dict[Look, list[Bound]] = {}
    for one in measures:
        own = {p.name for p in one.parameters}
        arguments = checked(one.parameters, {k: v for k, v in options.items() if k in own})
        statistic, look = one.statistic(arguments), one.on
        if fields(look):
            chosen = [p for p in one.look_parameters if p.argument is not None]
            given = checked(chosen, {k: v for k, v in options.items() if k in {p.name for p in chosen}})
            look = replace(look, **given | ({"text": text} if isinstance(look, Text) else {})).fitted(model)
            arguments |= {p.name: getattr(look, p.name) for p in chosen}
        try:
            layers = one.layers(model)
        except SiteError as problem:
            if left_out is None:
                raise
            left_out[one.method.name] = str(problem)
            continue
        found.setdefault(look, []).append(Bound(one, statistic, layers, arguments))
    return found


def _of_batches(
    model: Model,
    look: Look,
    bound: list[Bound],
    groups: tuple[str, ...] | None,
    unfinished: list[Parts],
    *,
    each: bool = False,
) -> tuple[dict[str, xr.Dataset], dict[str, xr.Dataset], str]:
    """The columns of measures that read batches, those of groups kept apart, and what the batches were read from.

    `unfinished` gains what is on disk; `each` reads so many rows of each group, where only the first are read.
    """
    assert not isinstance(look, Weights)
    kept = groups is not None and isinstance(look, Text)
    comparing = [one.measure.method.name for one in bound if one.measure.compares]
    apart = isinstance(look, Text) and (kept or each or bool(comparing))
    batches = look.batches(model, apart=True) if apart and isinstance(look, Text) else look.batches(model)
    if comparing and len(batches.groups) < 2:
        what = f'the measure "{comparing[0]}" compares groups, and this text has one'
        do = "give several texts, each a group, or a corpus of several groups"
        raise error(ArgumentError, what, got=", ".join(batches.groups), allowed="two groups or more", do=do)
    if kept and groups:
        _check_groups(groups, batches)
    made = Pass(model, bound, look, batches.groups if kept else None, batches.groups)
    parts = feed(made, batches.parts, current().counting(_stage(look)))
    unfinished += [] if parts is None else [parts]
    found = made.results()
    if kept and groups:
        found = {name: data.sel(group=list(groups)) for name, data in found.items()}
    return found, made.by_group(), batches.source


def _of_each_group(
    model: Model, look: Look, some: list[Bound], shares: Mapping[str, xr.Dataset], unfinished: list[Parts]
) -> dict[str, xr.Dataset]:
    """The columns of groups kept apart, from as many rows of each group as a whole text has; none if they are so.

    Of the first rows of a text each group has a share, which may be one row: that is enough for the whole, and says too
    little of the group.

    Args:
        model: an open model.
        look: what was read.
        some: the measures that read it.
        shares: the columns of groups from these shares.
        unfinished: gains what is on disk.
    """
    several = any(data.sizes["group"] > 1 for data in shares.values())
    whole = not isinstance(look, Text) or look.sequences is None or any(one.measure.compares for one in some)
    if whole or not several:
        return {}
    again: list[Bound] = []
    for one in (one for one in some if one.apart):
        own = {p.name: one.arguments[p.name] for p in one.measure.parameters if p.name in one.arguments}
        again.append(replace(one, statistic=one.measure.statistic(own), kept={}))
    return _of_batches(model, look, again, None, unfinished, each=True)[1]


def groups_of(groups: Any) -> tuple[str, ...] | None:
    """The groups to keep: None for none, an empty tuple for all of them.

    Raises:
        ArgumentError: it is neither a truth value nor names.
    """
    if groups is None or isinstance(groups, bool):
        return () if groups else None
    names: tuple[Any, ...] = (groups,) if isinstance(groups, str) else ()
    if isinstance(groups, Sequence) and not isinstance(groups, str):
        names = tuple(groups)
    if not names or not all(isinstance(name, str) for name in names):
        raise error(ArgumentError, "groups must be True, or names of groups", got=repr(groups), do="name one or more")
    return names


def _stage(look: Look) -> str:
    if isinstance(look, Weights):
        return "reading weights"
    if isinstance(look, Text):
        return "reading the text" if look.sequences is None else "reading the first sequences"
    return "reading repeated tokens"


def _check_groups(groups: Sequence[str], batches: Batches) -> None:
    for name in groups:
        if name not in batches.groups:
            raise error(
                ArgumentError, f'no group "{name}" in this text', allowed=", ".join(batches.groups), do="name one"
            )


def of_weights(model: Model, bound: Sequence[Bound], left_out: dict[str, str] | None) -> dict[str, xr.Dataset]:
    """The columns of measures of weights; those that this model cannot give are left out where that is allowed."""
    found: dict[str, xr.Dataset] = {}
    for one in bound:
        try:
            found[one.measure.method.name] = _layer_by_layer(model, one)
        except SiteError as problem:
            if left_out is None:
                raise
            left_out[one.measure.method.name] = str(problem)
    return found


def _layer_by_layer(model: Model, one: Bound) -> xr.Dataset:
    """The columns of one measure of weights."""
    method, rows = one.measure.method, dict[str, list[Tensor]]()
    assert method.of is not None
    function: Any = method.function
    own = {p.name: one.arguments[p.name] for p in one.measure.parameters}
    with torch.no_grad():
        for done, layer in enumerate(one.layers, 1):
            for name, x in function(Seen(model, layer, None, one.measure.on), **own).items():
                rows.setdefault(name, []).append(x.cpu())
            current().report("reading weights", done, len(one.layers))
    unit = DIMS[method.of]
    variables: dict[str, Any] = {}
    for name, values in rows.items():
        column = method.column(name)
        dims = (*unit, *(() if column is None else column.extra))
        variables[name] = (dims, (torch.stack(values) if unit else values[0]).numpy())
    return with_differences(method, xr.Dataset(variables, coords=coordinates(model, unit, one.layers)), None)


def _attrs(model: Model, measures: Sequence[Measure], arguments: Mapping[str, Any], cost: Cost) -> dict[str, Any]:
    """The attributes of a result: of one measure its own, of several what they share."""
    if len(measures) == 1:
        return provenance(model, measures[0].method, arguments, cost)
    plain = {k: v for k, v in arguments.items() if isinstance(v, str | int | float)}
    sources = dict.fromkeys(str(source) for one in measures for source in one.method.source)
    shared = {"method": ", ".join(m.method.name for m in measures), "source": "; ".join(sources)}
    shared["question"] = " ".join(m.method.question for m in measures)
    return dict(model.provenance) | plain | shared | {"seed": current().seed} | cost.attrs
