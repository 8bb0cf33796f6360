"""What a method declares, once: its arguments, its columns, its source, and the test that verifies it.

Everything that surrounds a method is made from these values: the checks of its arguments, its command with options and
help, units and meanings in datasets and tables, its place on the pages, and its row in docs/methods.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from microtome.anatomy import SITES
from microtome.errors import DeclarationError, error
from microtome.shown import brief, shown

Kind = Literal["measure", "question", "change"]
Unit = Literal["model", "layer", "head", "neuron", "expert_neuron"]
T = TypeVar("T")

DIMS: dict[str, tuple[str, ...]] = {
    "model": (), "layer": ("layer",), "head": ("layer", "head"), "neuron": ("layer", "neuron"),
    "expert_neuron": ("layer", "expert", "neuron"),
}  # fmt: skip
"""The axes of a column of each unit."""

NONE = "none: "
"""How a control begins that is no column, but the reason why there is none."""

DIFFERENCE = "diff"
"""Ending of the variable that is a column minus its control; it has an interval and a p-value of its own."""

SUFFIXES = ("lo", "hi", "p", "each", "exact", DIFFERENCE)
"""Endings of the variables that belong to a column: ends of its interval, p-value, examples, exact measurement, and
difference from its control."""

_NAME = re.compile(r"[a-z][a-z0-9_.]*(\[[a-z]+\])?")
_DYNAMIC = re.compile(r"<[a-z]+>")


@shown
@dataclass(frozen=True)
class Argument:
    """What an argument of a method is; written once, as a part of its annotation.

    >>> window: Annotated[int, Argument("layers restored at once", "layers", least=1)] = 10

    Attributes:
        meaning: what it means, shown in the help of the command and in the documentation.
        unit: of the value, such as "tokens" or "layers".
        least, most: limits of a number, both allowed.
        choices: the words that are allowed.
        from_text: how a command reads it from text, where text is not the value itself.
        positional: whether the command takes it by position, without an option.
        command: whether the command takes it at all.
    """

    meaning: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    from_text: Callable[[str], Any] | None = None
    positional: bool = False
    command: bool = True


@shown
@dataclass(frozen=True)
class Source:
    """Where a method comes from.

    Attributes:
        authors, title, year: of the paper.
        arxiv: its id there, if it has one.
        where: equation or section.
        departs: in what the method differs from it, and why; "none" where it does not.
    """

    authors: str
    title: str
    year: int
    arxiv: str | None = None
    where: str = ""
    departs: str = "none"

    def __str__(self) -> str:
        place = f" (arXiv {self.arxiv})" if self.arxiv else ""
        section = f", {self.where}" if self.where else ""
        return f'{self.authors}, "{self.title}", {self.year}{place}{section}'


@shown
@dataclass(frozen=True)
class Column:
    """One quantity that a method returns.

    Attributes:
        name: of the variable; ``<site>`` stands for one variable per name that the method chooses when it runs.
        unit: "share", "nats", "logits", "cosine", ...; a quantity without one says "1".
        meaning: in a sentence.
        control: the column to compare this one with, or "none: " and the reason.
        range: the smallest and the largest possible value, None where there is no limit.
        dims: its axes where they are not those of the measure's unit; of a question, its axes.
        extra: axes behind those, such as ("rank",).
        bins: the edges of the bins along its last axis, where that is one of bins.
        interval: whether it is a mean over examples, with ends of its 95 % interval.
        test: whether a sign-flip p-value belongs to it too.
        shade: for a text column, the numeric column that colours it.
        drawn: whether a result draws it; the variable exists in any case.
        title, chart, log: how pages draw it: its heading, the chart that it shares with others, a logarithmic axis.
    """

    name: str
    unit: str
    meaning: str
    control: str = ""
    range: tuple[float | None, float | None] = (None, None)
    dims: tuple[str, ...] | None = None
    extra: tuple[str, ...] = ()
    bins: tuple[float, ...] = ()
    interval: bool = True
    test: bool = False
    shade: str = ""
    drawn: bool = True
    title: str = ""
    chart: str = ""
    log: bool = False

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes of its variable in a dataset, as files take them: an open end of a range is infinite."""
        attributes: dict[str, Any] = {"unit": self.unit, "meaning": self.meaning}
        low, high = self.range
        if (low, high) != (None, None):
            attributes["range"] = [-math.inf if low is None else low, math.inf if high is None else high]
        attributes["control"] = "" if self.control.startswith(NONE) else self.control
        shown = {"shade": self.shade, "title": self.title, "chart": self.chart, "log": self.log}
        shown |= {"bins": list(self.bins)}
        return (
            attributes
            | {name: value for name, value in shown.items() if value}
            | ({} if self.drawn else {"drawn": False})
        )

    def holds(self, name: str) -> bool:
        """Whether a variable of this name is one of the column's."""
        return name == self.name or bool(_DYNAMIC.fullmatch(self.name))


