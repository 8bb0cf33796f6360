"""All methods there are, by name: found without importing them, imported when one is wanted.

A method is declared in a module of one of the rooms of methods; reading the source of these modules for their
declarations takes a few milliseconds, importing them takes seconds. Packages outside register theirs as entry points:

    [project.entry-points."microtome.methods"]
    punctuation = "my_package.punctuation"

The name is that of a method, the value the module that declares it.
"""

from __future__ import annotations

import ast
import html
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, runtime_checkable

from microtome.errors import ArgumentError, DeclarationError, error, nearest
from microtome.method._declare import Kind, Method, validate

ROOMS = ("measurements", "explain", "change")
"""Rooms whose modules declare methods."""

ENTRY_POINTS = "microtome.methods"
KINDS: tuple[Kind, ...] = ("measure", "question", "change")


@runtime_checkable
class Declared(Protocol):
    """What a decorator leaves: a declaration, and what runs it."""

    @property
    def method(self) -> Method:
        """The declaration."""
        ...


@dataclass(frozen=True)
class Entry:
    """A method that is known and need not be imported yet.

    Attributes:
        name, kind: as declared; of an entry point the kind is known when it is imported.
        module: that declares it.
        summary: the first line of its docstring.
        problem: why it cannot be used, if it cannot.
    """

    name: str
    kind: Kind | None
    module: str
    summary: str
    problem: str = ""


class Methods(dict[str, Method]):
    """Methods by name; shows itself as a list of names and the questions that they answer."""

    def __repr__(self) -> str:
        widest = max(map(len, self), default=0)
        return "\n".join(f"{name:{widest}}  {method.question}" for name, method in self.items())

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><td><code>{html.escape(m.call)}</code></td><td>{html.escape(m.question)}</td></tr>"
            for m in self.values()
        )
        return f"<table><tr><th>call</th><th>question</th></tr>{''.join(rows)}</table>"


_DECLARED: dict[str, Declared] = {}
_FAILED: dict[str, str] = {}


def register(declared: Declared) -> None:
    """Take in a declaration.

    Raises:
        DeclarationError: it lacks something, contradicts itself, or clashes with another's; nothing is registered.
    """
    method = declared.method
    validate(method)
    known = _DECLARED.get(method.name)
    if known is not None and known.method.home != method.home:
        what = f'the name "{method.name}" is taken by {known.method.home}'
        raise error(DeclarationError, what, got=method.home, do="choose another name")
    if method.kind == "measure":
        for other in (d.method for d in _DECLARED.values()):
            shared = {c.name for c in other.columns} & {c.name for c in method.columns}
            if other.kind == "measure" and other.name != method.name and shared:
                what = f'the measure "{method.name}" has a column "{min(shared)}" that "{other.name}" has too'
                raise error(DeclarationError, what, do="rename it")
    _DECLARED[method.name] = declared


def forget(name: str) -> None:
    """Take a declaration back; for tests and for reloading."""
    _DECLARED.pop(name, None)


def index() -> Mapping[str, Entry]:
    """Every method that is known, by name: those of the package, of entry points, and those registered by hand."""
    found = {entry.name: entry for entry in _own()}
    for point in _points():
        problem = _FAILED.get(point.name, "")
        found.setdefault(point.name, Entry(point.name, None, point.value, f"from {point.value}", problem))
    for name, declared in _DECLARED.items():
        m = declared.method
        found[name] = Entry(name, m.kind, m.home, m.summary)
    return found


def declared(name: str) -> Declared:
    """A method by name, imported if need be.

    Raises:
        ArgumentError: there is none of this name, or its module cannot be imported; names those that are near.
    """
    if name in _DECLARED:
        return _DECLARED[name]
    entry = index().get(name)
    if entry is None:
        raise _unknown(name)
    if entry.kind is None:
        _load_point(next(p for p in _points() if p.name == name))
    else:
        import_module(entry.module)
    if name not in _DECLARED:
        why = _FAILED.get(name, f"{entry.module} declares no method of this name")
        raise error(ArgumentError, f'the method "{name}" cannot be used', got=why, do="mend or remove its package")
    return _DECLARED[name]


def methods(kind: Kind | None = None) -> Methods:
    """All methods by name, imported: those of one kind, or all. What cannot be imported is warned of and left out."""
    for entry in list(index().values()):
        if entry.name in _DECLARED or (kind is not None and entry.kind not in (kind, None)):
            continue
        try:
            declared(entry.name)
        except ArgumentError as problem:
            warnings.warn(str(problem), stacklevel=2)
    chosen = {name: d.method for name, d in _DECLARED.items() if kind in (None, d.method.kind)}
    return Methods(sorted(chosen.items()))


def _unknown(name: str) -> ArgumentError:
    names = sorted(index())
    near = nearest(name, names)
    return error(ArgumentError, f'no method "{name}"', do=near.strip() or "choose one that `mt.methods()` lists")


def _load_point(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as problem:  # noqa: BLE001 (whatever another package raises, the other methods work)
        _FAILED[point.name] = f"{point.value}: {type(problem).__name__}: {' '.join(str(problem).split())}"


def _points() -> list[EntryPoint]:
    return list(entry_points(group=ENTRY_POINTS))


@cache
def _own() -> tuple[Entry, ...]:
    """The methods of the package, read from its source."""
    found: list[Entry] = []
    for room in ROOMS:
        folder = resources.files("microtome") / room
        for file in sorted(folder.iterdir(), key=lambda f: f.name) if folder.is_dir() else ():
            if file.name.endswith(".py"):
                found += _in_source(file.read_text(encoding="utf-8"), f"microtome.{room}.{file.name[:-3]}")
    return tuple(found)


def _in_source(text: str, module: str) -> Iterator[Entry]:
    """The methods that a module declares at its top level."""
    if not any(f"@{kind}(" in text for kind in KINDS):
        return
    for node in ast.parse(text).body:
        for decorator in getattr(node, "decorator_list", ()):
            call = decorator.func.id if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) else ""
            if call in KINDS and isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = decorator.args[0] if decorator.args else None
                name = first.value if isinstance(first, ast.Constant) else node.name
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                yield Entry(str(name), call, module, summary)
