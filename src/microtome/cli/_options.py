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
from microtome.cli._results import Force, Page, Top

if TYPE_CHECKING:
    from microtome.method import Parameter

Seed = Annotated[int, typer.Option(min=0, help="Of every random draw.")]
Budget = Annotated[
    str | None,
    typer.Option(help='Memory limit per run and pass, such as "2 GiB"; chosen from the free memory without it.'),
]
Text = Annotated[Path | None, typer.Option(help="Text, JSONL or Parquet file; the standard library's text without it.")]
Groups = Annotated[
    list[str] | None, typer.Option("--group", help='Group of the text to keep apart, or "*"; repeatable.')
]

_SHARED: dict[str, tuple[Any, Any]] = {
    "seed": (Seed, 0), "budget": (Budget, None), "text": (Text, None), "groups": (Groups, None), "output": (Page, None),
    "force": (Force, False), "top": (Top, 5), "as_json": (Json, False),
    "every": (Annotated[int, typer.Option(min=1, help="Show every so many layers, from the last one down.")], 1),
    "positions": (
        Annotated[str | None, typer.Option(help='Positions to show, such as "-3--1" or "0,4"; all without it.')], None
    ),
}  # fmt: skip


def shared(*names: str) -> list[Slot]:
    """Options that commands share, by name."""
    return [Slot(n, Slot.KEYWORD_ONLY, default=_SHARED[n][1], annotation=_SHARED[n][0]) for n in names]


def signed(call: Callable[..., None], slots: Sequence[Slot]) -> Callable[..., None]:
    """A function that takes these options, as the command line reads them off it."""
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
    meaning = argument.meaning[:1].upper() + argument.meaning[1:] + ("" if argument.meaning.endswith(".") else ".")
    limits: dict[str, Any] = {"min": argument.least, "max": argument.most} if kind in (int, float) else {}
    help_text = meaning.replace("[", "\\[")
    default: Any = p.default
    if p.required or default is None:
        default = None if argument.positional is False or p.optional else Slot.empty
    if argument.positional:
        info: Any = typer.Argument(help=help_text)
    else:
        flag = f"--{(p.name.removesuffix('s') if several else p.name).replace('_', '-')}"
        info = typer.Option(flag, help=help_text + (" Repeatable." if several else ""), **limits)
        default = ... if p.required and not p.optional else default
    if several:
        kind, default = list[kind], None
    elif default is None:
        kind = kind | None
    if words and default not in (None, ..., Slot.empty):
        default = kind(default)
    annotation = Annotated[kind, info]
    empty = default in (..., Slot.empty)
    return Slot(p.name, Slot.KEYWORD_ONLY, default=Slot.empty if empty else default, annotation=annotation)


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
