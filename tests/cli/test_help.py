"""What the help and the documentation say of the commands is what the commands are."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from microtome import errors
from microtome.cli import _app

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, by the words that call it."""
    held = getattr(command, "commands", None)
    if held is None:
        yield path, command
    for name, inner in (held or {}).items():
        yield from commands(inner, (*path, name))


ALL = dict(commands(get_command(_app.app)))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_shows_its_brackets(path: tuple[str, ...], cli: Callable[..., Any]) -> None:
    shown = re.sub(r"[\s│]+", "", cli(*path, "--help").out)
    assert f"Usage:microtome{''.join(path)}" in shown
    texts = [ALL[path].help, *(getattr(p, "help", None) for p in ALL[path].params)]
    for written in re.findall(r"\[[^\]]*\]", " ".join(filter(None, texts))):
        assert re.sub(r"\s+", "", written) in shown


def test_sites_by_head_are_told_with_their_brackets(cli: Callable[..., Any]) -> None:
    assert '"[head]"' in re.sub(r"[\s│]+", "", cli("patch", "--help").out)


def test_the_table_of_commands_is_complete() -> None:
    table = DOCS.read_text().split("| command |")[1].split("\n\n")[0]
    rows = ["".join(re.findall(r"`microtome [^`]*`", line.replace("\\|", "/"))) for line in table.splitlines()[2:]]
    told = re.findall(r"`microtome ([^`]*)`", " ".join(rows))
    for path, command in ALL.items():
        mine = [text for text in told if text.split()[: len(path)] == list(path)]
        assert len(mine) == 1, f"{path} has {len(mine)} rows in docs/cli.md"
        options = {o for p in command.params for o in p.opts}
        assert set(re.findall(r"(?<!\S)\[?(--?[a-z]+)", mine[0])) <= options
    assert len(told) == len(ALL)


def test_the_table_of_exit_codes_is_complete() -> None:
    told = [int(code) for code in re.findall(r"^\| (\d+) \|", DOCS.read_text(), flags=re.MULTILINE)]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.MicrotomeError)}
    assert told == sorted({0, 2, _app.DEFECT, _app.STOPPED, _app.ENDED} | codes)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "microtome", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("microtome ")