NEEDS = {
    "sum": "a stream that is the sum of what branches write",
    "heads": "the heads of every layer that attends",
    "attention and MLP": "attention and an MLP as the branches of every layer",
    "lens": "a stream that can be read as logits",
    "next token": "a model that predicts the next token",
}
"""What a question may need of a model besides sites."""
WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out", "attn_norm", "mlp_norm")
"""What may be needed of the weights of a layer."""


@shown
@dataclass(frozen=True, eq=False)
class Method:
    """A method as it was declared.

    Attributes:
        name: what it is called by, in calls and as a command.
        kind: "measure" of a model, "question" about prompts, "change" of a model.
        question: what it answers, as a question.
        summary: the first line of its docstring.
        arguments: by name.
        columns: what it returns; a change returns edits instead.
        source: the papers.
        cost: forwards, backwards and memory as a formula.
        check: the tests that verify it.
        call: how to write it, on the default model.
        command: its name on the command line, if it has one.
        of: what a measure describes.
        atlas: whether the atlas runs it: True in all its profiles, "default" or "full" from that one on.
        title: what results and pages call it.
        function: what computes it.
        sites: the sites that a measure sees.
        optional: those that it sees where the model has them.
        needs: what it needs of a model besides: sites in some layer, or of a question in every one ("*.attn.q");
            weights (of a question in every layer), or what `NEEDS` names.
        home: the module that declares it.
    """

    name: str
    kind: Kind
    question: str
    summary: str
    columns: tuple[Column, ...]
    source: tuple[Source, ...]
    cost: str
    check: str
    function: Callable[..., Any]
    call: str = ""
    command: str = ""
    of: Unit | None = None
    atlas: bool | Literal["default", "full"] = False
    title: str = ""
    arguments: Mapping[str, Argument] = field(default_factory=dict[str, Argument])
    sites: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def _facts(self) -> dict[str, str]:
        """What it answers, how to call it, and what it returns."""
        return {
            "name": brief(self.name),
            "kind": self.kind + (f" of {self.of}" if self.of else ""),
            "question": brief(self.question),
            "call": self.call,
            "arguments": ", ".join(self.arguments),
            "columns": ", ".join(column.name for column in self.columns),
            "source": brief("; ".join(map(str, self.source))),
            "check": self.check,
        }

    @property
    def home(self) -> str:
        """The module that declares it."""
        return self.function.__module__

    def column(self, name: str) -> Column | None:
        """The column that a variable is of, or None: exact names first, then those chosen at run time."""
        exact = [column for column in self.columns if column.name == name]
        return next(iter(exact or [column for column in self.columns if column.holds(name)]), None)


