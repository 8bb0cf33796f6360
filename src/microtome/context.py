"""What every method takes and no method declares: seed, memory budget, progress, plan, device.

One `Settings` value holds them, and a context sets them for all that runs inside it, in this thread alone:

>>> with mt.settings(seed=1, budget="2 GiB"):
...     mt.measure(model, "induction")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from operator import index
from typing import Any, cast

from microtome.cluster import Cluster
from microtome.errors import ArgumentError, error
from microtome.progress import Drawing, Later, visible
from microtome.shown import shown

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, all)."""

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def seed_of(value: Any) -> int:
    """A seed that every generator takes.

    Raises:
        ArgumentError: it is no integer of 0 or more.
    """
    try:
        seed = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        seed = -1
    if seed < 0:
        raise error(ArgumentError, "seed must be an integer of 0 or more", got=repr(value), do="choose another seed")
    return seed


def bytes_of(value: Any) -> int:
    """A number of bytes, also from text: "2 GiB", "500MB", "4096".

    Raises:
        ArgumentError: it is no size.
    """
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match and match[2].lower() in _UNITS:
        return int(float(match[1]) * _UNITS[match[2].lower()])
    try:
        size = -1 if isinstance(value, bool | str) else index(value)
    except TypeError:
        size = -1
    if size < 0:
        allowed = 'a number of bytes, or text such as "2 GiB"'
        raise error(ArgumentError, "budget must be a size in memory", got=repr(value), allowed=allowed, do="give one")
    return size


@shown
@dataclass(frozen=True)
class Settings:
    """What holds for every method that runs.

    Raises:
        ArgumentError: one of them cannot have this value; says what is allowed.

    Attributes:
        seed: of every random draw: tokens, noise, controls, resampling.
        budget: bytes that a run or a sweep may hold, also as text, such as "2 GiB"; by default what each of them
            chooses from the free memory.
        progress: True draws bars with the time left while a method runs, on stderr where that is a terminal, or under
            the cell of a notebook; False or None draws nothing; a function is called with (stage, done, all) instead.
        on_plan: called with the plan of every sweep before its first cell.
        device: where `open` puts a model; the accelerator if there is one, by default.
        ray: the Ray cluster whose actors read the texts of measures, atlases and harvests: "auto" for that of this
            machine, HOST:PORT of its head, or a `microtome.cluster.Cluster`; by default this process reads them.
    """

    seed: int = 0
    budget: Any = None
    progress: Progress | bool | None = True
    on_plan: Callable[[object], None] | None = None
    device: Any = None
    ray: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", seed_of(self.seed))
        if self.budget is not None:
            object.__setattr__(self, "budget", bytes_of(self.budget))
        if isinstance(self.ray, str):
            object.__setattr__(self, "ray", Cluster(self.ray))
        elif self.ray is not None and not isinstance(self.ray, Cluster):
            allowed = '"auto", HOST:PORT, a Cluster or None'
            raise error(ArgumentError, f"ray must be {allowed}", got=repr(self.ray), do="give one")
        for name in ("progress", "on_plan"):
            value = getattr(self, name)
            if value is not None and not callable(value) and not (name == "progress" and isinstance(value, bool)):
                allowed = "a function, or None" if name == "on_plan" else "a function, True, False or None"
                raise error(ArgumentError, f"{name} must be {allowed}", got=repr(value), do="give one")

    def report(self, stage: str, done: int, everything: int) -> None:
        """Report progress, where somebody listens."""
        if not isinstance(self.progress, bool | None):
            self.progress(stage, done, everything)
        elif self.progress and (shown := _SHOWN.get()) is not None:
            shown.report(stage, done, everything)

    def counting(self, stage: str) -> Callable[[int, int], None]:
        """A function of (done, all) that reports one stage."""
        return lambda done, everything: self.report(stage, done, everything)


_CURRENT: ContextVar[Settings] = ContextVar("microtome_settings", default=Settings())  # noqa: B039 (it is frozen)


_SHOWN: ContextVar[Drawing | None] = ContextVar("microtome_progress", default=None)


@contextmanager
def drawn() -> Iterator[None]:
    """Draw what is reported inside the block, where the settings say so, somebody sees it, and no block around does."""
    if current().progress is not True or _SHOWN.get() is not None or not visible():
        yield
        return
    shown = Later()
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)
        shown.close()


def current() -> Settings:
    """The settings that hold here."""
    return _CURRENT.get()


@contextmanager
def settings(given: Settings | None = None, /, **changes: Any) -> Iterator[Settings]:
    """Set some of the settings for all that runs inside the block; the others stay as they are outside.

    Args:
        given: settings to start from; by default those outside.
        changes: fields of `Settings`; `budget` also as text, such as "2 GiB".

    Raises:
        ArgumentError: there is no such setting, or it cannot have this value; says what is allowed.
    """
    unknown = [name for name in changes if name not in Settings.__dataclass_fields__]
    if unknown:
        allowed = ", ".join(Settings.__dataclass_fields__)
        raise error(ArgumentError, f'no setting "{unknown[0]}"', allowed=allowed, do="name one of these")
    start = cast("object", current() if given is None else given)
    if not isinstance(start, Settings):
        do = "write mt.settings(seed=1), or give a Settings"
        raise error(ArgumentError, "cannot read this as settings", got=type(start).__name__, do=do)
    token = _CURRENT.set(replace(start, **changes))
    try:
        yield current()
    finally:
        _CURRENT.reset(token)
