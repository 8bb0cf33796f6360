"""What an error advises, a command can do: no hint is in the words of a program, or names an option that it lacks."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_help import ALL

import microtome
from microtome.cli._hints import advice, written
from microtome.errors import ArgumentError, error

SOURCE = Path(microtome.__file__).parent


def advised() -> Iterator[tuple[str, str]]:
    """Every text that the package gives as advice, by file; a value that is put into it becomes "3"."""
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            given = node.value if isinstance(node, ast.keyword) and node.arg == "do" else None
            if isinstance(node, ast.Assign) and "do" in re.findall(r"\w+", ast.unparse(node.targets[0])):
                given = node.value
            for text in ast.walk(given) if given is not None else ():
                whole = isinstance(text, ast.JoinedStr)
                parts = text.values if whole else [text] if isinstance(text, ast.Constant) else []
                said = "".join(str(p.value) if isinstance(p, ast.Constant) else "3" for p in parts)
                if " " in said:
                    yield file.relative_to(SOURCE).as_posix(), said


ADVICE = list(advised())


def test_there_is_advice_to_put_into_other_words() -> None:
    assert len(ADVICE) > 200
    assert sum("=" in text for _, text in ADVICE) > 30


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_advice_names_only_options_of_the_command(path: tuple[str, ...]) -> None:
    own = written(ALL[path])
    options = {w for o in own.values() for w in (o.on, o.off)}
    for file, text in ADVICE:
        said = advice(text, own)
        assert not re.search(r"(?<![\"\w])[a-z_]+=|\bmt\.|\btoken ids?\b|\(first, end\)", said), (file, text, said)
        if not file.startswith("cli/"):  # whose own hints are of one command, and name its options
            bare = re.sub("`microtome [^`]*(`|$)", "", said)  # a whole command has options of its own
            assert set(re.findall(r"(?<![\w-])--[a-z-]+", bare)) <= options, (file, text, said)


@pytest.mark.parametrize(
    ("path", "do", "said"),
    [
        ("patch", "give answer= or metric=", "give --answer"),
        ("lens", "give answer= or metric=", ""),
        ("patch", "leave wrong pairs out, or give share=False", "leave wrong pairs out, or give --no-share"),
        ("effects", 'use receivers="branches"', "use --receivers branches"),
        ("attribute", "choose a top in that range, or verify=0 to measure none",
         "choose a top in that range, or choose --verify 0 to measure none"),
        ("trace", "write it as it stands there, or give its tokens as (first, end)",
         "write it as it stands there, or give positions, such as @3 or @3-5"),
        ("nodes", "give corrupt=, one per prompt", "give CORRUPT, one per prompt"),
        ("patch", "name fewer sites, units or positions, pass logits=False, or raise budget=",
         "name fewer sites, units or positions, or raise --budget"),
        ("check", "pass trust_remote_code=True if you trust it", "pass --trust-remote-code if you trust it"),
        ("tasks", "choose a task that it does, as `microtome tasks` shows",
         "choose a task that it does, as `microtome tasks` shows"),
        ("patch", "pass a token id, or open the model with tokenizer=", ""),
        ("run", "choose another word", "choose another word"),
    ],
)  # fmt: skip
def test_advice_in_the_words_of_a_command(path: str, do: str, said: str) -> None:
    assert advice(do, written(ALL[(path,)])) == said


def test_an_error_keeps_its_advice_apart() -> None:
    problem = error(ArgumentError, "no", got=3, do="give answer=")
    assert str(problem) == "no; got 3. To do: give answer=."
    assert (problem.told, problem.do) == ("no; got 3.", "give answer=")
    assert error(ArgumentError, "no").do is None


def test_a_command_says_it_in_its_own_words(cli: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    pair = ("the cat sat on the", "the dog sat on the")
    done = cli("patch", *pair)
    assert done.err.endswith("there is nothing to read. To do: give --answer.")
    done = cli("effects", pair[0], "--answer", "mat", "--ablation", "resample", "-m", saved)
    assert "=" not in done.err.partition("To do:")[2], done.err
    assert "To do:" in done.err
