"""What every command that opens a model shares: its options, opening, and progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from microtome.errors import nearest
from microtome.progress import Bars

if TYPE_CHECKING:
    from microtome.model import Model

DTYPES = ("float32", "float64", "bfloat16", "float16")
out = Console(highlight=False)
notes = Console(stderr=True, highlight=False)  # progress: silent under --quiet, and where stderr is no terminal


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"got {value!r}; allowed: {', '.join(DTYPES)}.{nearest(value, list(DTYPES))}")
    return value


LOADING = "loading PyTorch and transformers"
"""What a command does first, for seconds."""

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Hub id, folder or GGUF file; if left out, the default model.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, folder or GGUF file; if left out, the default model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for scripts.")]


_OPENING: dict[str, tuple[Any, Any]] = {
    "model": (ModelOption, None),
    "device": (
        Annotated[
            str | None, typer.Option(help="Where to put the model; by default the accelerator, if there is one.")
        ],
        None,
    ),
    "dtype": (
        Annotated[
            str, typer.Option(callback=_dtype, help="Type of the weights: float32, float64, bfloat16 or float16.")
        ],
        "float32",
    ),
    "revision": (Annotated[str | None, typer.Option(help="Revision of a hub model.")], None),
    "trust": (
        Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model to run.")],
        False,
    ),
}
"""By field of `Opening`: the option, and its default."""


@dataclass(frozen=True)
class Opening:
    """How to open the model of a command."""

    model: str | None
    device: str | None
    dtype: str
    revision: str | None
    trust: bool

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `microtome.open`."""
        import torch

        return {
            "dtype": getattr(torch, self.dtype),
            "device": self.device,
            "revision": self.revision,
            "trust_remote_code": self.trust,
        }

    def check(self) -> None:
        """Refuse a model that is not there, before anything is loaded.

        Raises:
            ModelNotFound: it is named by a path of no model.
        """
        if self.model is not None:
            from microtome.anatomy import place_of

            place_of(self.model, self.revision)

    def open(self, *, prove: bool = True) -> Model:
        """The opened model, its map proven unless `prove` is False."""
        import microtome as mt
        from microtome.anatomy import DEFAULT_NAME

        self.check()
        with working(LOADING) as say:
            opened = mt.open
            say(f"opening {self.model or DEFAULT_NAME}")
            return opened(self.model, prove=prove, **self.arguments())


def opens(model: Any = ModelOption) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that open a model, in place of its parameter `opening`.

    Args:
        model: how the model is named, `ModelOption` or `ModelArgument`.
    """

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "opening"]
        kinds = {name: (model if name == "model" else kind, default) for name, (kind, default) in _OPENING.items()}
        added = [Parameter(n, Parameter.KEYWORD_ONLY, default=d, annotation=kind) for n, (kind, d) in kinds.items()]

        @wraps(command)
        def call(**given: Any) -> None:
            opening = Opening(**{name: given.pop(name) for name in kinds})
            command(**given, opening=opening)

        # What the command line is made of: all parameters by name, those of the model last.
        asked = [*(p.replace(kind=Parameter.KEYWORD_ONLY) for p in own), *added]
        vars(call).update(__signature__=Signature(asked), __annotations__={p.name: p.annotation for p in asked})
        return call

    return give


def print_json(value: Any) -> None:
    """One line of compact JSON on stdout; numbers that JSON does not have become null."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Say on a terminal's stderr what is being done, until it is done; gives what says the next thing."""
    if notes.quiet or not notes.is_terminal:
        yield lambda text: None
        return
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    spinner = Spinner("dots", Text(text), style="status.spinner")
    with Live(spinner, console=notes, refresh_per_second=12.5, transient=True) as live:
        live.refresh()  # now: what follows may leave the thread that draws it no time for seconds
        yield lambda text: spinner.update(text=Text(text))


@contextmanager
def progress() -> Iterator[Any]:
    """A function (stage, done, all) that draws bars on stderr, with the time left; silent if told, or in a pipe."""
    if notes.quiet or not notes.is_terminal:
        yield lambda stage, done, everything: None
        return
    bars = Bars(notes)
    try:
        yield bars.report
    finally:
        bars.close()
