"""Commands that are made from declarations: each runs, has every option that is declared, and refuses what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from enum import StrEnum
from inspect import Parameter as Slot
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any, Literal, get_args

import pytest
import torch
import typer
from tests import families

import microtome as mt
from microtome.cli._methods import MethodGroup
from microtome.cli._options import signed, slot_of, values_of
from microtome.errors import DeclarationError
from microtome.method import Argument, Column, Found, Measure, Source, declared, forget, question
from microtome.method._arguments import parameters_of

Cli = Callable[..., Any]
LABELLED = Path(__file__).with_name("labelled.csv")
SHOTS = Path(__file__).with_name("shots.json")
PAIR = ("the cat sat on the", "the dog sat on the", "--answer", "mat", "--foil", "barn")
EDITS = Path(mkdtemp()) / "edits.safetensors"
mt.edit.save_edits(EDITS, [mt.edit.Scale("1.mlp_out", factor=0.5)])
ASKED = {
    "attribution-check": (PAIR[0], "--estimate", "gradient", "--estimate", "legrad", "--null", "cat"),
    "assess": (EDITS, "--of", "induction", "--pairs", "2", "--prompts", "1", "--new", "8", "--tokens", "64"),
    "attribute": (*PAIR, "--verify", "2"),
    "causal-basis": ("--layer", "1", "--directions", "2", "--size", "32", "--length", "8", "--steps", "1"),
    "circuit": (*PAIR, "--edges", "0.3", "--verify", "2"),
    "compare-neurons": (PAIR[0], "--without", "1.attn.z[0]", "--answer", "mat", "--top", "2"),
    "context": ("the cat sat on. the dog ran to. the cat", "--answer", "mat", "--tokens", "2"),
    "context-update": ("the cat sat on the", " dog ran"),
    "contributions": (PAIR[0],),
    "das": (str(Path(__file__).parent / "pairs.csv"), "--rank", "2", "--steps", "2", "--site", "1.mlp.post"),
    "edges": PAIR,
    "effects": (PAIR[0], "--answer", "mat", "--foil", "barn"),
    "exits": (PAIR[0], "--token", "mat", "--size", "64", "--length", "16"),
    "flow": (PAIR[0], "--verify", "2"),
    "forward-tuning": (SHOTS, "--shots", "2", "--rounds", "2", "--tests", "2", "--template", "{input} {output} "),
    "fourier": ("the {cat,dog,mat,sat} ran", "cat,dog,mat,sat", "--controls", "2"),
    "fourier-neurons": ("the {cat,dog,mat,sat} ran", "cat,dog,mat,sat"),
    "excite": ("0.mlp.post[3]", "--steps", "2", "--starts", "2"),
    "helix": ("{0-19} sat", "0-19", "--period", "2", "--period", "5", "--layer", "1", "--position", "0"),
    "icl": (SHOTS, "--shots", "2", "--heads", "2", "--samples", "2", "--tests", "2", "--template", "{input} {output} "),
    "integrate": (PAIR[0], "--points", "2"),
    "knockout": (PAIR[0], "--keys", "cat"),
    "legrad": (PAIR[0],),
    "lens": (PAIR[0],),
    "linear": (PAIR[0],),
    "nodes": PAIR,
    "patch": PAIR,
    "patching-grid": (*PAIR, "--corruption", "replace", "--window", "1"),
    "referee": (
        "--of",
        "induction",
        "--pairs",
        "1",
        "--programs",
        "0",
        "--trained",
        "0",
        "--estimate",
        "atp",
        "--estimate",
        "eap",
    ),
    "probe": (LABELLED, "--folds", "3", "--answer", "mat", "--foil", "barn"),
    "rows": (PAIR[0], "--neurons", "2", "--controls", "2"),
    "signals": (PAIR[0], "--head", "1.attn.z[0]", "--answer", "mat"),
    "task-vectors": (
        SHOTS,
        "--shots",
        "2",
        "--heads",
        "2",
        "--samples",
        "2",
        "--tests",
        "2",
        "--template",
        "{input} {output} ",
    ),
    "trace": (PAIR[0], "--subject", "cat", "--samples", "2"),
    "weak-to-strong": (LABELLED,),
    "weight-mask": ("--steps", "12", "--sparsity", "0.01", "--tokens", "300", "--length", "16", "--site", "1.mlp_out"),
}
"""By command of a question: arguments that it runs with on the tiny model."""

CHANGED = {"mean-ablation": ("*.mlp_out",)}
MEASURES = sorted(mt.measures())
ENTRIES = {name: entry.name for name, entry in MethodGroup(name="all").entries().items()}


def test_every_command_is_tried_here() -> None:
    assert ENTRIES.keys() == ASKED.keys() | CHANGED.keys()


def options_of(name: str) -> list[Any]:
    made: Any = declared(name)
    parameters = (*made.parameters, *(made.look_parameters if isinstance(made, Measure) else ()))
    return [slot for p in parameters if (slot := slot_of(p)) is not None]


def flags_of(slot: Slot) -> list[str]:
    """How an argument is written on the command line: its flags, or its name where it is taken by position."""
    info = get_args(slot.annotation)[1]
    return [slot.name] if info.default is ... else [info.default, *info.param_decls]


def check_help(shown: str, name: str) -> None:
    """Every argument that the method declares, and what all commands share, is in the help."""
    for slot in options_of(name):
        for written in flags_of(slot):
            assert written.split("/")[0] in shown, f"{name}: {written}"
    for shared in ("--seed", "--budget", "--output", "--force", "--json", "--model", "--device", "--dtype"):
        assert shared in shown
    assert declared(name).method.question.split()[0] in shown


@pytest.mark.parametrize("command", ASKED)
def test_a_question_runs(cli: Cli, saved: Path, tmp_path: Path, command: str) -> None:
    check_help(cli(command, "--help").out, ENTRIES[command])
    page = tmp_path / "page.html"
    done = cli(command, *ASKED[command], "-m", saved, "-o", page, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert list(told) == ["variables", "coords", "provenance", "page"]
    method = declared(ENTRIES[command]).method
    assert told["provenance"]["question"] == method.question
    for name, held in told["variables"].items():
        assert held.keys() == {"dims", "unit", "values"}
        assert held["unit"], name
    assert all(held.keys() == {"dims", "values"} for held in told["coords"].values())
    assert told["page"] == str(page)
    assert page.read_text().startswith("<!doctype html>")
    shown = cli(command, *ASKED[command], "-m", saved)
    assert shown.code == 0, shown.err
    assert len(shown.out.splitlines()) > 3
    assert max(map(len, shown.out.splitlines())) <= 80
    refused = cli(command, *ASKED[command], "-m", saved, "-o", page)
    assert (refused.code, "page.html exists" in refused.err) == (9, True)
    assert cli(command, *ASKED[command], "-m", saved, "-o", page, "--force", "--quiet").err == ""
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("command", CHANGED)
def test_a_change_writes_edits_that_a_run_takes(
    cli: Cli, saved: Path, text: Path, tmp_path: Path, command: str
) -> None:
    check_help(cli(command, "--help").out, ENTRIES[command])
    file, common = tmp_path / "edits.safetensors", ("-m", saved, "--text", text)
    done = cli(command, *CHANGED[command], *common, "-o", file)
    assert done.code == 0, done.err
    assert f"microtome run PROMPT --edits {file}" in done.out.replace("\n", "")
    edits = mt.edit.load_edits(file)
    again = cli(command, *CHANGED[command], *common, "-o", file, "--force", "--json")
    assert json.loads(again.out) == {"file": str(file), "edits": [repr(edit) for edit in edits]}
    kept = ("run", "the cat", "-m", saved, "-c", "final", "-o", tmp_path / "x.safetensors", "--edits", file)
    assert cli(*kept).code == 0
    assert cli(command, *CHANGED[command], *common).err.startswith("microtome: OutputError: no file to write to")
    assert cli(command, *CHANGED[command], *common, "-o", file).code == 9


@pytest.mark.parametrize("name", families.some(4, MEASURES))
def test_a_measure_runs(cli: Cli, saved: Path, text: Path, tmp_path: Path, name: str) -> None:
    if name == "expert_neurons":  # which a mixture alone has
        saved = Path(shutil.copytree(saved, tmp_path / "mixture"))
        families.build("mixtral").save_pretrained(saved)
    shown = cli("measure", name, "--help").out
    check_help(shown, name)
    made = declared(name)
    reads = "text" in {p.name for p in made.look_parameters} if isinstance(made, Measure) else False
    assert ("--text" in shown) == ("--group" in shown) == reads
    given = ("--text", text) if reads else ()
    given += ("--tokens", 200, "--length", 20) if "--tokens" in shown else ()
    if isinstance(made, Measure) and made.compares:
        other = tmp_path / "other.txt"
        other.write_text(text.read_text()[::-1])
        given += ("--text", other)
    done = cli("measure", name, "-m", saved, *given, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    columns = {c.name for c in made.method.columns if c.name in told["variables"]}
    assert columns
    units = {c.name: c.unit for c in made.method.columns}
    assert {n: told["variables"][n]["unit"] for n in columns} == {n: units[n] for n in columns}
    assert cli("measure", name, "-m", saved, *given).code == 0


def test_several_measures_in_one_pass(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    names, cut = "induction, stream,neuron_weights", ("--text", text, "--tokens", 200, "--length", 20, "--period", 12)
    done = cli("measure", names, "-m", saved, *cut, "-o", page, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert {"induction", "block_cos", "out_norm"} <= told["variables"].keys()
    model = mt.open(str(saved))
    data = mt.measure(model, "induction", "stream", "neuron_weights", text=text, tokens=200, length=20, period=12)
    for name in ("induction", "block_cos", "out_norm"):
        values = torch.tensor(told["variables"][name]["values"])
        assert torch.allclose(values.double(), torch.tensor(data[name].values).double(), atol=1e-5)
    assert "induction" in page.read_text()


def test_several_files_are_groups(cli: Cli, saved: Path, tmp_path: Path, text: Path) -> None:
    for name, words in (("code", text.read_text()), ("prose", "the old dog sat by the red barn " * 60)):
        (tmp_path / f"{name}.txt").write_text(words)
    files = ("--text", tmp_path / "code.txt", "--text", tmp_path / "prose.txt")
    cut = ("measure", "firing", "-m", saved, *files, "--tokens", 2000, "--length", 20, "--json")
    for asked, kept in ((("--group", "*"), ["code", "prose"]), (("--group", "prose"), ["prose"])):
        told = json.loads(cli(*cut, *asked).out)
        assert told["coords"]["group"]["values"] == kept
        assert told["variables"]["firing_rate"]["dims"] == ["group", "layer", "neuron"]
    assert "group" not in json.loads(cli(*cut).out)["coords"]


def test_what_is_refused_in_one_line(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    nowhere = ("-m", tmp_path / "none")  # refused before a model is opened
    for arguments, *told in (
        (("measure", "inductoin"), 'no measure "inductoin". Did you mean "induction"', "allowed: "),
        (("measure", "maps"), 'no measure "maps". Did you mean "head_functions"', "allowed: "),
        (("measure", "induction,maps"), 'no measure "maps". Did you mean "head_functions"'),
        (("measure", "induction,fire"), 'no measure "fire"', "allowed: ", "firing"),
        (("measure", "induction,patch"), 'no measure "patch"', "allowed: ", 'a question: run "microtome patch"'),
        (("patch,trace", "a"), 'no command "patch,trace"'),
        (("measure", "induction", "--budget", "x", *nowhere), "budget must be a size"),
        (("measure", "induction", "--period", 40, "-m", saved), "period must be an integer from 12 to 32 (tokens)"),
        (("measure", "firing", "--group", "code", "--text", text, "-m", saved), 'no group "code" in this text'),
    ):
        done = cli(*arguments)
        assert done.code == 2, done.err
        assert done.err.startswith("microtome: ArgumentError: ")
        for words in told:
            assert words in done.err


def words(text: str) -> int:
    return len(text.split())


def declared_arguments(
    prompt: Annotated[str, Argument("a prompt", positional=True)],
    other: Annotated[str | None, Argument("another prompt", positional=True)] = None,
    *,
    needed: Annotated[int, Argument("must be given", least=1)],
    parts: Annotated[Sequence[str], Argument("some parts must be given")],
    share: Annotated[float, Argument("a part of it", least=0, most=1)] = 0.5,
    every: Annotated[bool, Argument("all of it")] = False,
    whole: Annotated[bool, Argument("not only some")] = True,
    kind: Annotated[Literal["one", "two"], Argument("which one")] = "two",
    long_words: Annotated[str, Argument("one of many", choices=tuple(f"choice[{i}]" for i in range(9)))] = "choice[1]",
    names: Annotated[tuple[Literal["a", "b"], ...], Argument("which ones")] = ("a",),
    counts: Annotated[Sequence[int], Argument("some numbers")] = (3, 4),
    where: Annotated[str | int, Argument("where it is", from_text=words)] = -1,
    hidden: Annotated[Any, Argument("not for commands", command=False)] = None,
) -> None:
    """A function with every kind of argument."""


PARAMETERS = parameters_of(declared_arguments)
SLOTS = {p.name: slot_of(p) for p in PARAMETERS}


def test_each_kind_of_argument_has_its_option() -> None:
    def call(**given: Any) -> None:
        seen.append(values_of(PARAMETERS, given))

    seen: list[dict[str, Any]] = []
    slots = [slot for slot in SLOTS.values() if slot is not None]
    app = typer.Typer(add_completion=False)
    vars(call)["__signature__"] = signed(call, slots).__signature__.replace(parameters=slots)  # pyright: ignore
    app.command()(call)
    command: Any = typer.main.get_command(app)

    def run(*arguments: str) -> dict[str, Any]:
        command(list(arguments), standalone_mode=False)
        return seen.pop()

    base = ("p", "--needed", "2", "--part", "x", "--part", "y")
    own = {"share": 0.5, "every": False, "whole": True, "kind": "two", "long_words": "choice[1]"}
    assert run(*base) == {"prompt": "p", "needed": 2, "parts": ("x", "y")} | own  # other defaults stay the method's
    told = run(*base, "q", "--share", "1", "--every", "--no-whole", "--kind", "one", "--where", "a b c", "--count", "7")
    assert told["other"] == "q"
    assert (told["share"], told["every"], told["whole"], told["kind"]) == (1.0, True, False, "one")
    assert (told["where"], told["counts"]) == (3, (7,))
    assert run(*base, "--name", "b", "--name", "a")["names"] == ("b", "a")
    assert run(*base, "--long-words", "choice[8]")["long_words"] == "choice[8]"
    assert not any(isinstance(value, StrEnum) for value in run(*base).values())
    for wrong in (
        base[1:], base[:3], ("p", *base[3:]), (*base, "--needed", "0"), (*base, "--needed", "x"),
        (*base, "--share", "1.5"), (*base, "--kind", "three"), (*base, "--name", "c"), (*base, "--hidden", "1"),
    ):  # fmt: skip
        with pytest.raises(Exception, match=r"Missing|Invalid|Value error|No such|less than|greater|valid") as refused:
            command(list(wrong), standalone_mode=False)
        assert refused.value.exit_code == 2  # pyright: ignore[reportAttributeAccessIssue]


def test_the_help_of_an_option_says_what_it_allows_and_what_holds_without_it() -> None:
    told = {name: get_args(slot.annotation)[1] for name, slot in SLOTS.items() if slot is not None}
    assert SLOTS["hidden"] is None
    assert told["names"].help == "Which ones. Repeatable; by default: a."
    assert told["counts"].help == "Some numbers. Repeatable; by default: 3 4."
    assert told["parts"].help == "Some parts must be given. Repeatable."
    assert told["where"].help == "Where it is; by default: -1."
    assert told["long_words"].metavar == "LONG_WORDS"
    assert told["long_words"].help.startswith("One of many. One of: choice\\[0] choice\\[1] ")
    assert (told["kind"].help, told["kind"].metavar) == ("Which one.", None)
    assert (told["share"].min, told["share"].max, told["needed"].min) == (0, 1, 1)
    flags = {name: flags_of(slot) for name, slot in SLOTS.items() if slot is not None}
    assert (flags["whole"], flags["every"], flags["parts"]) == (["--whole/--no-whole"], ["--every"], ["--part"])
    assert (flags["long_words"], flags["prompt"]) == (["--long-words"], ["prompt"])
    required = {name for name, slot in SLOTS.items() if slot is not None and slot.default is Slot.empty}
    assert required == {"prompt", "needed", "parts"}


def test_an_argument_that_every_command_has_is_refused(cli: Cli) -> None:
    @question(
        "clashing", command="clashing", question="Does it clash?", source=Source("Nobody", "A Toy for Tests", 2026),
        columns=(Column("toy_answer", "1", "nothing", "none: a toy", dims=()),), cost="nothing", call="none",
        check="tests/cli/test_generated.py",
    )  # fmt: skip
    def clashing(model: Any, *, device: Annotated[str, Argument("where")] = "cpu") -> Found:
        """Has an argument that opening a model has."""
        return Found({"toy_answer": 0.0})

    try:
        done = cli("clashing")
        assert done.code == DeclarationError.exit_code
        assert 'an argument is called "device", which is an option of every command' in done.err
    finally:
        forget("clashing")
