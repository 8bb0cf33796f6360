"""The types of an edit's fields: numbers, tensors and rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from microtome.anatomy import integer
from microtome.errors import EditError, error

NUMBERS = ("strength", "low", "high", "std")
COUNTS = ("times", "seed")
TENSORS = ("mean", "basis", "matrix")
EITHER = ("value", "factor")


def validate(edit: Any) -> None:
    """Refuse an edit with fields of a wrong type, when it is made and not when it is run.

    Numbers become Python's own, whatever library they are from: they are hashed, printed and saved.

    Raises:
        EditError: a field is neither a number nor a tensor where it should be, rows are none, or bounds are crossed.
    """
    for name in (f.name for f in fields(edit)):
        value: Any = getattr(edit, name)
        number = type(value) is not bool and isinstance(value, Real)
        tensor = isinstance(value, Tensor) and not value.is_complex()
        allowed = None
        if name in NUMBERS and value is not None and not number:
            allowed = "a number"
        elif name in COUNTS and not (number and isinstance(value, Integral)):
            allowed = "an integer"
        elif name in TENSORS and not (value is None or tensor):
            allowed = "a tensor"
        elif name in EITHER and not number and not tensor:
            allowed = "a number or a tensor"
        elif name == "source" and not (value is None or isinstance(value, Mapping) or hasattr(value, "whole")):
            allowed = "a run, or a mapping from sites to tensors"
        if allowed is not None:
            raise error(
                EditError,
                f"{_named(edit)} cannot use this {name}",
                got=f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__,
                allowed=allowed,
                do=_advice(allowed),
            )
        if number:
            object.__setattr__(edit, name, _plain(value))
    if getattr(edit, "rows", None) is not None:
        object.__setattr__(edit, "rows", _rows(edit))
    low, high = getattr(edit, "low", None), getattr(edit, "high", None)
    if low is not None and high is not None and low > high:
        raise error(
            EditError,
            f"{_named(edit)} has its bounds in the wrong order",
            got=f"low={low}, high={high}",
            allowed="low <= high",
            do="swap them",
        )


def _plain(number: Any) -> int | float:
    return int(number) if isinstance(number, Integral) else float(number)


def _named(edit: Any) -> str:
    kind = type(edit).__name__
    return f"{kind} on {edit.site}" if hasattr(edit, "site") else f"{kind} of layers {edit.layers}"


def _advice(allowed: str) -> str:
    if allowed.startswith("a run"):
        return "give the other run"
    return "give torch.tensor(...) for several numbers" if "tensor" in allowed else "give one number"


def _rows(edit: Any) -> tuple[int, ...]:
    try:
        rows = tuple(integer(row) for row in edit.rows)
    except TypeError:
        raise error(
            EditError,
            f"{_named(edit)} cannot use these rows",
            got=repr(edit.rows),
            allowed="a tuple of row numbers",
            do="write rows=(0,) for only the first row",
        ) from None
    if not rows:
        raise error(EditError, f"{edit!r} names no rows", do="name at least one, or leave rows= out for all")
    return rows
