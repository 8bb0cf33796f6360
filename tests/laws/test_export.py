"""Checkpoints: opened by transformers alone they give the logits of the changed model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tests.laws.test_bake import vector
from tests.laws.test_change import ROWS, bits, drawn, opened, same

import microtome as mt
from microtome.errors import EditError, OutputError


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor(ROWS)).logits


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3", "gptj", "olmo2"])
def test_an_exported_model_gives_the_same_logits_in_plain_transformers(name: str, tmp_path: Path) -> None:
    model = opened(name)
    before = bits(model)
    first = mt.change.of(model, {"1.W_out": drawn(model, "1.W_out")}, reason="first")
    with first.applied(model):
        second = mt.change.of(model, {"0.W_O[1]": drawn(model, "0.W_O[1]")}, reason="second")
        with second.applied(model):
            expected = model.run(ROWS).logits
    mt.change.export(model, tmp_path / "out", [first, second])
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-5
    assert same(model, before)
    record = json.loads((tmp_path / "out" / "microtome.json").read_text())
    assert [step["reason"] for step in record["steps"]] == ["first", "second"]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_steering_vector_is_baked_into_a_bias(name: str, tmp_path: Path) -> None:
    model = opened(name)
    before, edit = bits(model), mt.edit.Add("1.resid_post", value=vector(40), strength=2.0)
    mt.change.export(model, tmp_path / "out", edits=edit)
    assert (logits_of(tmp_path / "out") - model.run(ROWS, edits=edit).logits).abs().max() < 2e-4
    assert same(model, before)


def test_a_folder_with_other_contents_is_kept(tmp_path: Path) -> None:
    model = opened()
    (tmp_path / "mine.txt").write_text("mine")
    change = mt.change.of(model, {"1.W_out": drawn(model, "1.W_out")})
    with pytest.raises(OutputError, match=r"is not an empty folder; got 1 other things"):
        mt.change.export(model, tmp_path, change)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputError, match="got a file"):
        mt.change.export(model, tmp_path / "mine.txt", change)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    before, change = bits(model), mt.change.of(model, {"1.W_out": drawn(model, "1.W_out")})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.hf), "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left"):
        mt.change.export(model, tmp_path / "out", change)
    assert list(tmp_path.iterdir()) == []
    assert same(model, before)


def test_a_change_of_another_state_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, other = opened(), opened("mistral")
    change = mt.change.of(other, {"1.W_out": drawn(other, "1.W_out")})
    with pytest.raises(EditError, match="another model"):
        mt.change.export(model, tmp_path / "out", change)
    assert list(tmp_path.iterdir()) == []
