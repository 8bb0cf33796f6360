"""Declarations read from their source: what a method declares, without what it computes with.

A command must know its options before it can refuse one, and importing a method imports `torch`, which takes seconds.
Here the statements of a module that a declaration needs are run alone, each when its name is first used: aliases of
types, `Argument`s, choices and defaults, and the functions that read an argument from text. A name of a library, or of
a room that needs one, becomes a `Nothing`, which may stand in a type but has no value.

Law:   a sketch has the parameters that the imported declaration has; tests/cli/test_early.py, for every method.
Cost:  some milliseconds; nothing is imported but the standard library and the light modules of the package.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module, resources
from itertools import accumulate
from typing import Any

from microtome.catalogue import KINDS, own
from microtome.method._arguments import Parameter, arguments_of, parameters_in
from microtome.method._declare import Column, Method, Source, called, several
from microtome.method._registry import declared

OWN, LOOK = "microtome", "microtome.method._look"
FLAGS = __future__.annotations.compiler_flag


class _Kind(type):
    """The type of names that stand for what is not loaded: whatever is done with one gives such a name again."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Nothing(metaclass=_Kind):
    """A name of something that is not loaded."""


@dataclass(frozen=True)
class Sketch:
    """A method as its source declares it.

    Attributes:
        method: the declaration; its function only carries the signature.
        parameters: of its function behind the model, or behind what a measure sees.
        look_parameters: of a measure, the arguments of what it reads.
    """

    method: Method
    parameters: tuple[Parameter, ...]
    look_parameters: tuple[Parameter, ...] = ()


class _Names(dict[str, Any]):
    """The names of a module, each defined by running its own statement when it is first used."""

    def __init__(self, module: str) -> None:
        super().__init__(__builtins__=builtins, __name__=__name__)
        self.module, self.body = module, _statements(module)
        flat = (inner for node in self.body for inner in (node.body if isinstance(node, ast.If) else [node]))
        self.places: dict[str, list[ast.stmt]] = {}
        for node in flat:
            for name in _defined(node):
                self.places.setdefault(name, []).append(node)

    def __missing__(self, name: str) -> Any:
        if name not in self.places:
            raise KeyError(name)  # a builtin, or an error that the import of the module will tell
        for node in self.places[name]:
            if isinstance(node, ast.ImportFrom | ast.Import):
                self[name] = _imported(node, name)
            else:
                try:
                    self.run(node)
                except Exception:  # noqa: BLE001 (it is made of what is not loaded)
                    self[name] = Nothing
        return self[name]

    def run(self, node: ast.stmt) -> None:
        """Run one statement of the module in these names."""
        for name in _used(node):  # the body of a class looks names up without asking `__missing__`
            if node not in self.places.get(name, [node]):
                self[name]
        code = compile(ast.Module([node], []), f"<{self.module}>", "exec", flags=FLAGS, dont_inherit=True)
        exec(code, self)  # of our own modules
        if isinstance(node, ast.ClassDef):
            _SCOPES[self[node.name]] = self


_SCOPES: dict[Any, _Names] = {}
"""By class, the names that its annotations are written in."""


@cache
def _names(module: str) -> _Names:
    return _Names(module)


@cache
def _statements(module: str) -> tuple[ast.stmt, ...]:
    """The statements at the top level of a module."""
    *folders, name = module.split(".")[1:] or ["__init__"]
    place = resources.files(OWN).joinpath(*folders)
    file = place / name / "__init__.py" if (place / name).is_dir() else place / f"{name}.py"
    return tuple(ast.parse(file.read_text(encoding="utf-8")).body)


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _used(node: ast.AST) -> Iterator[str]:
    """The names that running a statement uses: not those in bodies of functions and in annotations."""
    if isinstance(node, ast.Name):
        yield node.id
    parts = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef):
        parts = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.AnnAssign):
        parts = filter(None, [node.value])
    elif isinstance(node, ast.Lambda):
        parts = []
    for part in parts:
        yield from _used(part)


def _imported(node: ast.Import | ast.ImportFrom, name: str) -> Any:
    """What an import gives: the thing if that loads nothing heavy, else its definition in our source, or `Nothing`."""
    alias = next(a for a in node.names if name == (a.asname or a.name).partition(".")[0])
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
    if isinstance(node, ast.Import):
        return import_module(module if alias.asname else name) if _light(module) else Nothing
    if _light(module) and not module.startswith(OWN):
        return getattr(import_module(module), alias.name, Nothing)
    if not module.startswith(OWN):
        return Nothing
    where = _names(module)
    if alias.name not in where.places:
        return Nothing  # a module of a package
    defined = not any(isinstance(place, ast.Import | ast.ImportFrom) for place in where.places[alias.name])
    if defined and _light(module):
        return getattr(import_module(module), alias.name)
    return where[alias.name]


