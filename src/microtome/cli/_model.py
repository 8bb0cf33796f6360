"""What every command that opens a model shares: its options, and opening."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microtome.errors import ModelUnsupported, error

if TYPE_CHECKING:
    from microtome.run import Model

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Hub id, folder or GGUF file; the default model without it.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, folder or GGUF file; the default model without it.")
]
Device = Annotated[str | None, typer.Option(help="Where to put the model; the accelerator if there is one.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, float64, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead.")]

DTYPES = ("float32", "float64", "bfloat16", "float16")
out = Console(highlight=False)


@dataclass(frozen=True)
class Opening:
    """How to open the model of a command."""

    name: str | None
    device: str | None
    dtype: str
    revision: str | None
    trust: bool

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `microtome.open`."""
        import torch

        if self.dtype not in DTYPES:
            raise error(ModelUnsupported, "unknown --dtype", got=self.dtype, allowed=", ".join(DTYPES), do="choose one")
        return {
            "dtype": getattr(torch, self.dtype),
            "device": self.device,
            "revision": self.revision,
            "trust_remote_code": self.trust,
        }

    def open(self) -> Model:
        """The opened model, its map proven."""
        import microtome as mt

        return mt.open(self.name, **self.arguments())

    def map(self) -> Model:
        """The model with its map unproven."""
        import microtome as mt

        return mt.map(self.name, **self.arguments())


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def progress(context: typer.Context) -> Iterator[Any]:
    """A function (stage, done, all) that draws bars on stderr, with the time left; silent if told, or in a pipe."""
    console = Console(stderr=True)
    if (context.obj or {}).get("quiet") or not console.is_terminal:
        yield lambda stage, done, everything: None
        return
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=False) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, everything: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=everything)
            bars.update(tasks[stage], completed=done, total=everything)

        yield report
