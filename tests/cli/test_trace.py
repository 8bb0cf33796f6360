"""`microtome trace` on a tiny saved model: what it says, and a user's mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.test_help import ALL

import microtome as mt
from microtome.cli import _methods
from microtome.cli._hints import written

Cli = Callable[..., Any]
PROMPT, SUBJECT = "the cat sat on the", "cat"


def check(done: Any, code: int, *texts: str) -> None:
    assert done.code == code, done.err
    for text in texts:
        assert text in done.err, done.err


def test_json_holds_what_the_method_returned(cli: Cli, saved: Path) -> None:
    done = cli("trace", PROMPT, "--subject", SUBJECT, "--samples", 2, "--window", 2, "-m", saved, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    data = mt.explain.causal_trace(mt.open(str(saved)), PROMPT, subject=SUBJECT, samples=2, window=2)
    held = told["variables"]
    assert {"resid", "mlp", "attn", "clean", "corrupt"} <= held.keys() == set(data.data_vars)
    for name, one in held.items():
        values = np.array(one["values"], dtype=float)  # null, where two samples have no interval, is NaN
        np.testing.assert_allclose(values, data[name].values, atol=1e-5)
    assert told["provenance"]["seed"] == 0
    assert done.err.startswith("plan: ")


def test_maps_in_the_terminal_and_as_a_page(cli: Cli, saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "t.html"
    done = cli("trace", PROMPT, "--subject", SUBJECT, "--samples", 2, "-m", saved, "-o", page)
    assert done.code == 0, done.err
    for text in ("residual stream", "MLP output", "attention output", "probability of the answer", "page written"):
        assert text in done.out
    assert [p.name for p in tmp_path.iterdir()] == ["t.html"]
    other = ("--corrupt", "the dog sat on the", "--answer", "mat")
    told = json.loads(cli("trace", PROMPT, "--subject", SUBJECT, *other, "-m", saved, "--json").out)
    at = json.loads(cli("trace", PROMPT, "--subject", "@1", *other, "-m", saved, "--json").out)
    assert at["variables"] == told["variables"]  # a subject by its place
    one = json.loads(cli("trace", PROMPT, "--subject", "@1", *other, "-m", saved, "--kind", "mlp", "--json").out)
    assert one["variables"]["mlp"] == told["variables"]["mlp"]
    assert "attn" not in one["variables"]
    assert told["provenance"]["answer"].strip("Ġ ") == "mat"
    assert "replaced" in told["provenance"]


def test_prompts_and_subjects_that_do_not_fit(cli: Cli, saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "t.html"
    for arguments, code, *texts in (
        ((PROMPT, "--subject", "barn"), 6, "PromptError", "barn"),
        ((PROMPT, "--subject", SUBJECT, "--answer", "the mat"), 6, '"the mat" is not one token'),
        ((PROMPT, "--subject", SUBJECT, "--corrupt", "the dog sat"), 6, "do not align"),
        ((PROMPT, "--subject", SUBJECT, "--samples", 0), 2, "--samples"),
        ((PROMPT, "--subject", SUBJECT, "--window", -3), 2, "--window"),
        ((PROMPT, "--subject", SUBJECT, "--noise", -1), 2, "--noise"),
        ((PROMPT, "--subject", SUBJECT, "--seed", -1), 2, "--seed"),
    ):
        check(cli("trace", *arguments, "-m", saved, "-o", page), code, *texts)
    check(cli("trace", PROMPT, "-m", saved), 2, "Missing option '--subject'")
    check(cli("trace", PROMPT, "--subject", SUBJECT, "-o", tmp_path / "t.pdf"), 9, "allowed: .html")
    assert not list(tmp_path.iterdir())


def test_a_long_plan_comes_with_choices_that_the_command_has(
    cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("trace", PROMPT, "--subject", SUBJECT, "--samples", 2, "-m", saved)
    assert "shorter" not in cli(*arguments).err
    monkeypatch.setattr(_methods, "LONG", 0)
    told = cli(*arguments).err
    assert "to make it shorter: fewer --samples, one --kind; Ctrl-C stops it" in told
    assert told.index("plan: ") < told.index("to make it shorter")
    assert "shorter" not in cli(*arguments, "--quiet").err


def test_what_makes_a_plan_shorter_is_an_option_of_some_command() -> None:
    for name, words in _methods.CHEAPER.items():
        others = {"harvest"}  # which has no plan
        commands = [
            command for of, command in ALL.items() if not others & set(of.split() if isinstance(of, str) else of)
        ]
        takers = [w for command in commands if (w := written(command)).get(name) and w[name].on.startswith("--")]
        assert takers
        for taker in takers:
            assert taker[name].on in words
