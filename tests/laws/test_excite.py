"""Exciting inputs: a planted token detector is found, and what is said of a text is what the unit does on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._excite import _Embedding


def detector(token: int) -> mt.Model:
    """A small model with a neuron in layer 0 that reads the direction of one token's embedding, and nothing else."""
    hf: Any = families.build("llama-gqa")
    embed, mlp = hf.model.embed_tokens.weight.data, hf.model.layers[0].mlp
    embed /= embed.norm(dim=1, keepdim=True) / 4
    hf.model.layers[0].self_attn.o_proj.weight.data *= 0.05
    gain = hf.model.layers[0].post_attention_layernorm.weight.data
    direction = embed[token] / embed[token].norm() / gain
    mlp.gate_proj.weight.data[3] = 2 * direction
    mlp.up_proj.weight.data[3] = direction
    return mt.open(hf, prove=False)


@pytest.mark.parametrize("token", [17, 60])
def test_the_token_of_a_planted_detector_is_found(token: int) -> None:
    model = detector(token)
    every = model.run(torch.arange(model.anatomy.d_vocab).reshape(-1, 1), capture="0.mlp.post[3]@-1")
    assert int(every["0.mlp.post[3]@-1"].argmax()) == token  # the truth
    data = mt.explain.excite(model, "0.mlp.post[3]", length=4, starts=3, steps=60, fluency=0.0)
    word = model.to_words([token])[0]
    assert str(data["text"].values[0]).split()[-1] == word  # of the best start; another may end in a lesser token
    assert (np.diff(data["reached"].values) <= 0).all()
    assert float(data["reached"][0]) > float(data["random_most"]) * 0.9
    assert float(data["reached"][0]) > 3 * abs(float(data["random"]))


def test_what_is_said_is_what_the_unit_does() -> None:
    model = detector(17)
    given: dict[str, Any] = {"length": 4, "starts": 2, "steps": 5}
    text = [[5, 17, 2, 9], [1, 2, 3, 4]]
    data = mt.explain.excite(model, "0.mlp.post[3]", text=text, **given)
    run = model.run(text, capture="0.mlp.post[3]")
    assert float(data["corpus_most"]) == pytest.approx(float(run["0.mlp.post[3]"].max()), abs=1e-5)
    assert str(data["corpus_text"].values) == "".join(model.to_words([5, 17]))
    words = {w: i for i, w in enumerate(model.to_words(list(range(model.anatomy.d_vocab))))}
    ids = [words[w] for w in str(data["text"].values[0]).split()]
    run = model.run([ids], capture="0.mlp.post[3]@-1")
    assert float(data["reached"][0]) == pytest.approx(float(run["0.mlp.post[3]@-1"]), abs=1e-5)
    losses = run.logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:]).unsqueeze(1))
    assert float(data["loss"][0]) == pytest.approx(-float(losses.mean()), abs=1e-5)
    again = mt.explain.excite(model, "0.mlp.post[3]", text=text, **given)
    assert list(again["text"].values) == list(data["text"].values)


def test_fluent_texts_have_a_lower_loss() -> None:
    model = detector(17)
    losses = [
        float(mt.explain.excite(model, "0.mlp.post[3]", length=4, starts=2, steps=40, fluency=f)["loss"].mean())
        for f in (0.0, 5.0)
    ]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
def test_embeddings_of_certain_tokens_are_theirs(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    rows = torch.tensor([[3, 8, 1], [4, 4, 2]])
    p = torch.nn.functional.one_hot(rows, model.anatomy.d_vocab).float()
    expected = model.run(rows, capture="embed", logits=False)["embed"]
    torch.testing.assert_close(_Embedding.of(model, 3)(p), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("0.mlp.post", "is not one unit of one layer"),
        ("*.mlp.post[3]", "is not one unit of one layer"),
        ("0.attn.z[1]", "is not one unit of one layer"),
        ("0.mlp.post[9999]", r"no units \[9999\] for"),
    ],
)
def test_what_cannot_be_excited(unit: str, text: str) -> None:
    with pytest.raises(mt.errors.SiteError, match=text):
        mt.explain.excite(mt.open(families.build("llama-gqa"), prove=False), unit)
    with pytest.raises(mt.errors.SiteError, match="are no sum of tokens and positions"):
        mt.explain.excite(mt.open(families.build("bloom"), prove=False), "0.mlp.post[3]")
