"""Which form a variable takes: by the axes it has, never by the method that made it.

    (layer, pos), (layer, head), (layer, span)   heat map, layers from left to right       _heat_map.py
    (group, group), (node, node)                 heat map, rows to columns                 _heat_map.py
    (layer), (pos), (head)                       line with its interval and control        _series.py
    (layer, neuron)                              strongest neurons, distribution by layer  _neurons.py
    text over (layer, pos), (layer, head)        tokens in cells, coloured by `shade`      _token_map.py
    (site), (component), (group)                 one row per name, one column per variable _tables.py
    (group, ...) with two axes after group       their form, once a group, of the first six
    ()                                           facts                                     _tables.py
    `graph` over (sender, receiver)              nodes by layer and head, with their edges _graph.py
    `parts` that sum to `sum_of`                 bars, largest first, with their sum       _parts.py

What has other axes is drawn nowhere and listed by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from microtome.shown import shown
from microtome.view._dataset import axis_kind, in_header, is_numeric, labels, own_variables, without_batch
from microtome.view._graph import edge_graph
from microtome.view._heat_map import HeatMap, by_layer, heat_map, limits_of
from microtome.view._neurons import NeuronMap, neuron_map
from microtome.view._parts import parts_list
from microtome.view._series import Series, series
from microtome.view._tables import fact_list, label_table
from microtome.view._token_map import TokenMap, token_map

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

ORDERED = ("layer", "pos", "head", "kv_head", "span", "neuron", "share")
"""Axes along which a line can be drawn; the places on the others are names."""

MOST_GROUPS = 6
"""Groups of which a variable is drawn, one form per group; how many more there are is shown."""


@runtime_checkable
class Form(Protocol):
    """One variable, or several that are shown together, in the three places where it can be seen."""

    @property
    def kind(self) -> str:
        """Which form it is: "map", "series", "neurons", "tokens", "table", "facts", "graph" or "parts"."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The variables that it shows."""
        ...

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """What a terminal shows, top to bottom."""
        ...

    def figure(self, canvas: Canvas) -> str:
        """Static markup for a notebook: no script, colours that read on light and dark."""
        ...

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """What the script of a page draws, as plain values."""
        ...


@shown
@dataclass(frozen=True)
class Forms:
    """The forms of a dataset in the order of its variables, and what has none: variables by axes, or further groups."""

    shown: tuple[Form, ...]
    not_drawn: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def signed(self) -> set[str]:
        """The scales with values below zero."""
        return {one.scale for one in self.of(HeatMap) if (one.values < 0).any()}

    def of(self, kind: type) -> list[Any]:
        """The forms of one kind."""
        return [form for form in self.shown if isinstance(form, kind)]


def forms(data: xr.Dataset) -> Forms:
    """The form of each variable.

    A batch of one is dropped; the ends of an interval, controls and shades are shown with the variable they belong to.
    Heat maps of one unit share one scale, whose end is `limits[unit]`; a map without a unit has its own.
    """
    data = without_batch(data)
    drawn = [name for name in own_variables(data) if data[name].attrs.get("drawn", True)]
    names = [name for name in drawn if name not in in_header(data)]
    found: list[Form] = []
    unknown: list[str] = []
    facts: list[str] = []
    named: dict[str, list[str]] = {}
    if "parts" in data.attrs and (parts := parts_list(data)) is not None:
        found.append(parts)
        names = [name for name in names if name not in parts.names or data[name].ndim]
        names = [name for name in names if name != parts.sum_of]
    for name in names:
        axes = [axis_kind(str(dim)) for dim in data[name].dims]
        if not axes:
            facts.append(name)
        elif name == data.attrs.get("graph"):
            found.append(edge_graph(data, name))
        elif len(axes) == 1 and axes[0] and axes[0] not in ORDERED and is_numeric(data, name):
            named.setdefault(str(data[name].dims[0]), []).append(name)
        elif data[name].dims[0] == "group" and len(axes) > 2 and (by_group := _by_group(data, name, axes[1:])):
            found += by_group
            if (more := data.sizes["group"] - MOST_GROUPS) > 0:
                unknown.append(f"{name} of {more} more group{'s' if more > 1 else ''}")
        elif (form := _form(data, name, axes)) is not None:
            found.append(form)
            if isinstance(form, HeatMap) and (form.down, form.across) == ("sender", "receiver"):
                found.append(by_layer(form))
        else:
            unknown.append(f"{name} over ({', '.join(map(str, data[name].dims))})")
    found += [label_table(data, axis, variables) for axis, variables in named.items()]
    found += [fact_list(data, facts)] if facts else []
    maps = [form for form in found if isinstance(form, HeatMap)]
    return Forms(tuple(found), tuple(unknown), limits_of(maps))


def _by_group(data: xr.Dataset, name: str, axes: Sequence[str]) -> list[Form]:
    """The forms of a variable in each of the first groups; none where the axes after the group have none."""
    found: list[Form] = []
    for i, group in enumerate(labels(data, "group")[:MOST_GROUPS]):
        form = _form(data.isel(group=i, drop=True), name, axes)
        if form is not None:
            found.append(replace(form, name=f"{form.name}, {group}", title=f"{form.title}, {group}"))
    return found


def _form(data: xr.Dataset, name: str, axes: Sequence[str]) -> HeatMap | NeuronMap | Series | TokenMap | None:
    """The form of a variable with axes; none where there is none."""
    if not is_numeric(data, name):
        dims = sorted(str(dim) for dim in data[name].dims if dim != "rank")
        return token_map(data, name) if dims in (["layer", "pos"], ["head", "layer"]) else None
    if not all(axes) or len(axes) > 2 or 0 in data[name].shape:
        return None
    if len(axes) == 1:
        return series(data, name)
    return neuron_map(data, name) if set(axes) == {"layer", "neuron"} else heat_map(data, name)
