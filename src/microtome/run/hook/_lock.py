"""A lock on a model: one forward at a time, and no other thread while it is edited.

Hooks are on the model itself, so that a forward of another thread meets them too: they let it pass unwatched and
unedited, and one that begins in the meantime waits for a run, and is refused while the model is edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Condition, Lock, get_ident
from weakref import WeakKeyDictionary

from torch import nn

from microtome.edit import Edit
from microtome.errors import EditError, error


class ModelLock:
    """The lock of one model.

    Attributes:
        active_edits: the edits of the `editing` blocks that are open.
        prompt: where prompts are generated one after the other, the number of this one and of all of them.
        standing_aside: whether the hooks of those edits let a forward pass as it is: a sweep applies them itself.
    """

    def __init__(self) -> None:
        self.active_edits: list[Edit] = []
        self.prompt: tuple[int, int] | None = None
        self.standing_aside = False
        self._owner: int | None = None
        self._running, self._blocks = False, 0
        self._free = Condition()

    @contextmanager
    def take(self, edits: Sequence[Edit] | None = None) -> Iterator[None]:
        """Run the model in this block; with edits, keep it edited, and run it inside.

        Raises:
            EditError: another thread edits the model, or this one is already inside a run.
        """
        with self._free:
            self._require_idle()
            self._owner = get_ident()
            self._running, self._blocks = edits is None, self._blocks + (edits is not None)
            self.active_edits.extend(edits or ())
        try:
            yield
        finally:
            with self._free:
                if edits is None:
                    self._running = False
                else:
                    self._blocks -= 1
                    del self.active_edits[len(self.active_edits) - len(edits) :]
                if not (self._running or self._blocks):
                    self._owner = None
                self._free.notify_all()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let the hooks of active edits pass the forwards of this block by; only for whoever holds the lock."""
        before, self.standing_aside = self.standing_aside, True
        try:
            yield
        finally:
            self.standing_aside = before

    @contextmanager
    def generating(self, prompt: tuple[int, int] | None) -> Iterator[None]:
        """Say in this block which prompt of several is generated alone; only for whoever holds the lock."""
        self.prompt = prompt
        try:
            yield
        finally:
            self.prompt = None

    def wait_for_others(self) -> None:
        """Wait until no other thread runs the model.

        Raises:
            EditError: another thread edits it.
        """
        with self._free:
            self._wait_or_refuse()

    def _wait_or_refuse(self) -> None:
        while self._owner not in (None, get_ident()):
            if self._blocks:
                raise error(
                    EditError,
                    "this model is being edited by another thread",
                    do="wait until its `editing` block is left, enter it in the thread that runs the model, or open "
                    "the model twice",
                )
            self._free.wait()

    def _require_idle(self) -> None:
        self._wait_or_refuse()
        if self._running:
            raise error(
                EditError,
                "a run cannot start inside another run of the same model",
                do="capture first, and run again when it is over",
            )


_LOCKS: WeakKeyDictionary[nn.Module, ModelLock] = WeakKeyDictionary()
_LOCK = Lock()


def lock_of(model: nn.Module) -> ModelLock:
    """The lock of a model, the same for all that opened it."""
    with _LOCK:
        return _LOCKS.setdefault(model, ModelLock())


def modules_of(model: nn.Module) -> list[nn.Module]:
    """A module and all inside it, each once; `modules` names them too, which takes most of its time."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            waiting += [inner for inner in vars(one)["_modules"].values() if inner is not None]
    return list(found.values())


@contextmanager
def naming_outputs(model: nn.Module) -> Iterator[None]:
    """Let a model name its outputs, whatever its configuration says: several families cannot run otherwise."""
    held = [vars(m).get("config", getattr(type(m), "config", None)) for m in modules_of(model)]
    configs = {id(config): config for config in held if config is not None}
    unnamed = [config for config in configs.values() if getattr(config, "return_dict", True) is False]
    for config in unnamed:
        config.return_dict = True
    try:
        yield
    finally:
        for config in unnamed:
            config.return_dict = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; after the block each module is in the mode that it had."""
    training = [module for module in modules_of(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
