"""How objects show themselves: one short line, and a small table of HTML for a notebook, both made from their facts.

An object's facts are named texts: what its method `_facts` gives, else the fields of a dataclass that differ from their
defaults, else its public attributes, each cut to a readable length. Arrays are their shape and type, so nothing is
computed or copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from html import escape
from reprlib import Repr
from typing import Any, TypeVar

T = TypeVar("T", bound=type)
V = TypeVar("V")

MOST = 900
"""Characters of a line; what comes after is left out, and that it is."""

MOST_OF_ONE = 300
"""Characters of one fact."""


class _Brief(Repr):
    """Values in a few characters, which say how much there is of what was cut."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxlong = 3, 120, 60
        self.texts, self.items = 70, 4

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, str):
            return self._text(x)
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return _array(x)
        if isinstance(x, Mapping) and type(x).__repr__ in (dict.__repr__, Listing.__repr__):
            if level <= 1:
                return f"{{{len(x)} in all}}" if x else "{}"
            return self._several(x, (f"{self.repr1(k, level)}: {self.repr1(v, level - 1)}" for k, v in x.items()), "{}")
        if isinstance(x, tuple | list | set | frozenset) and type(x).__module__ == "builtins":
            ends = "()" if isinstance(x, tuple) else "[]" if isinstance(x, list) else "{}"
            if level <= 1:
                return f"{ends[0]}{len(x)} in all{ends[1]}" if x else ends
            return self._several(x, (self.repr1(inner, level - 1) for inner in x), ends)
        if callable(x) and hasattr(x, "__qualname__"):
            return str(x.__qualname__)
        known = getattr(type(x), "_repr_html_", None) is table
        if known or is_dataclass(x):  # never the line that `dataclass` makes, which may have no end
            text = repr(x) if known else line(x)
            return text if len(text) <= self.maxother else f"{type(x).__name__}(…)"
        return self.repr_instance(x, level)

    def _text(self, x: str) -> str:
        return repr(x) if len(x) <= self.texts else f"{x[: self.texts - 10]!r}… ({len(x):,} characters)"

    def _several(self, x: Any, inner: Iterable[str], ends: str) -> str:
        shown = [text for _, text in zip(range(self.items), inner, strict=False)]
        rest = f", … {len(x):,} in all" if len(x) > self.items else "," if ends == "()" and len(x) == 1 else ""
        return f"{ends[0]}{', '.join(shown)}{rest}{ends[1]}"


def _array(x: Any) -> str:
    """Shape and type of an array; a single number as it is."""
    kind = str(x.dtype).removeprefix("torch.")
    return f"{list(x.shape)} {kind}" if len(x.shape) else f"{x.item()!r} {kind}"


_BRIEF = _Brief()


def brief(value: object) -> str:
    """A value in at most some hundred characters: text and containers cut, arrays as their shape and type."""
    return _BRIEF.repr(value)


def facts(of: Any) -> dict[str, str]:
    """What an object says of itself, by name."""
    told = getattr(of, "_facts", None)
    if told is not None:
        return {name: _cut(text) for name, text in told().items() if text}
    if is_dataclass(of):
        names = [f.name for f in fields(of) if f.repr and getattr(of, f.name) is not f.default]
    else:
        names = [name for name in vars(of) if name[:1] != "_"]
    return {name: _cut(brief(getattr(of, name))) for name in names}


def _cut(text: str) -> str:
    return text if len(text) <= MOST_OF_ONE else f"{text[: MOST_OF_ONE - 1]}…"


def line(of: object) -> str:
    """One line: `Corpus(name='prose', documents=12 texts)`; at most `MOST` characters of facts."""
    shown: list[str] = []
    room = MOST
    for name, text in facts(of).items():
        part = f"{name}={text}"
        room -= len(part) + 2
        if room < 0:
            shown.append("…")
            break
        shown.append(part)
    return f"{type(of).__name__}({', '.join(shown)})"


def table(of: object) -> str:
    """The same as a table of HTML, every text escaped."""
    left = 'style="text-align:left;vertical-align:top"'
    rows = "".join(
        f"<tr><td {left}>{escape(name.replace('_', ' '))}</td><td {left}>{escape(text)}</td></tr>"
        for name, text in facts(of).items()
    )
    return f"<table><tr><th {left} colspan=2>{escape(type(of).__name__)}</th></tr>{rows}</table>"


def shown(kind: T) -> T:
    """Give a class both forms; as a decorator it stands outside of `dataclass`, whose own line has no end."""
    setattr(kind, "__repr__", line)  # noqa: B010 (a plain assignment to a type is refused by the type checker)
    return in_notebooks(kind)


def in_notebooks(kind: T) -> T:
    """Give a class the table alone, because its own line is short already."""
    setattr(kind, "_repr_html_", table)  # noqa: B010
    return kind


class Listing(dict[str, V]):
    """Values by name; shows itself as its names, and in a notebook as a table."""

    def __repr__(self) -> str:
        return f"{len(self)} by name: {', '.join(self)}"

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><td>{escape(name)}</td><td>{escape(_cut(brief(value)))}</td></tr>" for name, value in self.items()
        )
        return f"<table>{''.join(rows)}</table>"
