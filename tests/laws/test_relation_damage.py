"""The damage matrix of relations: literal runs without heads, controls of other heads, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import families, tokenizers

import microtome as mt
from microtome.measurements import read_relations, relation_damage
from microtome.measurements._relation_damage import _matched, _prompt
from microtome.measurements._relations import RELATIONS, TEMPLATES

FORWARD = [(i, i + 1) for i in range(10, 22)]
BACK = [(i, i - 1) for i in range(30, 40)]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def test_damage_is_that_of_literal_runs_without_the_heads(model: mt.Model) -> None:
    data = relation_damage(model, {"forward": FORWARD, "back": BACK}, heads=2, prompts=64, controls=1)
    assert data["prompts"].values.tolist() == [12, 10]
    for at, (name, pairs) in enumerate({"forward": FORWARD, "back": BACK}.items()):
        tokens, answers = (torch.tensor(side) for side in zip(*pairs, strict=True))

        def loss(*edits: mt.edit.Edit, tokens: torch.Tensor = tokens, answers: torch.Tensor = answers) -> float:
            logits = model.run(tokens.unsqueeze(1), edits=list(edits)).logits[:, -1].double()
            return float(-logits.log_softmax(-1).gather(1, answers.unsqueeze(1)).mean())

        assert float(data["loss"][at]) == pytest.approx(loss(), abs=1e-4)
        for left_out in ("forward", "back"):
            own = zip(*(data[x].sel(left_out=left_out).values.tolist() for x in ("layer", "head")), strict=True)
            edits = [mt.edit.Zero(f"{layer}.attn.z[{head}]") for layer, head in own]
            gap = loss(*edits) - loss()
            assert float(data["damage"].sel(left_out=left_out, relation=name)) == pytest.approx(gap, abs=1e-4)
    assert float(np.abs(data["damage"]).min()) > 1e-3
    own = np.diagonal(data["damage"].values)
    assert np.allclose(data["damage_diff"], own - data["damage_random"])
    assert data["own_rank"].values.tolist() == [
        1 + int((row > row[i]).sum()) for i, row in enumerate(data["damage"].values)
    ]


def test_controls_are_other_heads_of_the_layer_and_of_its_size() -> None:
    sizes = {0: torch.tensor([1.0, 1.1, 0.9, 50.0, 1.05, 0.0]), 3: torch.tensor([2.0, 2.0])}
    rng = torch.Generator().manual_seed(0)
    drawn = [_matched(sizes, [(0, 0), (3, 1)], rng) for _ in range(20)]
    assert {first for first, _ in drawn} == {(0, 1), (0, 2), (0, 4)}
    assert {second for _, second in drawn} == {(3, 0)}
    whole = _matched(sizes, [(3, 0), (3, 1)], rng)  # a layer of which nothing is left
    assert {layer for layer, _ in whole} == {0}
    assert len(set(whole)) == 2
    with pytest.raises(mt.errors.ArgumentError, match="too few heads outside of a set"):
        _matched({0: torch.ones(3)}, [(0, 0), (0, 1)], rng)


def test_a_prompt_shows_other_pairs_and_asks_for_one() -> None:
    hf, tokenizer = families.build("gpt2"), tokenizers.build("bpe-bos")
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = mt.open(hf, tokenizer=tokenizer, prove=False)
    words = [[model.to_id(f" {w}") for w in pair] for pair in (("France", "Paris"), ("Italy", "Rome"))]
    pairs = [(s, t) for s, t in words]
    asked = _prompt(model, pairs, 1, "The capital of {} is", 3, torch.Generator().manual_seed(0))
    assert "".join(model.to_words(asked)) == "<s>The capital of France is Paris.\nThe capital of Italy is"
    alone = _prompt(model, pairs, 0, "The capital of {} is", 0, torch.Generator().manual_seed(0))
    assert "".join(model.to_words(alone)) == "<s>The capital of France is"
    assert _prompt(model, pairs, 0, None, 3, torch.Generator()) == [pairs[0][0]]


def test_every_relation_of_ours_has_a_template() -> None:
    assert TEMPLATES.keys() == RELATIONS.keys()
    assert all(text.count("{}") == 1 for text in TEMPLATES.values())


def test_relations_are_read_from_files_and_damaged_ones_are_named(tmp_path: Path) -> None:
    told = {"name": "capital", "prompt_templates": ["The capital of {} is", "x {}"]}
    samples = [{"subject": "France", "object": "Paris"}]
    (tmp_path / "a.json").write_text(json.dumps(told | {"samples": samples}))
    assert read_relations(tmp_path) == ({"capital": [("France", "Paris")]}, {"capital": "The capital of {} is"})
    (tmp_path / "b.json").write_text(json.dumps(told))
    with pytest.raises(mt.errors.DataError, match=r'b.json" holds no relation; got .*samples'):
        read_relations(tmp_path)
    with pytest.raises(mt.errors.DataError, match='no relations in "'):
        read_relations(tmp_path / "none")


def test_what_cannot_be_asked_is_refused(model: mt.Model) -> None:
    with pytest.raises(mt.errors.ArgumentError, match="are needed; got heads=0"):
        relation_damage(model, {"forward": FORWARD}, heads=0)
    with pytest.raises(mt.errors.ArgumentError, match="are needed; got no relation"):
        relation_damage(model, {})
    with pytest.raises(mt.errors.ArgumentError, match='the template of "forward" has no single place'):
        relation_damage(model, {"forward": FORWARD}, {"forward": "no place"})
    with pytest.raises(mt.errors.DataError, match="no relation has 5 pairs of single tokens; got few"):
        relation_damage(model, {"few": FORWARD[:3]})
    with pytest.raises(mt.errors.ModelUnsupported, match="causal models"):
        relation_damage(mt.open(families.build("bert"), prove=False), {"forward": FORWARD})
