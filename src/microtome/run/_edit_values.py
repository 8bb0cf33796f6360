"""What an edit may hold: numbers and tensors, told apart from what merely looks like them."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real
from typing import Any

from torch import Tensor

from microtome.errors import EditError, error

NUMBERS = ("strength", "low", "high", "std")
TENSORS = ("mean", "basis", "matrix")
EITHER = ("value", "factor")


def refuse_unsound(edit: Any) -> None:
    """Refuse an edit whose fields are of no use, when it is made and not when it is run.

    Raises:
        EditError: a field is neither a number nor a tensor where it should be, or bounds are crossed.
    """
    kind = type(edit).__name__
    for name in (f.name for f in fields(edit)):
        value: Any = getattr(edit, name)
        number = type(value) is not bool and isinstance(value, Real)
        allowed = None
        if name in NUMBERS and value is not None and not number:
            allowed = "a number"
        elif name in TENSORS and not (value is None or isinstance(value, Tensor)):
            allowed = "a tensor"
        elif name in EITHER and not number and not isinstance(value, Tensor):
            allowed = "a number or a tensor"
        if allowed is not None:
            raise error(
                EditError,
                f"{kind} on {edit.site} cannot use this {name}",
                got=f"{type(value).__name__}",
                allowed=allowed,
                do="give torch.tensor(...) for several numbers" if "tensor" in allowed else "give one number",
            )
    low, high = getattr(edit, "low", None), getattr(edit, "high", None)
    if low is not None and high is not None and low > high:
        raise error(
            EditError,
            f"{kind} on {edit.site} has its bounds crossed",
            got=f"low={low}, high={high}",
            allowed="low at most high",
            do="exchange them",
        )
