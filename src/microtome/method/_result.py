"""Results: labelled datasets that carry their meaning and provenance, and display themselves in a notebook."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import xarray as xr

from microtome.context import current, drawn
from microtome.errors import DeclarationError, error
from microtome.method._declare import DIFFERENCE, SUFFIXES, Column, Method
from microtome.stream import OF_MEANS

SPLIT = "_"
NOTHING: Mapping[str, Any] = {}


@runtime_checkable
class Subject(Protocol):
    """What a result is about: a model, or an object that holds one and its truth."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What its results record of it."""
        ...


class Result(xr.Dataset):
    """An `xarray.Dataset` of a method: variables with unit, meaning and control, attributes with its provenance."""

    __slots__ = ()

    @classmethod
    def of(cls, data: xr.Dataset) -> Self:
        """A dataset as a result."""
        return cls(data.data_vars, data.coords, data.attrs)

    def _repr_html_(self) -> str:
        from microtome import view

        return view.html(self)


@dataclass
class Cost:
    """What one call has cost so far."""

    started: float = field(default_factory=time.perf_counter)
    plans: list[str] = field(default_factory=list[str])

    @property
    def attrs(self) -> dict[str, Any]:
        """As attributes of a result."""
        attributes: dict[str, Any] = {"seconds": round(time.perf_counter() - self.started, 2)}
        return attributes | ({"plan": self.plans[0] if len(self.plans) == 1 else self.plans} if self.plans else {})


_COST: ContextVar[Cost | None] = ContextVar("microtome_cost", default=None)


@contextmanager
def counting() -> Iterator[Cost]:
    """Count the cost of what runs in the block, and draw its progress.

    A method called by another counts towards that one's cost too, and draws where that one does.
    """
    outer = _COST.get()
    cost = Cost()
    token = _COST.set(cost)
    try:
        with drawn():
            yield cost
    finally:
        _COST.reset(token)
        if outer is not None:
            outer.plans += cost.plans


def spent(plan: object) -> None:
    """Add the plan of a sweep to the cost of the call under way."""
    cost = _COST.get()
    if cost is not None:
        cost.plans.append(str(plan))


def provenance(
    subject: Subject, method: Method, arguments: Mapping[str, Any], cost: Cost, known: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """The attributes of a result: method, source, arguments, seed, cost, and the model's own unless they are known."""
    plain = {k: v for k, v in arguments.items() if isinstance(v, str | int | float) and not isinstance(v, bool)}
    attributes = {"method": method.title or method.name.replace("_", " "), "question": method.question}
    attributes |= {"source": "; ".join(map(str, method.source)), "seed": current().seed}
    return ({} if "fingerprint" in known else dict(subject.provenance)) | plain | attributes | cost.attrs


def labelled(method: Method, data: xr.Dataset) -> xr.Dataset:
    """A dataset whose variables carry what the method declares about them.

    Raises:
        DeclarationError: a variable is none of its columns, or lacks an axis that its column has.
    """
    for name in map(str, data.data_vars):
        column, ending = column_of(method, name)
        if column is None:
            what = f'the {method.kind} "{method.name}" gives "{name}", which it does not declare'
            allowed = ", ".join(c.name for c in method.columns)
            raise error(DeclarationError, what, allowed=allowed, do="add a column to its declaration")
        own = dict(data[name].attrs)
        data[name].attrs.update(_attrs(column, ending) | own)
    return data.assign_attrs(said_of_intervals(data.data_vars))


def said_of_intervals(names: Iterable[Any]) -> dict[str, str]:
    """The attribute that says what the intervals of a dataset are; none where its variables have no ends."""
    return {"interval": OF_MEANS} if any(str(name).endswith("_lo") for name in names) else {}


def _attrs(column: Column, endings: str) -> dict[str, Any]:
    if not endings:
        return column.attrs
    ending = endings.rpartition(SPLIT)[2]
    meaning = f"{column.name} minus its control, {column.control}" if DIFFERENCE in endings else column.meaning
    if ending in ("lo", "hi"):
        meaning = f"{'lower' if ending == 'lo' else 'upper'} end of the 95 % interval over examples of: {meaning}"
    if ending == "p":
        meaning = f"two-sided p-value of sign flips over examples of: {meaning}"
        return {"unit": "probability", "meaning": meaning, "range": [0, 1]}
    return {"unit": column.unit, "meaning": meaning}


def column_of(method: Method, name: str) -> tuple[Column | None, str]:
    """The column that a variable belongs to, and its endings: `lo` of "loss_lo", `diff_lo` of "loss_diff_lo"."""
    exact = next((c for c in method.columns if c.name == name), None)
    if exact is not None:
        return exact, ""
    base, _, ending = name.rpartition(SPLIT)
    if ending in SUFFIXES and base:
        column, inner = column_of(method, base)
        return column, f"{inner}{SPLIT}{ending}" if inner else ending
    return method.column(name), ""
