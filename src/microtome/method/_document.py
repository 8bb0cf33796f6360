"""The documentation of a method, generated from its declaration: its docstring, and its row in docs/methods.md."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from microtome.method._arguments import MISSING, Parameter, choices_of, limits
from microtome.method._declare import NONE, Column, Kind, Method

WIDTH = 110
HEADINGS: Mapping[Kind, str] = {"measure": "Measures", "question": "Questions", "change": "Changes"}
INTRODUCTION = """# Methods

All methods, generated from their declarations by `make methods`. A measure is run by `mt.measure(model, "name", ...)`
or `microtome measure name`, any number of them in one call; a question about prompts is a function of `mt.explain` and
a command of its own; a change gives edits to run under. Settings that all of them share (seed, budget, progress) are
given once: `with mt.settings(seed=1, budget="2 GiB"):`, or `--seed` and `--budget`.
"""


def docstring(method: Method, parameters: Sequence[Parameter]) -> str:
    """The docstring of a method: what its function says, then all that it declares."""
    own = inspect.getdoc(method.function) or ""
    first, _, rest = own.partition("\n\n")
    facts = [("Question:", [method.question]), ("Source:", [_cited(method)]), ("Cost:", [method.cost])]
    facts.append(("Check:", [method.check]))
    parts = [first, "\n".join(_paragraph(f"{name:9} ", text[0]) for name, text in facts)]
    if parameters:
        parts.append("Args:\n" + "\n".join(_paragraph(f"    {p.name}: ", _argument_text(p), 8) for p in parameters))
    if method.columns:
        returns = [_paragraph(f"    `{c.name}`{_axes(c)}: ", _meaning(c), 8) for c in method.columns]
        parts.append("Returns:\n    A `Result`, an `xarray.Dataset`:\n\n" + "\n".join(returns))
    return "\n\n".join([*parts, rest] if rest else parts) + "\n"


def _cited(method: Method) -> str:
    cited = "; ".join(str(source) for source in method.source)
    departs = [source.departs for source in method.source if source.departs != "none"]
    return f"{cited}. Departs: {'; '.join(departs) or 'none'}."


def _paragraph(head: str, text: str, indent: int | None = None) -> str:
    pad = " " * (len(head) if indent is None else indent)
    return textwrap.fill(head + text, WIDTH, subsequent_indent=pad, break_long_words=False, break_on_hyphens=False)


def _argument_text(p: Parameter) -> str:
    """What an argument means, what it may be, and its default."""
    argument = p.argument
    sentence = "" if argument is None else argument.meaning
    if argument is not None and p.type in (int, float):
        unit = f" ({argument.unit})" if argument.unit else ""
        sentence += f"; {limits(argument, whole=p.type is int)}{unit}"
    if words := choices_of(p):
        sentence += f"; {'any' if _several(p) else 'one'} of {', '.join(words)}"
    return sentence if p.default in (MISSING, None) else f"{sentence}; {p.default!r} by default"


def _several(p: Parameter) -> bool:
    return p.type in (tuple, list, Sequence) or get_origin(p.type) in (tuple, list, Sequence) or bool(get_args(p.type))


def _axes(column: Column) -> str:
    dims = (*(column.dims or ()), *column.extra)
    return f" ({', '.join(dims)})" if dims else ""


def _meaning(column: Column) -> str:
    control = f"; {column.control}" if column.control.startswith(NONE) else ""
    control = f"; control: {column.control}" if column.control and not control else ""
    ends = ", with `_lo` and `_hi`" if column.interval and not column.control.startswith(NONE) else ""
    return f"{column.meaning} ({column.unit}{control}){ends}"


def page(methods: Iterable[tuple[Method, str]]) -> str:
    """The text of docs/methods.md: one row per method, each with its command (empty if it has none)."""
    rows: dict[Kind, list[str]] = {kind: [] for kind in HEADINGS}
    for method, command in methods:
        cells = (
            f"`{method.name}`", method.question, f"`{method.call}`", f"`{command}`" if command else "",
            "; ".join(f"*{s.title}*, {s.year}" for s in method.source), _check(method.check), method.cost,
        )  # fmt: skip
        rows[method.kind].append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    parts = [INTRODUCTION]
    for kind, heading in HEADINGS.items():
        if rows[kind]:
            head = "| name | question | call | command | source | check | cost |\n|---|---|---|---|---|---|---|"
            parts.append("\n".join([f"## {heading}\n", head, *rows[kind]]) + "\n")
    return "\n".join(parts)


def _check(check: str) -> str:
    return ", ".join(
        f"`{part.strip()}`" if part.strip().startswith("tests/") else part.strip() for part in check.split(",")
    )


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
