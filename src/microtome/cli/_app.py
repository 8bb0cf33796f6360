"""The application: its commands, what goes to which stream, and how errors leave it.

Results go to stdout, progress to stderr. An error of Microtome's own is one line and the exit code of its class;
anything else is one line too, with a traceback under ``--debug``.

    0  done            3  a model            6  a prompt        9  output
    1  other errors    4  a proof fails      7  an edit        10  data
    2  wrong usage     5  a site             8  memory         70  a defect of Microtome;  130  stopped by Ctrl-C
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console

from microtome.cli import _atlas, _cache, _check, _explain, _run
from microtome.errors import MicrotomeError

app = typer.Typer(
    name="microtome",
    help="See inside transformer language models, change them, and say how sure you are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
errors = Console(stderr=True, highlight=False)
DEFECT, STOPPED = 70, 130
# Typer carries its own copy of click or uses the installed one, by version: the class is the parent of what it exports.
Usage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"microtome {version('microtome')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""
    context.obj = {"debug": debug, "quiet": quiet}


for register in (_check.register, _atlas.register, _explain.register, _run.register, _cache.register):
    register(app)


def _hush() -> None:
    """Silence what libraries say about themselves: stdout belongs to results, stderr to our own words."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def run(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        arguments: those of the command line by default.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    if not debug:
        _hush()
    try:
        code = app(given, standalone_mode=False)
        if code == STOPPED:  # Typer turns Ctrl-C into this code by itself, in silence
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except MicrotomeError as problem:
        if debug:
            raise
        _say(f"microtome: {type(problem).__name__}: {problem}")
        return problem.exit_code
    except Usage as problem:
        problem.show()
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("microtome: stopped; nothing is left half-written.")
        return STOPPED
    except BrokenPipeError:
        return 0
    except Exception as problem:
        if debug:
            raise
        _say(f"microtome: unexpected {type(problem).__name__}: {problem}. To do: run with --debug, and report it.")
        return DEFECT


def _say(text: str) -> None:
    errors.print(text, soft_wrap=True, markup=False)