@cache
def _light(module: str) -> bool:
    """Whether a module may be imported here: it and the packages that it is in need the standard library alone."""
    return _without_libraries(module, set())


def _without_libraries(module: str, seen: set[str]) -> bool:
    if not module.startswith(OWN):
        return module.partition(".")[0] in sys.stdlib_module_names
    seen.add(module)
    parts = accumulate(module.split("."), "{}.{}".format)
    return all(_without_libraries(m, seen) for part in parts for m in _needs(part) if m not in seen)


def _needs(module: str) -> Iterator[str]:
    """The modules that the import of one imports: where it asks a face for a name, also the module of that name."""
    for node in _statements(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            homes = _names(node.module).places if node.module.startswith(OWN) else {}
            places = (place for alias in node.names for place in homes.get(alias.name, ()))
            yield from (place.module for place in places if isinstance(place, ast.ImportFrom) and place.module)


def sketch(name: str) -> Sketch:
    """What a method declares: read from its source where it is one of the package, else imported.

    Raises:
        ArgumentError: there is none of this name, or its module cannot be imported; names those that are near.
    """
    entry = next((entry for entry in own() if entry.name == name), None)
    read = None if entry is None else _sketches(entry.module).get(name)
    if read is not None:
        return read
    made: Any = declared(name)
    return Sketch(made.method, made.parameters, getattr(made, "look_parameters", ()))


def from_source(module: str, name: str) -> Any:
    """A function of the package that needs little of its module: defined from its source, without an import.

    Whatever it calls of a library is not there: it is for functions that check and refuse.
    """
    return _names(module)[name] if not _light(module) else getattr(import_module(module), name)


@cache
def _sketches(module: str) -> Mapping[str, Sketch]:
    """The methods that a module declares, by name."""
    found: dict[str, Sketch] = {}
    names = _Names(module)  # not those that are kept: here the decorators are others
    names.update({kind: _recorder(kind, names, found) for kind in KINDS})
    for node in names.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and any(map(_declares, node.decorator_list)):
            try:
                names.run(node)
            except Exception:  # noqa: BLE001 (whatever cannot be read so is imported, and says then what is wrong)
                return {}
    return {} if any(_unknown(p) for one in found.values() for p in (*one.parameters, *one.look_parameters)) else found


def _declares(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id in KINDS


def _recorder(kind: Any, names: _Names, found: dict[str, Sketch]) -> Callable[..., Any]:
    """What stands for a decorator: keeps what it was given."""

    def declare(name: str, **given: Any) -> Callable[[Any], Any]:
        def keep(function: Any) -> Any:
            own = _own_parameters(function, names, behind=0 if isinstance(function, type) else 1)
            read = _look_parameters(given.get("on") or _names(LOOK)["Text"]()) if kind == "measure" else ()
            call = called(name, groups=isinstance(function, type) and "across" in vars(function))
            told: dict[str, Any] = {"call": call, "atlas": True} if kind == "measure" else {}
            told |= given | {"summary": (inspect.getdoc(function) or "").partition("\n")[0]}
            told |= {"columns": several(given.get("columns", ()), Column), "source": several(given["source"], Source)}
            told |= {"needs": several(given.get("needs", ()), str)}
            known = {field.name for field in fields(Method)} - {"sites", "optional"}
            told = {k: v for k, v in told.items() if k in known}
            method = Method(name=name, kind=kind, function=function, arguments=arguments_of((*own, *read)), **told)
            found[name] = Sketch(method, own, read)
            return function

        return keep

    return declare


def _own_parameters(function: Any, names: _Names, behind: int) -> tuple[Parameter, ...]:
    if not isinstance(function, type):
        return parameters_in(function, names, behind)
    made: Any = vars(function).get("__init__")
    return () if made is None else parameters_in(made, names, 1)


def _look_parameters(look: Any) -> tuple[Parameter, ...]:
    """The arguments of what a measure reads, with the defaults that it declares."""
    if not is_dataclass(look):
        return ()
    kind: Any = type(look)
    own = parameters_in(kind, _SCOPES[kind])
    return tuple(Parameter(p.name, p.type, getattr(look, p.name), p.argument, p.optional) for p in own)


def _unknown(p: Parameter) -> bool:
    """Whether a parameter's default, limits or words depend on what is not loaded."""
    argument = p.argument
    declared = () if argument is None else (argument.meaning, argument.least, argument.most, *argument.choices)
    values: tuple[Any, ...] = (p.default, *(p.default if isinstance(p.default, tuple | list) else ()), *declared)
    return any(value is Nothing for value in values)
