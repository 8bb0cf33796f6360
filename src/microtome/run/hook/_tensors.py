"""The hidden states among the arguments and in the outputs of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where the hidden states are: first, by their usual name, or the first floating tensor there is."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    return next(name for name, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a module."""
    place = _place(args, kwargs)
    return args[place] if isinstance(place, int) else kwargs[place]


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with other hidden states."""
    place = _place(args, kwargs)
    return ((new, *args[1:]), kwargs) if isinstance(place, int) else (args, kwargs | {place: new})


def output_of(output: Any) -> Tensor:
    """The hidden states in the output of a module: it, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def with_output(output: Any, new: Tensor) -> Any:
    """The output, with other hidden states."""
    if isinstance(output, tuple | list):
        return type(output)((new, *output[1:])) if type(output) in (tuple, list) else (new, *output[1:])
    return new


def made_of(output: Tensor, part: str, compute: Callable[[], Tensor]) -> Tensor:
    """What an output was made of: what an earlier edit left on it, or else what is computed."""
    known = getattr(output, part, None)
    return compute() if known is None else known


def remembering(output: Tensor, part: str, value: Tensor) -> Tensor:
    """An output that remembers what it was made of, so that whoever looks at that next sees it changed, once."""
    setattr(output, part, value)
    return output
