"""The attention patterns in an atlas are those of the model, to within the steps of a byte, or are left out and why."""

from __future__ import annotations

import base64
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.cli.conftest import TEXT, tokenizer
from tests.scripts import script

import microtome as mt
from microtome.atlas._patterns import MOST, PERIOD, patterns_of
from microtome.atlas._patterns import TEXT as PASSAGE
from microtome.atlas._patterns import _tokens as tokens_of
from microtome.errors import DataError
from microtome.view import Passage, Patterns
from microtome.view._patterns import quantised, write_patterns

configs = script("tools/family_configs.py")


@cache
def reader(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def opened(name: str, folder: Path) -> mt.Model:
    made = configs.build(name) if name == "lfm2" else families.build(name)
    return mt.open(made, tokenizer=reader(folder), prove=False)


def read(path: Path) -> Any:
    found = re.fullmatch(r'atlas\.receive\("([^"]+)", (.*)\);\n', path.read_text(encoding="ascii"), flags=re.S)
    assert found is not None
    return json.loads(found[2])


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "mixtral", "lfm2"])
def test_every_byte_is_that_of_the_models_own_attention(name: str, tmp_path: Path) -> None:
    """Windows, experts and hybrids among them; the reference is what the model itself returns."""
    model = opened(name, tmp_path)
    told = json.loads(write_patterns(tmp_path, patterns_of(model)))
    assert [p["title"] for p in told["passages"]] == ["English", "repeated tokens"]
    ids = model.tokenizer(PASSAGE, add_special_tokens=False)["input_ids"][:MOST]
    model.hf.set_attn_implementation("eager")
    layers = sorted(int(layer) for layer in told["heads"])
    assert set(layers) | {int(layer) for layer in told["missing"]} == set(range(model.anatomy.n_layers))
    assert bool(told["missing"]) == (name == "lfm2")
    assert len(told["passages"][0]["tokens"]) == len(ids)
    with torch.no_grad():
        found = model.hf(torch.tensor([ids]), output_attentions=True).attentions
    found = [x for x in found if x is not None]
    for layer, weights in zip(layers, found, strict=True):
        expected = weights[0].double().numpy()
        heads, n, _ = expected.shape
        assert told["heads"][str(layer)] == heads
        texts = read(tmp_path / "patterns" / f"{layer}.js")
        held = np.frombuffer(base64.b64decode(texts[0]), np.uint8).reshape(heads, n, n)
        assert np.abs(held / 255 - expected).max() <= 0.5 / 255 + 1e-6
        assert np.ptp(held) > 20
        assert not held[:, 0, 1:].any(), "nothing is seen before it comes"
        if name == "mistral":
            assert not np.tril(held, -families.WINDOW).any(), "nothing beyond the window"
            assert np.tril(held, 1 - families.WINDOW).any()


def test_the_second_passage_is_repeated(tmp_path: Path) -> None:
    model = opened("llama-gqa", tmp_path)
    tokens = tokens_of(model)[1]
    assert tokens[-PERIOD:] == tokens[-2 * PERIOD : -PERIOD]
    assert len(set(tokens)) > PERIOD // 2
    assert tokens_of(model) == tokens_of(model), "the same in every atlas"


def test_a_pattern_that_does_not_fit_its_passage_is_refused(tmp_path: Path) -> None:
    passage = Passage("a", "b", ("x", "y"))
    with pytest.raises(DataError, match=r"the patterns of layer 3 do not fit their passage; got \(1, 3, 3\)"):
        write_patterns(tmp_path, Patterns((passage,), {3: [np.ones((1, 3, 3))]}, {}))


def test_weights_become_bytes() -> None:
    assert quantised(np.array([0, 1, 0.5, 0.001, np.nan, 1.0000001])).tolist() == [0, 255, 128, 0, 0, 255]


def test_an_atlas_holds_the_patterns_of_its_model(tmp_path: Path) -> None:
    model = opened("lfm2", tmp_path)
    options = {"tokens": 120, "length": 20, "rows": 4}
    mt.atlas.write_atlas(model, tmp_path / "atlas", text=[TEXT] * 20, measures=["stream", "head_norms"], **options)
    data = tmp_path / "atlas" / "assets" / "data"
    told = read(data / "model.js")["patterns"]
    assert {path.stem for path in (data / "patterns").iterdir()} == set(told["heads"])
    assert "attention" in next(iter(told["missing"].values()))
    mt.atlas.add_to_atlas(model, tmp_path / "atlas", ["massive"], text=[TEXT] * 20)
    assert read(data / "model.js")["patterns"] == told
    manifest = json.loads((tmp_path / "atlas" / "manifest.json").read_text())
    assert f"assets/data/patterns/{next(iter(told['heads']))}.js" in manifest["files"]
