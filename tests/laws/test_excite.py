"""Exciting inputs: a planted token detector is found, and what is said of a text is what the unit does on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._excite import EVEN, _Embedding, mean_of


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


def test_from_its_facets_both_tokens_of_a_neuron_of_two_are_found() -> None:
    it = mt.planted.neurons(0)
    (number,) = it.truth["neurons"]["facets"]
    unit, tokens = f"1.mlp.post[{number}]", set(it.truth["facets"])
    text = torch.randint(1, it.model.anatomy.d_vocab, (600, 12), generator=torch.Generator().manual_seed(0))
    text[:, 0] = it.truth["bos"]
    facets = mt.measurements.neuron_facets(it.model, [(1, number)], text)
    assert float(facets["facets"][0]) == 2
    contexts = facets["context"].values[0]
    assert {int(row[-1]) for row in contexts if row[-1] >= 0} == tokens
    given: dict[str, Any] = {"length": 4, "steps": 40, "fluency": 0.0, "lr": 0.1}
    data = mt.explain.excite(it.model, unit, starts=1, facets=facets, **given)
    words = {it.model.to_words([t])[0] for t in tokens}
    ends = dict(zip(data["facet"].values.tolist(), (str(t).split()[-1] for t in data["text"].values), strict=True))
    assert set(ends) == {0, 1}
    assert set(ends.values()) == words
    for facet, word in ends.items():
        row = contexts[list(facets["facet"].values[0]).index(facet)]
        assert it.model.to_words([int(row[-1])])[0] == word, "each start ends in the token of its own facet"
    for start in range(2):
        member = facets["facet"].values[0] == int(data["facet"][start])
        runs = [it.model.run([[int(t) for t in row if t >= 0]], capture=unit)[unit] for row in contexts[member]]
        assert float(data["facet_most"][start]) == pytest.approx(float(max(x.max() for x in runs)), abs=1e-5)
    assert (data["reached"] > 0.5 * data["facet_most"]).all()
    assert (mt.explain.excite(it.model, unit, starts=2, **given)["reached"] < 0.1).all(), "random starts find neither"


def test_the_mean_of_a_facet_is_the_share_of_its_contexts_at_each_place() -> None:
    mean = mean_of([[4, 1], [1], [3, 2, 1]], 3, 6).exp()
    torch.testing.assert_close(mean.sum(-1), torch.ones(3))
    even = EVEN / 6
    whole, half = even + 1 - EVEN, even + (1 - EVEN) / 2
    for place, token, share in ((2, 1, whole), (1, 4, half), (1, 2, half), (0, 3, whole), (2, 0, even)):
        assert float(mean[place, token]) == pytest.approx(share)


def test_facets_of_another_neuron_are_refused() -> None:
    it = mt.planted.neurons(0)
    (number,) = it.truth["neurons"]["facets"]
    text = torch.randint(1, it.model.anatomy.d_vocab, (100, 12), generator=torch.Generator().manual_seed(0))
    facets = mt.measurements.neuron_facets(it.model, [(1, number)], text)
    with pytest.raises(mt.errors.ArgumentError, match=r"these are no facets of 0\.mlp\.post\[1\]; got 1\.mlp\.post"):
        mt.explain.excite(it.model, "0.mlp.post[1]", facets=facets)
    with pytest.raises(mt.errors.ArgumentError, match="these are no facets of neurons; got Dataset"):
        mt.explain.excite(it.model, f"1.mlp.post[{number}]", facets=facets.drop_vars("context"))


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
