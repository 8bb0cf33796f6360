"""`microtome tasks`: prompts with known answers, and how well a model does on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from microtome.cli._examples import shown
from microtome.cli._model import Json, Opening, opens, out, print_json, progress, working
from microtome.errors import PromptError
from microtome.files import PAIRS, whole_file

if TYPE_CHECKING:
    import xarray as xr

    from microtome.model import Model
    from microtome.tasks import Pair, Task

NUMBERS = (
    "accuracy", "accuracy_corrupt", "accuracy_diff", "preferred", "preferred_corrupt", "preferred_diff",
    "mean_difference_clean", "mean_difference_corrupt", "mean_difference_clean_diff",
)  # fmt: skip
EACH = 20
"""Pairs of a task, unless more or fewer are asked for."""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("tasks", epilog=shown("microtome tasks greater_than"))(tasks)


def _way(value: str) -> str:
    if value not in ("one", "first"):
        raise typer.BadParameter(f"got {value!r}; allowed: one, first.")
    return value


@opens()
def tasks(
    name: Annotated[
        str | None, typer.Argument(help="A task, or a .csv or .jsonl file of your own pairs; by default all tasks.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pairs a task; a table of facts may hold fewer.")] = EACH,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing of the pairs.")] = 0,
    answers: Annotated[
        str, typer.Option(callback=_way, help='"one": answers of one token; "first": the first token of each.')
    ] = "one",
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Tasks with known answers: what each asks, an example, and how often the model is right, with intervals."""
    make = _maker(name, n, seed, answers)
    if name is None:
        _list(opening.open(), make, as_json)
    else:
        _show(opening.open(), name, make, as_json)


def _maker(name: str | None, n: int, seed: int, answers: Any) -> Callable[[Model, str], Task]:
    """What builds a task by name, or reads it from a file; refuses a wrong name before a model is opened."""
    from microtome.method import from_source

    if name is not None and Path(name).suffix.lower() in PAIRS:
        whole_file(name, PAIRS, "as pairs")
    elif name is not None:
        from_source("microtome.tasks", "about")(name)

    def make(model: Model, which: str) -> Task:
        from microtome import tasks

        if Path(which).suffix.lower() in PAIRS:
            return tasks.read(which, model, answers=answers)
        return tasks.build(which, model, n, seed=seed, answers=answers, fewer=True)

    return make


def _list(model: Model, make: Callable[[Model, str], Task], as_json: bool) -> None:
    from microtome import tasks

    names, rows = tasks.names(), list[dict[str, Any]]()
    with progress() as report:
        for number, name in enumerate(names):
            report("tasks", number, len(names))
            try:
                task = make(model, name)
            except PromptError as problem:  # of this tokenizer: shown in its row
                rows.append({"name": name, "refused": str(problem)})
                continue
            rows.append(_row(task, task.accuracy(model)) | {"example": _pair(task[0], full=False)})
        report("tasks", len(names), len(names))
    if as_json:
        print_json({"tasks": rows, "provenance": model.provenance})
        return
    table = Table("task, with an example", "pairs", "right", "control", "diff.", "preferred", box=None, pad_edge=False)
    for row in rows:
        if "refused" in row:
            table.add_row(Text(f"{row['name']}\n  {row['refused']}"), "0", "", "", "", "")
        else:
            right, control, _, preferred = _shares(row)
            difference = f"{row['accuracy_diff']:.2f}"  # without its interval, for want of room
            table.add_row(_example(row), str(row["pairs"]), right, control, difference, preferred)
    for column in table.columns[1:]:
        column.no_wrap = True
    out.print(table)
    out.print(
        "right: the likeliest next token is the answer, with a 95 % interval; control: that answer after the corrupt "
        "prompt; diff.: right minus control, in the same pairs; preferred: the answer has the higher logit than "
        "the foil.",
        markup=False,
    )


def _show(model: Model, name: str, make: Callable[[Model, str], Task], as_json: bool) -> None:
    with working("running the pairs"):
        task = make(model, name)
        data = task.accuracy(model)
    words, gaps = data["predicted_clean"].values.tolist(), data["difference_clean"].values.tolist()
    if as_json:
        pairs = [
            _pair(p, full=True) | {"predicted": s, "difference": d} for p, s, d in zip(task, words, gaps, strict=True)
        ]
        print_json(_row(task, data) | {"made": dict(task.attrs), "pairs": pairs, "provenance": model.provenance})
        return
    table = Table(r"prompt, \[clean → corrupt]", "answer", "foil", "predicted", "logits", box=None, pad_edge=False)
    for pair, word, gap in zip(task, words, gaps, strict=True):
        texts = (_short(pair.answer, 24), _short(pair.foil, 24), word)
        style = "" if word in pair.answer.split("|") else "dim"
        table.add_row(_both(pair), *(Text(_line(t), style=style) for t in texts), f"{gap:+.2f}")
    for column in table.columns[1:]:
        column.no_wrap = True
    out.print(table)
    row = _row(task, data)
    right, control, difference, preferred = _shares(row)
    low, high = row["mean_difference_clean_lo"], row["mean_difference_clean_hi"]
    ends = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    out.print(
        f"{task.name}: {task.about}. Of {len(task)} pairs {right} right, {control} after the corrupt prompt "
        f"(difference {difference}), "
        f"{preferred} preferred to the foil, by {row['mean_difference_clean']:+.2f}{ends} logits; "
        f"after the corrupt prompt {row['mean_difference_corrupt']:+.2f}.",
        markup=False,
    )


def _row(task: Task, data: xr.Dataset) -> dict[str, Any]:
    numbers = {n + e: float(data[n + e]) for n in NUMBERS for e in ("", "_lo", "_hi")}
    return {"name": task.name, "about": task.about, "pairs": len(task)} | numbers


def _pair(pair: Pair, *, full: bool) -> dict[str, Any]:
    if full:
        return asdict(pair)
    return {n: getattr(pair, n) for n in ("clean", "corrupt", "answer", "foil")}


def _shares(row: dict[str, Any]) -> tuple[str, str, str, str]:
    both = ("accuracy", "accuracy_diff")
    right, difference = (f"{row[n]:.2f} [{row[f'{n}_lo']:.2f}, {row[f'{n}_hi']:.2f}]" for n in both)
    return right, f"{row['accuracy_corrupt']:.2f}", difference, f"{row['preferred']:.2f}"


def _example(row: dict[str, Any]) -> Text:
    """The name of a task, and under it the end of a clean prompt with its answer."""
    pair = row["example"]
    clean, answer = _line(pair["clean"]), _line(pair["answer"].split("|")[0])
    shown = clean if len(clean) <= 60 else "…" + clean[-59:]
    return Text.assemble(row["name"], "\n  ", (shown, "dim"), (answer, "bold"))


def _both(pair: Pair) -> Text:
    """The clean prompt with, in brackets, the stretch of words that the corrupt one has otherwise."""
    clean, corrupt = (p.replace("\n", " ⏎ ").split(" ") for p in (pair.clean, pair.corrupt))
    before = _shared(clean, corrupt)
    after = _shared(clean[before:][::-1], corrupt[before:][::-1])
    end, its_end = len(clean) - after, len(corrupt) - after
    changed = f"[{' '.join(clean[before:end])} → {' '.join(corrupt[before:its_end])}]"
    text = Text(" ".join([*clean[:before], changed, *clean[end:]]))
    text.highlight_words([changed], "bold")
    return text


def _shared(one: list[str], other: list[str]) -> int:
    """How many words two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _line(text: str) -> str:
    return text.replace("\n", "⏎")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
