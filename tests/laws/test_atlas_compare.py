"""Two atlases compared: nothing differs in one and the same, and what was changed is named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tests import families
from tests.cli.conftest import TEXT, tokenizer

import microtome as mt
from microtome.errors import DataError, MicrotomeWarning

OPTIONS: dict[str, Any] = {"length": 20, "rows": 4, "tokens": 240, "measures": ["stream", "activations", "head_norms"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("atlases")
    tokenizer(folder / "tokenizer")
    reader = AutoTokenizer.from_pretrained(folder / "tokenizer")
    base, deep = (mt.open(families.build(name), tokenizer=reader, prove=False) for name in ("llama-gqa", "gpt2"))
    louder = families.build("llama-gqa")
    louder.model.layers[1].mlp.gate_proj.weight.data[7] *= 9
    for name, model in (("a", base), ("b", mt.open(louder, tokenizer=reader, prove=False)), ("deep", deep)):
        mt.atlas.write_atlas(model, folder / name, text=[TEXT] * 20, **OPTIONS)
    mt.atlas.write_atlas(base, folder / "other", text=[TEXT.title()] * 20, **OPTIONS)
    return folder


def test_an_atlas_differs_from_itself_nowhere(folder: Path) -> None:
    found: Any = mt.atlas.compare(folder / "a", mt.atlas.open(folder / "a"))
    assert set(found["table"]) == {"layers", "heads", "neurons"}
    assert (found["largest"] == 0).all()
    assert not found["where"].map(len).any()
    assert found["apart"].dropna().eq(0).all()
    assert len(found["apart"].dropna()) > 5


def test_the_neuron_that_was_changed_is_named_and_the_sign_turns_with_the_order(folder: Path) -> None:
    there, back = (mt.atlas.compare(folder / one, folder / other) for one, other in (("a", "b"), ("b", "a")))
    std = there[there["column"] == "std"].iloc[0]
    assert std["table"] == "neurons"
    assert std["where"][0] == "1.7"
    assert std["largest"] > 0
    assert back[back["column"] == "std"].iloc[0]["largest"] == -std["largest"]
    norms = there[there["column"] == "resid_pre_norm"].iloc[0]
    assert norms["where"] == ["2"], "only what comes after the change"


def test_other_shapes_are_refused_in_one_line_and_other_texts_are_said(folder: Path) -> None:
    with pytest.raises(DataError, match=r"have other shapes.*; got .*n_kv_heads 2 and 4.*one architecture") as told:
        mt.atlas.compare(folder / "a", folder / "deep")
    assert "\n" not in str(told.value)
    with pytest.warns(MicrotomeWarning, match="made of different texts: what differs is not of the models alone"):
        mt.atlas.compare(folder / "a", folder / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.atlas.compare(folder / "a", folder / "b")
