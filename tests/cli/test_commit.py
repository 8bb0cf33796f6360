"""`microtome commit` writes a commitment, verifies it, shows what it tells apart, and refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families
from tests.cli.conftest import TEXT, check, tokenizer

import microtome as mt
from microtome.measurements import Commitment, commit

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def made(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from microtome.cli._app import run

    file = tmp_path_factory.mktemp("commit") / "run.commit"
    assert run(["commit", TEXT, "-o", str(file), "-m", str(saved), "--every", "8", "--top", "16"]) == 0
    return file


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights in its last MLP."""
    folder = tmp_path_factory.mktemp("models") / "other"
    hf = families.build("llama-gqa")
    with torch.no_grad():
        hf.model.layers[-1].mlp.down_proj.weight.mul_(-1.5)  # type: ignore[union-attr, operator]
    hf.save_pretrained(folder)
    tokenizer(folder)
    return folder


def test_it_writes_the_commitment_of_the_run(cli: Cli, saved: Path, made: Path, tmp_path: Path) -> None:
    model = mt.open(str(saved), prove=False)
    expected, held = commit(model.run(TEXT, capture="final"), every=8, top=16), Commitment.load(made)
    assert torch.equal(held.index, expected.index)
    assert torch.equal(held.value, expected.value)
    assert torch.equal(held.tokens, model.to_batch(TEXT).tokens)
    file = tmp_path / "x.commit"
    told = json.loads(cli("commit", "the cat sat", "-o", file, "-m", saved, "--json").out)
    assert (told["tokens"], told["chunks"], told["entries"], told["bytes"]) == (3, 1, 128, 768)
    assert told["fingerprint"] == Commitment.load(file).fingerprint == model.fingerprint
    check(cli("commit", "the cat", "-o", file, "-m", saved), 9, "exists", "--force")
    assert cli("commit", "the cat", "-o", file, "-m", saved, "--force").code == 0
    assert Commitment.load(file).tokens.shape == (1, 2)


def test_the_same_model_passes_and_another_fails(cli: Cli, saved: Path, other: Path, made: Path) -> None:
    done = cli("commit", "--verify", made, "-m", saved)
    assert done.code == 0
    assert "the run passes" in done.out
    assert "16-23" in done.out
    assert "are those of this model" in done.out
    done = cli("commit", "--verify", made, "-m", other)
    assert done.code == 4
    assert "the run fails" in done.out
    assert "are not those of this model" in done.out
    told = cli("commit", "--verify", made, "-m", other, "--json")
    assert told.code == 4
    facts = json.loads(told.out)
    assert (facts["passes"], facts["same_weights"]) == (False, False)
    assert not all(facts["chunks"]["passes"][0])
    assert json.loads(cli("commit", TEXT, "--verify", made, "-m", saved, "--json").out)["chunks"]["overlap"] == [
        [1, 1, 1, 1]
    ]


@pytest.mark.slow
def test_the_table_names_what_was_changed(cli: Cli, saved: Path) -> None:
    words = TEXT.split()
    arguments = ("commit", " ".join(words[:9]), "--against", " ".join(words[9:18]), "--top", 32, "-m", saved)
    rows = [line.split() for line in cli(*arguments).out.splitlines()]
    found = {row[0]: row[-1] for row in rows if "all" in row}
    assert {name: told for name, told in found.items() if name != "weight"} == {
        "same": "passes", "batch": "passes", "dtype": "passes", "prompt": "fails",
    }  # fmt: skip
    assert "weight" in found
    told = json.loads(cli(*arguments, "--json").out)
    assert told["coords"]["change"]["values"] == ["same", "batch", "dtype", "weight", "prompt"]
    assert told["variables"]["overlap"]["values"][0][0] == 1
    check(cli("commit", "the cat sat", "--against", "the", "-m", saved), 6, "the other prompt is shorter")


def test_what_is_wrong_is_one_line(cli: Cli, saved: Path, made: Path, tmp_path: Path) -> None:
    check(cli("commit", "the cat", "--verify", made, "-m", saved), 2, "the prompt is not the one", "2 tokens, 25")
    four = tmp_path / "four.commit"
    assert cli("commit", "the cat sat on", "-o", four, "-m", saved).code == 0
    sat, on = mt.open(str(saved), prove=False).to_batch("the sat on").tokens[0, 1:].tolist()
    done = cli("commit", "the cat sat sat", "--verify", four, "-m", saved)
    check(done, 2, "the prompt is not the one", f"got token 3 is {sat} 'Ġsat', {on} 'Ġon' committed to")
    for given in (("--without-massive",), ("--force",), ("--every", "32"), ("--top", "128")):
        check(cli("commit", "--verify", made, *given, "-m", saved), 2, "--verify reads what was", f"got {given[0]}")
    broken = tmp_path / "broken.commit"
    broken.write_bytes(made.read_bytes()[:200])
    check(cli("commit", "--verify", broken, "-m", saved), 10, "holds no commitment")
    folder = tmp_path / "none" / "x.commit"
    check(cli("commit", "the cat", "-o", folder, "-m", saved), 9, "no folder")