def validate(method: Method) -> None:
    """Refuse a declaration that lacks something or contradicts itself.

    Raises:
        DeclarationError: in one line: what is missing or wrong, of which method.
    """
    of = f'the {method.kind} "{method.name}"'
    if not re.fullmatch(r"[a-z][a-z0-9_]*", method.name):
        raise _wrong(of, "needs a name of small letters, digits and _", method.name)
    missing = [name for name in ("question", "summary", "source", "cost", "check") if not getattr(method, name)]
    if method.kind != "change" and not method.columns:
        missing.append("columns")
    if missing:
        raise _wrong(of, f"lacks {' and '.join(missing)}")
    if method.kind == "measure" and method.of not in DIMS:
        raise _wrong(of, "is of no unit", repr(method.of), allowed=", ".join(DIMS))
    if not any(part.strip().endswith(".py") for part in method.check.split(",")):
        raise _wrong(of, "names no test that proves it", method.check, do="name the file of a test, ending in .py")
    for source in method.source:
        _validate_source(of, source)
    _validate_columns(of, method)
    for name in (*method.sites, *method.optional):
        if name not in SITES:
            raise _wrong(of, f'names the site "{name}", which does not exist', allowed=", ".join(SITES))
    for name in method.needs:
        if name.removeprefix("*.") not in (*SITES, *NEEDS, *WEIGHTS):
            raise _wrong(of, f'needs "{name}", which is no site', allowed=", ".join((*NEEDS, *WEIGHTS, *SITES)))
    for name, argument in method.arguments.items():
        if not argument.meaning:
            raise _wrong(of, f'has an argument "{name}" without a meaning')


def _validate_source(of: str, source: object) -> None:
    if not isinstance(source, Source):
        raise _wrong(of, "has a source that is not a Source", repr(source), do="write Source(authors, title, year)")
    missing = [name for name in ("authors", "title", "year") if not getattr(source, name)]
    if missing:
        raise _wrong(of, f"has a source without {' and '.join(missing)}")


def _validate_columns(of: str, method: Method) -> None:
    for given in cast("tuple[object, ...]", method.columns):
        if not isinstance(given, Column):
            raise _wrong(of, "has a column that is not a Column", repr(given), do="write Column(name, unit, meaning)")
    names = [column.name for column in method.columns]
    for column in method.columns:
        what = f'has a column "{column.name}"'
        if not (_NAME.fullmatch(column.name) or _DYNAMIC.fullmatch(column.name)):
            raise _wrong(of, f"{what} whose name is not small letters, digits, _ and .")
        if column.name.rpartition("_")[2] in SUFFIXES:
            raise _wrong(
                of, f"{what}, whose ending belongs to intervals", allowed="names without " + ", ".join(SUFFIXES)
            )
        if names.count(column.name) > 1:
            raise _wrong(of, f"{what} twice")
        for part in ("unit", "meaning"):
            if not getattr(column, part):
                raise _wrong(of, f"{what} without a {part}")
        serves = any(other.control == column.name for other in method.columns)
        if not column.control and not serves:
            raise _wrong(of, f"{what} without a control", do=f'name a column, or write "{NONE}" and the reason')
        _validate_links(of, column, names)
        if method.kind == "question" and column.dims is None and not _DYNAMIC.fullmatch(column.name):
            raise _wrong(of, f"{what} without dims")


def _validate_links(of: str, column: Column, names: list[str]) -> None:
    """Refuse a column whose control, colour or range cannot be."""
    what = f'has a column "{column.name}"'
    if column.control == column.name:
        raise _wrong(of, f"{what} that is its own control", do=f'name another, or write "{NONE}" and the reason')
    if column.control and not column.control.startswith(NONE) and column.control not in names:
        raise _wrong(of, f'{what} whose control "{column.control}" is not one of its columns', allowed=", ".join(names))
    if column.shade and column.shade not in names:
        raise _wrong(of, f'{what} whose shade "{column.shade}" is not one of its columns', allowed=", ".join(names))
    low, high = column.range
    if low is not None and high is not None and low > high:
        raise _wrong(of, f"{what} whose range ends below its beginning", f"{low:g} to {high:g}")


def called(name: str, *, groups: bool) -> str:
    """How a measure is called; one that compares groups is given several texts."""
    text = ', text={"one": "one.txt", "two": "two.txt"}' if groups else ""
    return f'mt.measure(model, "{name}"{text})'


def several(given: Any, kind: type[T]) -> tuple[T, ...]:
    """What was given as one value of a kind or as several of them; what is neither stays alone, to be refused."""
    if isinstance(given, kind | str) or not isinstance(given, Iterable):
        return (cast("T", given),)
    return tuple(cast("Iterable[T]", given))


def _wrong(of: str, what: str, got: object = None, *, allowed: str | None = None, do: str | None = None) -> Exception:
    return error(DeclarationError, f"{of} {what}", got=got, allowed=allowed, do=do or "complete its declaration")
