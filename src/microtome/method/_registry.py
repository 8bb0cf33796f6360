"""All methods by name: known without importing them, and imported when needed."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Protocol, runtime_checkable

from microtome.catalogue import REGISTERED, Entry, entries, likely, own, points
from microtome.errors import ArgumentError, DeclarationError, error
from microtome.method._declare import Kind, Method


@runtime_checkable
class Declared(Protocol):
    """What a decorator leaves: a declaration, and what runs it."""

    @property
    def method(self) -> Method:
        """The declaration."""
        ...


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


PACKAGE = "microtome."
"""How the names of the package's own modules begin."""

_DECLARED: dict[str, Declared] = {}
_FAILED: dict[str, str] = {}


def register(declared: Declared) -> None:
    """Take in a declaration.

    Raises:
        DeclarationError: its name or a column clashes with another's; nothing is registered.
    """
    method = declared.method
    if not method.home.startswith(PACKAGE):
        _require_own_names_free(method)
    known = _DECLARED.get(method.name)
    if known is not None and known.method.home != method.home:
        raise _taken(method, known.method.home)
    if method.kind == "measure":
        for other in (d.method for d in _DECLARED.values()):
            shared = {c.name for c in other.columns} & {c.name for c in method.columns}
            if other.kind == "measure" and other.name != method.name and shared:
                what = f'the measure "{method.name}" has a column "{min(shared)}" that "{other.name}" has too'
                raise error(DeclarationError, what, do="rename it")
    _DECLARED[method.name] = declared
    REGISTERED[method.name] = Entry(method.name, method.kind, method.home, method.summary, method.command)


def _require_own_names_free(method: Method) -> None:
    """Refuse a name of the package's own, imported or not; and import its measures, whose columns are compared next."""
    for entry in own():
        if entry.name == method.name:
            raise _taken(method, entry.module)
        if entry.kind == method.kind == "measure":
            import_module(entry.module)


def _taken(method: Method, home: str) -> DeclarationError:
    return error(
        DeclarationError, f'the name "{method.name}" is taken by {home}', got=method.home, do="choose another name"
    )


def forget(name: str) -> None:
    """Take a declaration back; for tests and for reloading."""
    _DECLARED.pop(name, None)
    REGISTERED.pop(name, None)


def index() -> Mapping[str, Entry]:
    """Every method that is known, by name, with why it cannot be used, if it cannot."""
    return {name: replace(e, problem=_FAILED.get(name, "")) for name, e in entries().items()}


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
        _load_point(next(p for p in points() if p.name == name))
    else:
        import_module(entry.module)
    if name not in _DECLARED:
        why = _FAILED.get(name, f"{entry.module} declares no method of this name")
        raise error(ArgumentError, f'the method "{name}" cannot be used', got=why, do="repair or remove its package")
    return _DECLARED[name]


def methods(kind: Kind | None = None) -> Methods:
    """All methods by name, imported: those of one kind, or all. What cannot be imported is warned of and left out."""
    for entry in list(index().values()):
        if entry.name in _DECLARED or (kind is not None and entry.kind not in (kind, None)):
            continue
        try:
            declared(entry.name)
        except (ArgumentError, DeclarationError) as problem:
            warnings.warn(str(problem), stacklevel=2)
    chosen = {name: d.method for name, d in _DECLARED.items() if kind in (None, d.method.kind)}
    return Methods(sorted(chosen.items()))


def _unknown(name: str) -> ArgumentError:
    names = sorted(index())
    near = likely(name, names)
    return error(ArgumentError, f'no method "{name}"', do=near.strip() or "choose one that `mt.methods()` lists")


def _load_point(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as problem:  # noqa: BLE001 (whatever another package raises, the other methods work)
        _FAILED[point.name] = f"{point.value}: {type(problem).__name__}: {' '.join(str(problem).split())}"
