"""`microtome export`: an ordinary checkpoint, or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import microtome as mt

Cli = Callable[..., Any]
ROWS = [[2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def files(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A change of the saved model, and edits."""
    folder, model = tmp_path_factory.mktemp("changes"), mt.open(saved)
    row = mt.change.weight_at(model, "1.W_out[3]").read()
    mt.change.of(model, {"1.W_out[3]": -row}, reason="without a neuron").save(folder / "change.safetensors")
    mt.edit.save_edits(folder / "edits.safetensors", [mt.edit.Scale("0.mlp_out", factor=0.5)])
    return folder / "change.safetensors", folder / "edits.safetensors"


def test_changes_and_edits_become_a_checkpoint(cli: Cli, saved: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    done = cli("export", *files, "-m", saved, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "without a neuron" in done.out
    edits = [mt.edit.Zero("1.mlp.post[3]"), mt.edit.Scale("0.mlp_out", factor=0.5)]
    expected = mt.open(saved).run(ROWS, edits=edits).logits
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor(ROWS)).logits
    assert (found - expected).abs().max() < 1e-4
    again = cli("export", *files, "-m", saved, "-o", tmp_path / "out")
    assert (again.code, "is not an empty folder" in again.err) == (9, True)
    forced = cli("export", *files, "-m", saved, "-o", tmp_path / "out", "--force", "--json")
    assert forced.code == 0, forced.err
    assert json.loads(forced.out)["changes"] == ["without a neuron"]


def test_what_is_wrong_is_one_line(cli: Cli, saved: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "nothing.safetensors").write_bytes(b"nothing")
    wrong = [
        ((tmp_path / "missing.safetensors",), "does not exist"),
        ((tmp_path / "nothing.safetensors",), "cannot read a change or edits"),
        ((files[1], files[0]), "changes come before edits"),
    ]
    for given, text in wrong:
        done = cli("export", *given, "-m", saved, "-o", tmp_path / "out")
        assert done.code not in (0, 70), text
        assert text in done.err
        assert len(done.err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
