"""Commands made from declarations: one a question, one a change, and `measure` for any set of measures.

The names of all commands are known without importing a method; a method is imported when its command is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from microtome.catalogue import Entry, likely
from microtome.catalogue import entries as registered
from microtome.cli._early import refuse
from microtome.cli._examples import example
from microtome.cli._examples import shown as shown_example
from microtome.cli._hints import written
from microtome.cli._model import LOADING, Opening, notes, opens, progress, working
from microtome.cli._options import cluster_of, shared, signed, slot_of, values_of
from microtome.cli._results import check_output, shown, write_edits
from microtome.cli._texts import tables_of, text_of
from microtome.context import settings
from microtome.errors import ArgumentError, error

if TYPE_CHECKING:
    from microtome.method import Sketch
    from microtome.model import Model

PANELS = {"question": "Questions about prompts", "change": "Changes of a model", "measure": "Measures of a model"}


LONG = 20
"""Seconds of a plan, from which on it comes with choices."""

CHEAPER = {
    "samples": "fewer --samples", "kinds": "one --kind", "sites": "fewer --site", "controls": "fewer --controls",
    "verify": "a smaller --verify",
}  # fmt: skip
"""By argument of a method: what makes its sweep shorter."""


class MethodGroup(TyperGroup):
    """A group whose commands are those that it is given, and those of the methods of some kinds."""

    kinds: tuple[str, ...] = ("question", "change")
    noun = "command"
    called: ClassVar[Any] = None
    """The command under way, for what errors advise."""

    def entries(self) -> Mapping[str, Entry]:
        """The methods that have a command here, by the name of the command."""
        found: dict[str, Entry] = {}
        for entry in registered().values():
            name = entry.name if "measure" in self.kinds else entry.command
            if name and entry.kind in (*self.kinds, None):
                found[name] = entry
        return found

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, its own first."""
        return [*super().list_commands(ctx), *sorted(self.entries().keys() - self.commands.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name; of a method that is not loaded yet, what the help needs."""
        known = super().get_command(ctx, cmd_name)
        entry = None if known is not None else self.entries().get(cmd_name)
        if entry is None:
            return known
        panel = PANELS.get(entry.kind or "", "Commands")
        help_text = (entry.problem or entry.summary).replace("[", "\\[")
        return TyperCommand(cmd_name, help=help_text, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, made from its method where it is one."""
        if args and self.load(args[0]) is None and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            what = f'no {self.noun} "{args[0]}".{likely(args[0], names)}'.removesuffix(".")
            raise error(ArgumentError, what, allowed=", ".join(names), do="name one of these")
        found = super().resolve_command(ctx, args)
        MethodGroup.called = found[1]
        return found

    def load(self, name: str) -> Any:
        """Make the command of a method; None where there is no such method."""
        entry = None if name in self.commands else self.entries().get(name)
        if entry is not None:
            self.add_command(command_of(name, [entry.name]), name)
        return self.commands.get(name)


class MeasureGroup(MethodGroup):
    """The commands of measures: one, or several with commas between them."""

    kinds = ("measure",)
    noun = "measure"

    def load(self, name: str) -> Any:
        """Make the command of some measures; None where there is none of these names."""
        entries, parts = self.entries(), [part.strip() for part in name.split(",")]
        unknown = [part for part in parts if part not in entries]
        if name in self.commands or len(unknown) == len(parts):
            return self.commands.get(name)
        if unknown:
            other = next((e for e in registered().values() if unknown[0] in (e.name, e.command)), None)
            what = f'no measure "{unknown[0]}".{likely(unknown[0], entries)}'.removesuffix(".")
            do = "name some of these" if other is None else f'it is a {other.kind}: run "microtome {other.command}"'
            raise error(ArgumentError, what, allowed=", ".join(entries), do=do)
        self.add_command(command_of(name, [entries[part].name for part in parts]), name)
        return self.commands[name]


def command_of(name: str, names: Sequence[str]) -> Any:
    """The command of a question, a change, or some measures, made without importing them."""
    from microtome.method import sketch

    made = [sketch(one) for one in names]
    kinds = {"question": _ask, "change": _change}
    other = next((one.method for one in made if one.method.kind != "measure"), None)
    if other is not None and len(made) > 1:
        raise error(ArgumentError, f'"{other.name}" is a {other.kind}, not a measure', do="name measures only")
    call = _measure(made) if other is None else kinds[other.kind](made[0])
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, help=_help(made))(call)
    command: Any = typer.main.get_command(app)
    command.epilog = shown_example(example(name, made[0], written(command)))
    return command


def _help(made: Sequence[Sketch]) -> str:
    parts = [f"{one.method.question}\n\n{one.method.summary}" for one in made] if len(made) < 2 else []
    parts = parts or [f"{one.method.name}: {one.method.question}" for one in made]
    sources = [f"Source: {source}." for one in made for source in one.method.source]
    costs = [f"Cost: {one.method.cost}." for one in made] if len(made) < 2 else []
    return "\n\n".join([*parts, *sources, *costs]).replace("[", "\\[")


def _ask(question: Sketch) -> Callable[..., None]:
    """What the command of a question does."""
    slots = [slot for p in question.parameters if (slot := slot_of(p)) is not None]
    own = {slot.name for slot in slots}
    axes = {d for column in question.method.columns for d in (("layer", "pos") if column.dims is None else column.dims)}
    drawing = {"top", *(("every", "positions") if {"layer", "pos"} <= axes else ())} - own
    slots += shared("seed", "budget", "page", "force", *sorted(drawing), "as_json")

    def call(*, opening: Opening, **given: Any) -> None:
        output, force = given.pop("output"), given.pop("force")
        check_output(output, force, (".html",))
        display, as_json = {name: given.pop(name) for name in drawing}, given.pop("as_json")
        if display.get("positions") is not None:
            from microtome.anatomy import parse_indices

            display["positions"] = parse_indices(display["positions"], "positions")
        refuse(question, values_of(question.parameters, given))
        with _settled(given, opening, [question.method.name]) as (model, (real,)):
            data = real.ask(model, values_of(real.parameters, given))
        shown(data, output, as_json=as_json, **display)

    return opens()(signed(call, slots))


def _change(change: Sketch) -> Callable[..., None]:
    """What the command of a change does: write its edits."""
    slots = [slot for p in change.parameters if (slot := slot_of(p)) is not None]
    slots += shared("seed", "budget", "edits_file", "force", "as_json")

    def call(*, opening: Opening, **given: Any) -> None:
        output, force, as_json = given.pop("output"), given.pop("force"), given.pop("as_json")
        check_output(output, force, (".safetensors",), required="name one with -o")
        refuse(change, values_of(change.parameters, given))
        with _settled(given, opening, [change.method.name]) as (model, (real,)):
            edits = real.make(model, values_of(real.parameters, given))
        write_edits(output, edits, as_json=as_json)

    return opens()(signed(call, slots))


def _measure(measures: Sequence[Sketch]) -> Callable[..., None]:
    """What the command of some measures does."""
    parameters = {p.name: p for one in measures for p in (*one.parameters, *one.look_parameters)}
    slots = [slot for p in parameters.values() if (slot := slot_of(p)) is not None]
    reads, drawing = "text" in parameters, {"top"} - parameters.keys()
    reading = ("texts", "field", "group_by", "groups", "ray", "workers", "threads") if reads else ()
    slots += shared(*reading, "seed", "budget", "page", "force", *drawing, "as_json")
    names = [one.method.name for one in measures]

    def call(*, opening: Opening, **given: Any) -> None:
        output, force, display = given.pop("output"), given.pop("force"), {name: given.pop(name) for name in drawing}
        as_json, groups = given.pop("as_json"), given.pop("groups", None)
        check_output(output, force, (".html",))
        field, column = given.pop("field", "text"), given.pop("group_by", None)
        text, read = text_of(given.pop("texts", None), field, column), partial(tables_of, field=field, group=column)
        cluster = cluster_of(given.pop("ray", None), given.pop("workers", None), given.pop("threads", 1))
        with settings(ray=cluster), _settled(given, opening, names) as (model, _):
            from microtome.method.runner import measure

            options = values_of(list(parameters.values()), given)
            wanted: Any = True if groups == ["*"] or (column and not groups) else groups or False
            data = measure(model, *names, text=read(text), groups=wanted, **options)
        shown(data, output, as_json=as_json, **display)

    return opens()(signed(call, slots))


@contextmanager
def _settled(given: dict[str, Any], opening: Opening, names: Sequence[str]) -> Iterator[tuple[Model, list[Any]]]:
    """The model and the methods of a command, under its settings; plan and progress go to stderr.

    Raises:
        KeyboardInterrupt: a sweep was stopped before its last cell: what it kept is no whole result.
    """
    from microtome.method import declared

    reached: dict[str, tuple[int, int]] = {}
    told: list[None] = []
    with settings(seed=given.pop("seed"), budget=given.pop("budget")):
        opening.check()
        with working(LOADING):
            made: list[Any] = [declared(name) for name in names]
        model = opening.open()
        with progress() as bars:

            def report(stage: str, done: int, everything: int) -> None:
                reached[stage] = (done, everything)
                bars(stage, done, everything)

            def on_plan(plan: Any) -> None:
                notes.print(f"plan: {plan}", markup=False, soft_wrap=True)
                shorter = [CHEAPER[name] for name in CHEAPER if name in given]
                if plan.seconds >= LONG and shorter and not told:
                    told.append(notes.print(f"to make it shorter: {', '.join(shorter)}; Ctrl-C stops it", markup=False))

            with settings(progress=report, on_plan=on_plan):
                yield model, made
    if any(done < everything for done, everything in reached.values()):
        raise KeyboardInterrupt
