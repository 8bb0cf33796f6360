"""Weights that are written, and what they were: the one place where a model's weights change.

What is kept is looked up again by its address when it is put back: a model may have moved to another device since. An
interrupt waits until what is being written is whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from microtome.change._delta import Delta, changed, require_fit
from microtome.change._weight import weight_at
from microtome.model import Model
from microtome.run.hook import lock_of

Kept = list[tuple[str, Tensor]]
"""Addresses, and what stood there, in the order in which they were written over."""


def write(model: Model, deltas: Mapping[str, Delta], kept: Kept) -> None:
    """Write deltas into a model, and append to `kept` what each replaces, before it does.

    All must fit before the first is written; one that makes values which are not finite ends it, with those before it
    written: whoever calls restores `kept`.

    Raises:
        SiteError: there is no such weight.
        ArgumentError: a delta does not fit, or makes values that are not finite.
    """
    for name, delta in deltas.items():
        require_fit(weight_at(model, name), delta)
    for name, delta in deltas.items():
        weight = weight_at(model, name)
        new = changed(weight, delta)
        kept.append((name, weight.read()))
        weight.write(new)


def restore(model: Model, kept: Kept) -> None:
    """Write back what was there, the last first, and forget it."""
    while kept:
        name, values = kept[-1]
        weight_at(model, name).write(values)
        kept.pop()


@contextmanager
def writing(model: Model) -> Iterator[Kept]:
    """A block that may write, alone and to its end; after an exception what was kept is put back."""
    kept: Kept = []
    with lock_of(model.hf).take(()), uninterrupted():
        try:
            yield kept
        except BaseException:
            restore(model, kept)
            raise


@contextmanager
def trying(model: Model) -> Iterator[Kept]:
    """The same, with everything put back in any case."""
    with writing(model) as kept:
        try:
            yield kept
        finally:
            restore(model, kept)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back within a block; it comes at the end of it. In other threads there is none to hold back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before: Any = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(signal.SIGINT, None)
