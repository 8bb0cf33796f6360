"""Options of commands, made from the arguments that methods declare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from inspect import Parameter as Slot
from inspect import Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from microtome.cli._model import Json, Opening
from microtome.cli._results import EditsFile, Force, Page, Top
from microtome.cluster import Cluster
from microtome.errors import DeclarationError, error

if TYPE_CHECKING:
    from microtome.method import Parameter

Seed = Annotated[int, typer.Option(min=0, help="Seed of every random draw.")]
Budget = Annotated[
    str | None,
    typer.Option(help='Memory limit per run and pass, such as "2 GiB"; by default chosen from the free memory.'),
]
Text = Annotated[
    Path | None,
    typer.Option(help="Text, JSONL, Parquet or CSV file, or a folder; by default the standard library's text."),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="Text, JSONL, Parquet or CSV file, or a folder of these, whose folders are groups; by default the "
        "standard library's text. Repeatable: each file is a group.",
    ),
]
Field = Annotated[str, typer.Option(help="Key or column with the text, of tables.")]
GroupBy = Annotated[str | None, typer.Option(help="Key or column with the group of each document, of tables.")]
Ray = Annotated[
    str | None, typer.Option(help='Ray cluster to work on: "auto" for that of this machine, or HOST:PORT of its head.')
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Workers on the cluster; by default one for each GPU, or else each --threads.")
]
Threads = Annotated[int, typer.Option(min=1, help="CPUs of each worker on the cluster.")]
Groups = Annotated[
    list[str] | None,
    typer.Option("--group", help='Group of the text to report separately, or "*" for all; repeatable.'),
]

_SHARED: dict[str, tuple[Any, Any]] = {
    "seed": (Seed, 0), "budget": (Budget, None), "texts": (Texts, None), "groups": (Groups, None), "page": (Page, None),
    "field": (Field, "text"), "group_by": (GroupBy, None), "ray": (Ray, None), "workers": (Workers, None),
    "threads": (Threads, 1),
    "edits_file": (EditsFile, None), "force": (Force, False), "top": (Top, None), "as_json": (Json, False),
    "every": (Annotated[int, typer.Option(min=1, help="Show every n-th layer, counting down from the last.")], 1),
    "positions": (
        Annotated[str | None, typer.Option(help='Positions to show, such as "-3--1" or "0,4"; by default all.')], None
    ),
}  # fmt: skip


def cluster_of(ray: str | None, workers: int | None, threads: int) -> Cluster | None:
    """The Ray cluster that options name, for settings; None where they name none."""
    return None if ray is None else Cluster(ray, workers, threads)


LONGEST = 30
"""Letters of the words that an option allows, beyond which they stand in its help and not in its head."""


def shared(*names: str) -> list[Slot]:
    """Options that commands share, by name; what is written goes by the name `output`, whatever it is."""
    keys = {"page": "output", "edits_file": "output"}
    return [Slot(keys.get(n, n), Slot.KEYWORD_ONLY, default=_SHARED[n][1], annotation=_SHARED[n][0]) for n in names]


def signed(call: Callable[..., None], slots: Sequence[Slot]) -> Callable[..., None]:
    """A function that takes these options, as the command line reads them off it.

    Raises:
        DeclarationError: a method has an argument that is called as an option which its command has anyway.
    """
    names = [slot.name for slot in slots]
    taken = next((name for name in names if names.count(name) > 1 or name in Opening.__dataclass_fields__), None)
    if taken is not None:
        what = f'an argument is called "{taken}", which is an option of every command'
        raise error(DeclarationError, what, do="rename the argument, or declare it with command=False")
    opening = Slot("opening", Slot.KEYWORD_ONLY, annotation=Opening)
    vars(call)["__signature__"] = Signature([*slots, opening])
    return call


def slot_of(p: Parameter) -> Slot | None:
    """The option, or the positional argument, of a method's parameter; None where no command line can take it."""
    from microtome.method import choices_of

    argument = p.argument
    if argument is None or not argument.command:
        return None
    kind: Any
    kind, several = _plain(p)
    words = choices_of(p)
    if words:
        kind = StrEnum(p.name, {word: word for word in words})
    # What Typer shows and passes as the default; None where it leaves the default to the method.
    default = kind(p.default) if words and p.default in words else p.default if type(p.default) is kind else None
    default = None if several else default
    info: dict[str, Any] = {"help": _help(p, words, several=several, shown=default is not None)}
    info |= {"min": argument.least, "max": argument.most} if kind in (int, float) else {}
    if len("|".join(words)) > LONGEST:
        info["metavar"] = _singular(p.name, several).upper()
    required = p.required and not p.optional
    kind = list[kind] if several else kind
    kind = kind if required or default is not None else kind | None
    annotation = typer.Argument(**info) if argument.positional else typer.Option(_flag(p, kind, several), **info)
    given = Slot.empty if required else default
    return Slot(p.name, Slot.KEYWORD_ONLY, default=given, annotation=Annotated[kind, annotation])


def _help(p: Parameter, words: Sequence[str], *, several: bool, shown: bool) -> str:
    """The help of an option: its meaning, the words it allows if they are long, and a default Typer does not show."""
    assert p.argument is not None
    meaning = p.argument.meaning.removesuffix(".")
    first = meaning.split()[0]
    parts = [meaning if first in words else meaning[:1].upper() + meaning[1:]]
    if len("|".join(words)) > LONGEST:
        parts.append(f"{'Any' if several else 'One'} of: {' '.join(words)}")
    if several:
        parts.append("Repeatable")
    if not shown and not p.required and p.default not in (None, (), False):
        default = p.default if isinstance(p.default, tuple | list) else (p.default,)
        parts[-1] += f"; by default: {' '.join(map(str, default))}"
    return (". ".join(parts) + ".").replace("[", "\\[")


def _singular(name: str, several: bool) -> str:
    return name.removesuffix("s") if several else name


def _flag(p: Parameter, kind: Any, several: bool) -> str:
    """How an option is written; one that is on by default can be turned off."""
    name = _singular(p.name, several).replace("_", "-")
    return f"--{name}/--no-{name}" if kind is bool and p.default is True else f"--{name}"


def _plain(p: Parameter) -> tuple[Any, bool]:
    """The type of one value as the command line reads it, and whether there may be several."""
    several = get_origin(p.type) in (tuple, list, Sequence)
    kind = next(iter(get_args(p.type)), str) if several else p.type
    return (kind if kind in (int, float, bool, Path) else str), several


def values_of(parameters: Sequence[Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a method from the options of its command; those that were not given keep their defaults."""
    found: dict[str, Any] = {}
    for p in parameters:
        if p.name not in given or given[p.name] is None or given[p.name] == []:
            continue
        value, read = given[p.name], None if p.argument is None else p.argument.from_text
        if isinstance(value, list):
            found[p.name] = tuple(_one(v, read) for v in value)
        else:
            found[p.name] = _one(value, read)
    return found


def _one(value: Any, read: Callable[[str], Any] | None) -> Any:
    value = value.value if isinstance(value, StrEnum) else value
    return value if read is None or not isinstance(value, str) else read(value)
