"""Run any set of measures on a model in as few passes as their inputs allow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, SiteError, error, nearest
from microtome.method._arguments import checked
from microtome.method._declare import DIMS, Method
from microtome.method._look import Batches, Look, Text, Weights
from microtome.method._measure import Measure
from microtome.method._pass import Bound, Pass, coordinates
from microtome.method._registry import Methods, declared, methods
from microtome.method._result import Cost, Result, counting, labelled, provenance
from microtome.method._statistic import Seen
from microtome.model import Model


def measure(
    model: Model, *names: str, text: Any = None, groups: bool | Sequence[str] = False, **options: Any
) -> Result:
    """Run measures on a model: those that look at the same text share one pass over it.

    Cost:  one forward of every text that is looked at, and what each measure says of itself; see docs/methods.md.
    Check: each measure gives what it gives alone; tests/laws/test_measures.py.

    Args:
        model: an open model.
        names: of the measures; `mt.methods("measure")` lists them.
        text: for those that look at a text: a corpus, the path of a file, texts, a `Task` (its clean prompts), tokens
            [row, pos], or a mapping from groups to any of these; the documentation topics of the standard library by
            default.
        groups: keep each group of the text apart, all of them or those that are named: the results then have an axis
            `group`.
        options: arguments of the measures and of what they look at, such as ``tokens=5_000`` or ``period=20``.

    Returns:
        A `Result`, an `xarray.Dataset` with a variable a column, the ends of its interval as `_lo` and `_hi`, units,
        meanings and controls in the variables' attributes, and the provenance in its own.

    Raises:
        ArgumentError: there is no such measure, argument or group, or one is outside its limits.
        SiteError: the model lacks what a measure looks at.
        DataError: there is too little text.

    >>> mt.measure(model, "induction", "firing", tokens=5_000)
    """
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
    """

    datasets: Mapping[Method, xr.Dataset]
    attrs: Mapping[str, Any]
    looks: Mapping[str, str]
    seconds: Mapping[str, float]
    left_out: Mapping[str, str]


def run_measures(
    model: Model,
    names: Sequence[str],
    *,
    text: Any = None,
    groups: bool | Sequence[str] = False,
    options: Mapping[str, Any] | None = None,
    lenient: bool = False,
) -> Measured:
    """Run measures, each dataset by itself; `lenient` leaves out those that the model lacks the sites for."""
    options = {} if options is None else options
    chosen = [_measure(name) for name in dict.fromkeys(names)]
    if not chosen:
        raise error(ArgumentError, "no measure is named", do='name one or more, such as "induction"')
    _check_options(chosen, options)
    found: dict[str, xr.Dataset] = {}
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with counting() as cost:
        bound = _bound(model, chosen, text, options, left_out if lenient else None)
        for look, some in bound.items():
            started = time.perf_counter()
            if isinstance(look, Weights):
                found |= {one.measure.method.name: _of_weights(model, one) for one in some}
            else:
                found |= _of_batches(model, look, some, groups)
            stage = _stage(look)
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - started, 2)
        ran = [one for one in chosen if one.method.name in found]
        datasets = {one.method: labelled(one.method, found[one.method.name]) for one in ran}
        attrs = _attrs(model, ran, options, cost)
    looks = {one.measure.method.name: _described(look) for look, some in bound.items() for one in some}
    return Measured(datasets, attrs, looks, seconds, left_out)


def _described(look: Look) -> str:
    """What is looked at, in words."""
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


def _bound(
    model: Model, measures: Sequence[Measure], text: Any, options: Mapping[str, Any], left_out: dict[str, str] | None
) -> dict[Look, list[Bound]]:
    """The measures with their arguments, by what they look at."""
    found: dict[Look, list[Bound]] = {}
    for one in measures:
        own = {p.name for p in one.parameters}
        statistic = one.statistic({k: v for k, v in options.items() if k in own})
        look = one.on
        if fields(look):
            names = {p.name for p in one.look_parameters}
            given = checked(one.look_parameters, {k: v for k, v in options.items() if k in names})
            look = replace(look, **given | ({"text": text} if isinstance(look, Text) else {})).fitted(model)
        try:
            layers = one.layers(model)
        except SiteError as problem:
            if left_out is None:
                raise
            left_out[one.method.name] = str(problem)
            continue
        found.setdefault(look, []).append(Bound(one, statistic, layers))
    return found


def _of_batches(model: Model, look: Look, bound: list[Bound], groups: bool | Sequence[str]) -> dict[str, xr.Dataset]:
    assert not isinstance(look, Weights)
    batches = look.batches(model)
    apart = groups is not False and isinstance(look, Text)
    made = Pass(model, bound, look, batches.groups if apart else None)
    stage, count = _stage(look), len(batches.parts)
    current().report(stage, 0, count)
    for number in range(count):
        made.update(batches.parts[number])
        current().report(stage, number + 1, count)
    found = made.results()
    if not apart or isinstance(groups, bool):
        return found
    _check_groups(groups, batches)
    return {name: data.sel(group=list(groups)) for name, data in found.items()}


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


def _of_weights(model: Model, one: Bound) -> xr.Dataset:
    """The columns of a measure of weights, layer by layer."""
    method, rows = one.measure.method, dict[str, list[Tensor]]()
    assert method.of is not None
    function: Any = method.function
    arguments = getattr(one.statistic, "arguments", {})
    with torch.no_grad():
        for done, layer in enumerate(one.layers, 1):
            for name, x in function(Seen(model, layer, None, one.measure.on), **arguments).items():
                rows.setdefault(name, []).append(x.cpu())
            current().report("reading weights", done, len(one.layers))
    unit = DIMS[method.of]
    variables: dict[str, Any] = {}
    for name, values in rows.items():
        column = method.column(name)
        dims = (*unit, *(() if column is None else column.extra))
        variables[name] = (dims, (torch.stack(values) if unit else values[0]).numpy())
    return xr.Dataset(variables, coords=coordinates(model, unit, one.layers))


def _attrs(model: Model, measures: Sequence[Measure], options: Mapping[str, Any], cost: Cost) -> dict[str, Any]:
    if len(measures) == 1:
        return provenance(model, measures[0].method, options, cost)
    attributes: dict[str, Any] = {"method": ", ".join(m.method.name for m in measures), "seed": current().seed}
    plain = {k: v for k, v in options.items() if isinstance(v, str | int | float)}
    return dict(model.provenance) | plain | attributes | cost.attrs
