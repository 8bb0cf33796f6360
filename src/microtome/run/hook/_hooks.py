"""The one module that touches a model: it registers hooks, wraps forwards, and removes them again.

A `HookSet` collects what to run (functions before, after and around modules, and inside attention), installs it on
entering and removes it on leaving, also after an exception or Ctrl-C. A module that is not named is untouched.
While it is installed the model is in evaluation mode, and no other thread runs it: one that began before is neither
watched nor edited. A hook set of active edits may have others inside, and does nothing in forwards that these let pass
by: a sweep applies the edits itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from threading import get_ident
from types import TracebackType
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from microtome.anatomy import hiding_kernel
from microtome.edit import Edit
from microtome.errors import SiteError, error
from microtome.run.hook._attention import REGISTRY, AttentionHooks, InlineAttention, is_unwatched, watching
from microtome.run.hook._lock import evaluating, lock_of, naming_outputs

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
After = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Acts = Callable[[], bool]
"""Whether a hook set acts in the forward under way."""


class HookSet:
    """Functions to run in and around the modules of one model, installed for the length of a `with` block."""

    def __init__(
        self,
        model: nn.Module,
        attention: Literal["interface", "inline"],
        n_heads: int,
        active_edits: Sequence[Edit] | None = None,
    ) -> None:
        self._active_edits = active_edits
        self._model, self._attention_kind, self._n_heads = model, attention, n_heads
        self._before: dict[str, list[Before]] = {}
        self._after: dict[str, list[After]] = {}
        self._around: dict[tuple[str, str], list[Around]] = {}
        self._watches: dict[str, AttentionHooks] = {}
        self._seen: list[int] = []  # calls in the forward under way, of each function that waits for one of them
        self._stack = ExitStack()

    def before(self, path: str, function: Before, call: tuple[int, int] | None = None) -> None:
        """Run a function on the arguments of a module, in each or one `call`; what it returns replaces them."""
        self._before.setdefault(path, []).append(self._at(call, function))

    def after(self, path: str, function: After, call: tuple[int, int] | None = None) -> None:
        """Run a function on the arguments and output of a module, likewise; what it returns replaces the output."""
        self._after.setdefault(path, []).append(self._at(call, function))

    def _at(self, call: tuple[int, int] | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does nothing but in one of the calls that a module has in each forward of the model."""
        if call is None:
            return function
        (which, calls), place = call, len(self._seen)
        self._seen.append(0)

        def once(*given: Any) -> Any:
            self._seen[place] += 1
            return function(*given) if (self._seen[place] - 1) % calls == which else None

        return once

    def around(self, path: str, function: Around, method: str = "forward") -> None:
        """Run a function in place of a module's forward, or of another method, which it gets."""
        self._around.setdefault((path, method), []).append(function)

    def attention(self, path: str) -> AttentionHooks:
        """What to do inside one attention module."""
        return self._watches.setdefault(path, AttentionHooks())

    def __enter__(self) -> HookSet:
        try:
            self._stack.enter_context(lock_of(self._model).take(self._active_edits))
            self._stack.enter_context(evaluating(self._model))
            if self._active_edits is None:
                self._stack.enter_context(naming_outputs(self._model))
            self._install()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _install(self) -> None:
        owner, lock = get_ident(), lock_of(self._model)
        edited = self._active_edits is not None

        def mine() -> bool:
            return get_ident() == owner

        def acts() -> bool:
            return mine() and not (edited and lock.standing_aside)

        def wait(module: nn.Module, args: Any) -> None:
            if get_ident() != owner:
                lock.wait_for_others()
            else:
                self._seen = [0] * len(self._seen)

        self._keep(self._model.register_forward_pre_hook(wait, prepend=True))
        for path, before in self._before.items():
            self._keep(self._module(path).register_forward_pre_hook(_pre_hook(before, acts), with_kwargs=True))
        for path, after in self._after.items():
            self._keep(self._module(path).register_forward_hook(_post_hook(after, acts), with_kwargs=True))
        for (path, method), around in self._around.items():
            for function in around:
                self._wrap(self._module(path), function, acts, method)
        if self._watches:
            self._install_attention(mine, acts)

    def _module(self, path: str) -> nn.Module:
        try:
            return self._model.get_submodule(path)
        except AttributeError as problem:
            raise error(
                SiteError,
                f"the model no longer has {path}: its modules changed after it was opened",
                do="open it again",
            ) from problem

    def _keep(self, handle: RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _wrap(self, module: nn.Module, function: Around, acts: Acts, method: str = "forward") -> None:
        had = module.__dict__.get(method)
        inner = getattr(module, method)

        @wraps(inner)  # whose arguments `generate` asks for
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(inner, args, kwargs) if acts() else inner(*args, **kwargs)

        def restore() -> None:
            if had is None:
                module.__dict__.pop(method, None)
            else:
                module.__dict__[method] = had

        self._stack.callback(restore)
        module.__dict__[method] = wrapped

    def _install_attention(self, mine: Acts, acts: Acts) -> None:
        for path, watch in self._watches.items():
            module = self._module(path)
            self._refuse_hidden(path, module, watch)
            # One wrapper serves all hook sets that watch a module: the first entered, which is the last left.
            first = is_unwatched(module)
            self._stack.enter_context(watching(module, watch, acts))
            if self._attention_kind == "inline" and first:
                self._wrap(module, InlineAttention.around(module, self._n_heads), mine)  # each watch says if it acts
        if self._attention_kind == "interface":
            self._stack.enter_context(REGISTRY.wrapped())

    def _refuse_hidden(self, path: str, module: nn.Module, watch: AttentionHooks) -> None:
        kernel = hiding_kernel(getattr(module, "config", None))
        if self._attention_kind == "interface" and watch.wants_pattern and kernel is not None:
            raise error(
                SiteError,
                f"scores and patterns of {path} cannot be read under the attention kernel {kernel}: it hides its masks",
                allowed="eager or sdpa",
                do='call model.hf.set_attn_implementation("sdpa")',
            )


def _pre_hook(functions: list[Before], acts: Acts) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not acts():
            return None
        changed = False
        for function in functions:
            new = function(args, kwargs)
            if new is not None:
                (args, kwargs), changed = new, True
        return (args, kwargs) if changed else None

    return hook


def _post_hook(functions: list[After], acts: Acts) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not acts():
            return None
        changed = False
        for function in functions:
            new = function(args, kwargs, output)
            if new is not None:
                output, changed = new, True
        return output if changed else None

    return hook
