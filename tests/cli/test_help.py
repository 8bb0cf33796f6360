"""What the help and the documentation say of the commands is what the commands are."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import microtome as mt
from microtome import errors
from microtome.cli import _app

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, by the words that call it; those of methods are made from their methods."""
    if not hasattr(command, "list_commands"):
        yield path, command
        return
    for name in command.list_commands(None):
        made = command.load(name) if hasattr(command, "load") else None
        yield from commands(made or command.commands[name], (*path, name))


ALL = dict(commands(get_command(_app.app)))
MEASURES = [path for path in ALL if path[0] == "measure"]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_shows_its_brackets(path: tuple[str, ...], cli: Callable[..., Any]) -> None:
    shown = re.sub(r"[\s│]+", "", cli(*path, "--help").out)
    assert f"Usage:microtome{''.join(path)}" in shown
    texts = [ALL[path].help, *(getattr(p, "help", None) for p in ALL[path].params)]
    for written in re.findall(r"\[[^\]]*\]", " ".join(filter(None, texts))):
        assert re.sub(r"\s+", "", written) in shown


@pytest.mark.parametrize("path", [(), ("measure",), *ALL], ids=" ".join)
def test_every_help_shows_an_example_that_the_command_takes(path: tuple[str, ...], cli: Callable[..., Any]) -> None:
    shown = " ".join(cli(*path, "--help").out.split())
    (words,) = (shlex.split(told) for told in re.findall(r"Example: (microtome .*)$", shown))
    assert words[: 1 + len(path)] == ["microtome", *path]
    if path in ALL:
        context = ALL[path].make_context(path[-1], words[1 + len(path) :])  # parsed, not run
        assert {p.name for p in ALL[path].params if p.required} <= {
            n for n, x in context.params.items() if x is not None
        }
    kept = next((m for m in mt.methods().values() if m.command and m.command == " ".join(path)), None)
    for text in re.findall(r'"([^"]*)"', "" if kept is None else kept.call):
        assert text in words, "the example of the command is the call of the method"


def test_long_choices_and_defaults_are_told_with_their_brackets(cli: Callable[..., Any]) -> None:
    shown = re.sub(r"[\s│]+", "", cli("patch", "--help").out)
    assert "attn.pattern[head]mlp.post[neuron]" in shown
    assert "bydefault:resid_preattn_outmixer_outmlp_outattn.z[head]" in shown
    assert "Source:Mengetal." in shown
    assert "Cost:fourforwardsperpair" in shown


def test_help_loads_neither_methods_nor_models() -> None:
    """By structure, not by the clock: what would make it slow is not imported."""
    code = "\n".join((
        "import sys",
        "from microtome.cli._app import run",
        "assert run(['--help']) == 0 and run(['measure', '--help']) == 0",
        "heavy = {'torch', 'transformers', 'xarray', 'scipy', 'pyarrow', 'microtome.method', 'microtome.run'}",
        "print('loaded:', sorted(heavy & sys.modules.keys()))",
    ))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
    for path in ALL:
        assert path[-1] in done.stdout or path[0] == "cache"


def test_the_table_of_commands_is_complete() -> None:
    table = DOCS.read_text().split("| command |")[1].split("\n\n")[0]
    rows = ["".join(re.findall(r"`microtome [^`]*`", line.replace("\\|", "/"))) for line in table.splitlines()[2:]]
    told = re.findall(r"`microtome ([^`]*)`", " ".join(rows))
    alone = {path: command for path, command in ALL.items() if path not in MEASURES}
    for path, command in (alone | {("measure",): ALL[MEASURES[0]]}).items():
        mine = [text for text in told if text.split()[: len(path)] == list(path)]
        assert len(mine) == 1, f"{path} has {len(mine)} rows in docs/cli.md"
        options = {o for p in command.params for o in p.opts}
        assert set(re.findall(r"(?<!\S)\[?(--?[a-z]+)", mine[0])) <= options
    assert len(told) == len(alone) + 1


def test_the_table_of_exit_codes_is_complete() -> None:
    told = [int(code) for code in re.findall(r"^\| (\d+) \|", DOCS.read_text(), flags=re.MULTILINE)]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.MicrotomeError)}
    assert told == sorted({0, 2, _app.DEFECT, _app.STOPPED, _app.ENDED} | codes)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "microtome", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("microtome ")
