"""The application: its commands, what goes to which stream, and how errors leave it.

Results go to stdout, progress to stderr. An error of Microtome's own is one line and the exit code of its class;
anything else is one line too; ``--debug`` puts the traceback before it.

    0  done            3  a model            6  a prompt        9  output
    1  other errors    4  a proof fails      7  an edit        10  data
    2  wrong usage     5  a site             8  memory         70  a defect of Microtome
                                                              130  stopped by Ctrl-C;  143  ended by SIGTERM
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from microtome.cli import (
    _atlas,
    _cache,
    _check,
    _commit,
    _compare,
    _export,
    _fit_lens,
    _harvest,
    _model,
    _run,
    _sql,
    _tasks,
)
from microtome.cli._examples import shown
from microtome.cli._hints import in_words_of
from microtome.cli._methods import MeasureGroup, MethodGroup
from microtome.context import settings
from microtome.errors import BudgetError, MicrotomeError, MicrotomeWarning, OutputError, error

app = typer.Typer(
    name="microtome",
    cls=MethodGroup,
    help="See inside transformer language models, change them, and quantify the uncertainty.",
    epilog=shown('microtome lens "The capital of France is"'),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
errors = Console(stderr=True, highlight=False)
DEFECT, STOPPED, ENDED = 70, 130, 143
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# Typer carries its own copy of click or uses the installed one, by version: the class is the parent of what it exports.
Usage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"microtome {version('microtome')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """These options may stand before or after the command."""
    _model.notes.quiet = quiet


COMMANDS = (_check, _atlas, _sql, _compare, _harvest, _fit_lens, _run, _commit, _export, _tasks, _cache)
for command in COMMANDS:
    command.register(app)
app.add_typer(
    typer.Typer(cls=MeasureGroup, no_args_is_help=True),
    name="measure",
    epilog=shown("microtome measure induction,firing"),
    help="Measure a model: one measure, or several with commas between them, in as few passes as possible.",
)  # fmt: skip


def run(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        arguments: those of the command line by default.
    """
    MethodGroup.called = None
    given = _global_options_first(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given[: given.index("--") if "--" in given else None]
    if not debug:
        _hush()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (to the very end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a token still shows the others
    try:
        with _ended_by_signal(), settings(progress=False):  # commands draw bars of their own
            code = app(given, prog_name="microtome", standalone_mode=False)
            sys.stdout.flush()
        if code == STOPPED:  # Typer turns Ctrl-C into this code by itself, in silence
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except Usage as problem:
        problem.show()
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("microtome: stopped; nothing is left half-written.")
        return STOPPED
    except SystemExit as ended:
        if ended.code != 1:
            raise
        return 0  # Typer's way to end when whoever reads has seen enough
    except Exception as problem:  # noqa: BLE001 (the last resort of the application)
        if debug:
            traceback.print_exc()
        return _tell(_translated(problem))


def _global_options_first(given: list[str]) -> list[str]:
    """Arguments with the options of the application before the command, wherever they were written."""
    end = given.index("--") if "--" in given else len(given)
    anywhere = ("--debug", "--quiet", "-q")
    return [a for a in given[:end] if a in anywhere] + [a for a in given[:end] if a not in anywhere] + given[end:]


def _hush() -> None:
    """Silence what libraries say about themselves: stdout belongs to results, stderr to our own words."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=MicrotomeWarning)
    warnings.showwarning = _note


def _note(message: Warning | str, *where: Any, **more: Any) -> None:
    """Our own warnings on stderr, without the place in the code."""
    _say(f"microtome: note: {message}")


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let a request to end unwind as Ctrl-C does, so that nothing is left half-written."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(ENDED)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: whoever runs it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _translated(problem: Exception) -> Exception:
    """What the machine, and not Microtome, could not do, as an error of our own."""
    text = str(problem)
    if isinstance(problem, MemoryError) or "OutOfMemory" in type(problem).__name__ or "can't allocate memory" in text:
        do = "use a smaller model, prompt or --dtype, or a machine with more"
        return error(BudgetError, "there is not enough memory", got=text.splitlines()[0] if text else None, do=do)
    if isinstance(problem, OSError) and problem.errno in FULL:
        _drop_stdout()
        return error(OutputError, "cannot write", got=text, do="free some space, or write elsewhere")
    return problem


def _tell(problem: Exception) -> int:
    text = in_words_of(problem, MethodGroup.called) if isinstance(problem, MicrotomeError) else str(problem)
    text = " ".join(text.split("\n")).strip()
    if isinstance(problem, MicrotomeError):
        _say(f"microtome: {type(problem).__name__}: {text}")
        return problem.exit_code
    _say(f"microtome: unexpected {type(problem).__name__}: {text}. To do: run with --debug, and report it.")
    return DEFECT


def _drop_stdout() -> None:
    """Send what is still to be written nowhere, so that Python does not fail again at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _say(text: str) -> None:
    errors.print(text, soft_wrap=True, markup=False)
