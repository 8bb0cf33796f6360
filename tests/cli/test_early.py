"""What is wrong whatever the model says is refused before a library is loaded that takes seconds; and what takes
seconds is announced before it begins. Nothing here measures time: what is loaded, and when, is asserted by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from enum import EnumType
from pathlib import Path
from typing import Any, get_args

import pytest

import microtome as mt
from microtome.catalogue import own
from microtome.cli._options import slot_of
from microtome.errors import PromptError
from microtome.method import Method, Sketch, declared, sketch

HEAVY = ("torch", "transformers", "numpy", "xarray", "scipy", "sklearn", "pyarrow", "safetensors")
PAIR = ("The capital of France is", "The capital of Italy is")
SAYS = "\n".join((
    "import io, json, sys",
    "from contextlib import redirect_stderr",
    "from microtome.cli._app import errors, run",
    "heavy, found = set(sys.argv[1].split(',')), []",
    "for arguments in json.load(sys.stdin):",
    "    errors.file = said = io.StringIO()",
    "    with redirect_stderr(said):",
    "        code = run(arguments)",
    "    found.append([code, said.getvalue(), sorted(heavy & sys.modules.keys())])",
    "json.dump(found, sys.stdout)",
))  # fmt: skip


def said(commands: list[tuple[str, ...]]) -> list[tuple[int, str, list[str]]]:
    """Of each command, all in one fresh interpreter: exit code, error, and what is loaded by then."""
    done = subprocess.run(
        [sys.executable, "-c", SAYS, ",".join(HEAVY)], input=json.dumps(commands), capture_output=True, text=True,
        check=False, env=os.environ | {"COLUMNS": "300", "TERMINAL_WIDTH": "300"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, " ".join(text.split()), loaded) for code, text, loaded in json.loads(done.stdout)]


WRONG: dict[tuple[str, ...], tuple[int, str]] = {
    ("patch", *PAIR, "--answer", " Paris", "--site", "mlp_outt"): (2, "'mlp_outt' is not one of"),
    ("patch", *PAIR, "--answer", " Paris", "-o", "none/p.html"): (9, "no folder none"),
    ("patch", *PAIR, "--answer", " Paris", "-o", "p.pdf"): (9, "allowed: .html"),
    ("patch", *PAIR, "--answer", " Paris", "--direction", "up"): (2, "'denoise'"),
    ("patch", *PAIR, "--answer", " Paris", "--positions", "3-x"): (5, "3-x"),
    ("patch", *PAIR, "--answer", " Paris", "--budget", "2 foo"): (2, "budget must be a size"),
    ("patch", *PAIR, "--answer", " Paris", "-m", "./none"): (3, "no model folder ./none"),
    ("patch", *PAIR, "--answer", " Paris", "--dtype", "float3"): (2, "allowed: float32"),
    ("patch", *PAIR): (6, "there is nothing to read"),
    ("patch", PAIR[0], PAIR[0], "--answer", " Paris"): (6, "are the same"),
    ("patch", PAIR[0], "--answer", " Paris"): (6, "there is no corrupt prompt"),
    ("patch", "none.csv"): (10, 'cannot read "none.csv": it does not exist'),
    ("attribute", *PAIR): (6, "there is nothing to read"),
    ("nodes", *PAIR): (6, "there is nothing to read"),
    ("edges", PAIR[0], PAIR[0], "--answer", "x"): (6, "are the same"),
    ("effects", "none.jsonl", "--answer", "x"): (10, "it does not exist"),
    ("trace", PAIR[0], "--subject", "Pantheon"): (6, 'the prompt has no subject "Pantheon"'),
    ("trace", PAIR[0], "--subject", "France", "--samples", "0"): (2, "'--samples'"),
    ("trace", PAIR[0]): (2, "Missing option '--subject'"),
    ("knockout", PAIR[0], "--keys", "Italy"): (6, 'the prompt has no keys "Italy"'),
    ("lens", PAIR[0], "--top", "0"): (2, "'--top'"),
    ("lens", PAIR[0], "--revision", "main", "-m", "."): (3, "it has no config.json"),
    ("lens", PAIR[0], "--anser", "x"): (2, "No such option"),
    ("lens",): (2, "Missing argument"),
    ("contributions", PAIR[0], "--detail", "neurons"): (2, "'neuron'"),
    ("measure", "firing,nosuch"): (2, 'no measure "nosuch"'),
    ("measure", "induction", "--period", "11"): (2, "'--period'"),
    ("measure", "firing", "--text", "none.txt"): (10, "it does not exist"),
    ("measure", "firing", "--text", "setup.cfg", "--text", "none.txt"): (10, "it does not exist"),
    ("mean-ablation", "*.mlp_outt", "-o", "x.safetensors"): (5, 'Did you mean "mlp_out"'),
    ("mean-ablation", "*.mlp_out"): (9, "no file to write to"),
    ("mean-ablation", "*.mlp_out", "--text", "none.txt", "-o", "x.safetensors"): (10, "it does not exist"),
    ("run", "x", "-c", "*.mlp.postt", "-o", "x.safetensors"): (5, 'Did you mean "mlp.post"'),
    ("run", "x", "-c", "*.mlp.postt", "--plan"): (5, 'Did you mean "mlp.post"'),
    ("run", "x", "-c", "final"): (9, "no file to write to"),
    ("run", "x", "-c", "final", "-o", "x.pkl"): (9, ".safetensors or .zarr"),
    ("run", "x", "-c", "final", "-o", "x.safetensors", "--edits", "none"): (10, "it does not exist"),
    ("tasks", "nosuch"): (6, 'there is no task "nosuch"'),
    ("tasks", "none.csv"): (10, "it does not exist"),
    ("atlas", "--only", "nosuch"): (2, 'no method "nosuch"'),
    ("atlas", "--only", "logit_lens"): (2, '"logit_lens" is a question, not a measure'),
    ("harvest", "--sites", "*.mlp.postt", "-o", "h"): (5, 'Did you mean "mlp.post"'),
    ("harvest", "--sites", "final,", "-o", "h"): (5, "cannot read the address"),
    ("harvest", "--sites", "final", "-o", "h", "--text", "none.txt"): (10, "it does not exist"),
    ("harvest", "--sites", "final"): (2, "Missing option '--output'"),
    ("commit",): (2, "there is no prompt"),
    ("commit", "x"): (9, "no file to write to"),
    ("commit", "x", "-o", "x.safetensors"): (9, "allowed: .commit"),
    ("commit", "--verify", "none.commit"): (10, "it does not exist"),
    ("commit", "x", "-o", "x.commit", "--against", "y"): (2, "-o and --against exclude one another"),
    ("commit", "x", "--against", "y", "--without-massive"): (2, "leave --without-massive and --force out"),
    ("atlas", "--text", "none.txt"): (10, "it does not exist"),
    ("atlas", "--tokens", "1"): (2, "'--tokens'"),
    ("atlas", "./none"): (3, "no model folder ./none"),
    ("check", "./none"): (3, "no model folder ./none"),
    ("atlas", "--quick", "--full"): (2, "--quick and --full exclude one another"),
    ("atlas", "--add", "firing", "--tokens", "500"): (2, "leave --tokens, --length and --force out"),
    ("atlas", "--add", "firing", "--length", "256"): (2, "leave --tokens, --length and --force out"),
    ("atlas", "--group-by", "lang"): (2, "--group-by names a column of a table, and none is given"),
    ("atlas", "--group-by", "lang", "--field", "x"): (2, "leave --field and --group-by out"),
    ("measure", "firing", "--field", "words"): (2, "--field names a column of a table, and none is given"),
    ("harvest", "--sites", "final", "-o", "h", "--group-by", "x"): (2, "name the table with --text"),
    ("sites", "none.gguf"): (3, "no GGUF file none.gguf"),
    ("pach",): (2, 'Did you mean "patch"'),
}  # fmt: skip


def test_a_wrong_argument_is_refused_before_anything_heavy_is_loaded() -> None:
    for (arguments, (code, text)), (got, told, loaded) in zip(WRONG.items(), said(list(WRONG)), strict=True):
        assert (got, loaded) == (code, []), f"{arguments}: {told}"
        assert text in told, arguments


def test_help_of_every_command_and_the_cache_load_nothing_heavy(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path))
    paths = [
        ("measure", e.name) if e.kind == "measure" else (e.command,) for e in own() if e.command or e.kind == "measure"
    ]
    paths += [
        ("run",),
        ("atlas",),
        ("sql",),
        ("harvest",),
        ("commit",),
        ("compare",),
        ("tasks",),
        ("check",),
        ("sites",),
        ("cache",),
    ]
    commands = [(*path, "--help") for path in paths] + [("cache", "show"), ("cache", "clear", "--yes"), ("--version",)]
    code = SAYS.replace("redirect_stderr(said):", "redirect_stderr(said), redirect_stdout(said):")
    code = code.replace("import redirect_stderr", "import redirect_stderr, redirect_stdout")
    monkeypatch.setitem(globals(), "SAYS", code)
    for arguments, (got, told, loaded) in zip(commands, said(commands), strict=True):
        assert (got, loaded) == (0, []), f"{arguments}: {told}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("patch", *PAIR, "--answer", " Paris"), ("measure", "firing"), ("atlas", "-o", "atlas"), ("check",),
        ("tasks", "fact"), ("run", "x", "-c", "final", "-o", "x.safetensors"),
        ("mean-ablation", "3.mlp_out", "-o", "x.safetensors"),
    ],
)  # fmt: skip
def test_what_takes_seconds_is_announced_before_it_begins(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code = "\n".join((
        "import io, sys",
        "from rich.console import Console",
        "from microtome.cli import _model",
        "from microtome.cli._app import run",
        "said = io.StringIO()",
        "_model.notes.__init__(file=said, force_terminal=True, width=80, color_system=None)",
        "class Finder:",
        "    def find_spec(self, name, path=None, target=None):",
        "        if name in ('torch', 'transformers', 'numpy', 'xarray', 'safetensors', 'pyarrow'):",
        "            sys.__stdout__.write(said.getvalue())  # that of sys is redirected meanwhile",
        "            sys.__stdout__.flush()",
        "            __import__('os')._exit(0)",
        "sys.meta_path.insert(0, Finder())",
        "run(sys.argv[1:])",
        "print('nothing was loaded')",
    ))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert "loading PyTorch and transformers" in done.stdout, done.stderr


def plain(slot: Any) -> Any:
    """What an option is, as values that compare: enums by their words."""
    if slot is None:
        return None
    kind, info = slot.annotation.__origin__, slot.annotation.__metadata__[0]
    told = {k: v for k, v in vars(info).items() if k != "default_factory"}
    return slot.name, None if slot.default is None else str(slot.default), words_of(kind), told


def words_of(kind: Any) -> Any:
    inner = get_args(kind)
    return [*map(words_of, inner)] if inner else [*kind] if isinstance(kind, EnumType) else kind


def arguments_of(made: Any) -> list[Any]:
    return [plain(slot_of(p)) for p in (*made.parameters, *getattr(made, "look_parameters", ()))]


@pytest.mark.parametrize("name", [entry.name for entry in own()])
def test_what_is_read_from_source_is_what_is_declared(name: str) -> None:
    read, made = sketch(name), declared(name)
    assert isinstance(read, Sketch)
    assert read.method.function is not made.method.function, "it was imported instead of read"
    assert arguments_of(read) == arguments_of(made)
    for field in fields(Method):
        if field.name not in ("function", "arguments", "sites", "optional"):
            assert getattr(read.method, field.name) == getattr(made.method, field.name), field.name
    words = [{n: (a.meaning, a.unit, a.choices) for n, a in m.method.arguments.items()} for m in (read, made)]
    assert words[0] == words[1]


def test_rooms_that_load_late_have_the_names_that_they_had() -> None:
    for room in (mt.anatomy, sys.modules["microtome.method"]):
        named = [name for name in dir(room) if not name.startswith("_")]
        assert len(named) > 20
        assert all(hasattr(room, name) for name in named)
        with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
            room.nosuch  # noqa: B018


@pytest.mark.skipif(os.name != "posix", reason="streams of POSIX")
@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("> /dev/full", 9)])
def test_streams_that_are_closed_or_full(closed: str, code: int) -> None:
    command = f"'{sys.executable}' -m microtome cache show {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("No space left" in done.stderr) == (code == 9)


def test_no_colour_and_a_narrow_terminal(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    done = cli("trace", "--help")
    assert done.code == 0
    assert "\x1b[3" not in done.out
    assert max(map(len, done.out.splitlines())) <= 30


CHAT = [{"role": "user", "content": "The Colosseum is in"}]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("causal_trace", {"prompt": CHAT, "subject": "Colosseum"}),
        ("attention_knockout", {"prompt": CHAT, "keys": "Colosseum"}),
        ("patch", {"clean": "The file is data.csv", "corrupt": "The file is rows.csv", "answer": "x"}),
        ("component_effects", {"prompts": "a", "answer": "x", "components": "mlps"}),
    ],
)
def test_what_only_the_method_can_judge_is_left_to_it(name: str, given: dict[str, Any]) -> None:
    from microtome.cli._early import refuse

    refuse(sketch(name), given)


def test_a_chat_without_its_corrupt_prompt_is_refused_like_a_text() -> None:
    from microtome.cli._early import refuse

    with pytest.raises(PromptError, match="there is no corrupt prompt"):
        refuse(sketch("patch"), {"clean": CHAT, "answer": "x"})
