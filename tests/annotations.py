"""An import hook under which every function of a package checks its annotations, axes of tensors included.

The hook of jaxtyping does the same, but binds the arguments of every call, checks them twice, and compiles checks for
every function that is defined inside of another, each time it is: the tests took three times as long. Here beartype
checks functions as they are called; those with axes in their annotations do so in a context of jaxtyping, where an
axis has one size. Functions inside of functions are checked where they have axes.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, Self, get_args

import beartype
from jaxtyping import AbstractArray, AbstractDtype, jaxtyped

# An int may stand where a float is asked for, as PEP 484 has it; `Self` is let through, because beartype sees methods
# one by one, without their class.
_CONF = beartype.BeartypeConf(is_pep484_tower=True, hint_overrides=beartype.FrozenDict({Self: Any}))
_NAME = "__checked__"
_KNOWN: dict[CodeType, bool] = {}


def install(packages: Sequence[str]) -> None:
    """Check the annotations of these packages and modules, which must not have been imported."""
    if early := [name for name in packages if name in sys.modules]:
        raise RuntimeError(f"imported before their annotations could be checked: {', '.join(early)}")
    sys.meta_path.insert(0, _Finder(packages))


def checked(made: Any) -> Any:
    """A function that checks its annotations when it is called; a data class that does when it is made."""
    if inspect.isclass(made):
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = checked(made.__init__)  # type: ignore[misc]
        return made
    if "<locals>" in made.__qualname__ and not _has_axes(made):
        return made
    checking: Callable[..., Any] | None = None

    @functools.wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checking
        if checking is None:  # now all that the annotations name is there
            checking = _checking(made)
        return checking(*args, **kwargs)

    return call


def _checking(made: Any) -> Callable[..., Any]:
    hints = {name: _resolved(hint, made.__globals__) for name, hint in made.__annotations__.items()}
    copy = FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = made.__kwdefaults__, hints
    copy.__module__, copy.__qualname__ = made.__module__, made.__qualname__
    checking = beartype.beartype(conf=_CONF)(copy)
    if not _has_axes(made):
        return checking
    if any("{" in hint for hint in made.__annotations__.values() if isinstance(hint, str)):
        return jaxtyped(checking, typechecker=None)  # an axis that is computed from arguments: these are bound

    def in_context(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return checking(*args, **kwargs)

    return in_context


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """What an annotation says; anything goes where it names what only a type checker imports."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except NameError:
        return Any


def _has_axes(function: Any) -> bool:
    """Whether some annotation has axes, by itself or by the name of a type that has."""
    if function.__code__ not in _KNOWN:
        hints = function.__annotations__.values()
        names = {name for hint in hints if isinstance(hint, str) for name in re.findall(r"\w+", hint)}
        values = [*(hint for hint in hints if not isinstance(hint, str)), *map(function.__globals__.get, names)]
        _KNOWN[function.__code__] = any(map(_is_of_axes, values))
    return _KNOWN[function.__code__]


def _is_of_axes(hint: Any) -> bool:
    if inspect.isclass(hint) and not get_args(hint):
        return issubclass(hint, AbstractArray | AbstractDtype)
    return any(map(_is_of_axes, get_args(hint)))


class _Marks(ast.NodeVisitor):
    """Puts the check below all other decorators of a function, which may hide its annotations, and above a class's."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        node.decorator_list.append(ast.copy_location(ast.Name(_NAME, ast.Load()), node))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        node.decorator_list.insert(0, ast.copy_location(ast.Name(_NAME, ast.Load()), node))
        self.generic_visit(node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)  # byte code of the same file without checks may lie beside it
        tree = ast.parse(self.get_data(path), path)
        _Marks().visit(tree)
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _NAME, checked)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = tuple(packages)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in self.packages):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
