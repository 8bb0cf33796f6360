"""What heads do to the vocabulary, against the whole square of it, which a tiny vocabulary allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.measurements import ordinal_direction, relation_scores
from microtome.measurements._head_functions import _exchanged, successors
from microtome.measurements._head_vocabulary import alone, single_tokens
from microtome.measurements._ov_copying import copying
from microtome.measurements._relations import RELATIONS, SERIES

heads = script("tools/planted_cases/heads.py")
FAMILIES = ("llama-gqa", "gpt2", "gemma2", "falcon-gqa", "gpt_neox-parallel")


def opened(name: str) -> mt.Model:
    hf: Any = families.build(name)
    for module in hf.modules():  # gains that would be noticed if they were left out
        if "Norm" in type(module).__name__:
            module.weight.data.uniform_(0.2, 3.0, generator=torch.Generator().manual_seed(0))
    return mt.open(hf, prove=False)


@torch.no_grad()
def square(model: mt.Model, layer: int) -> Tensor:
    """[head, source, target] The logits that each head would add for every token: from runs of tokens alone.

    A layer that begins with a token alone attends to that token, so that its heads write just what they move of it.
    """
    a = model.anatomy
    tokens = torch.arange(a.d_vocab).unsqueeze(1)
    mute = [mt.edit.Zero("0.attn_out")]
    site = "0.resid_pre" if layer == 0 else "0.resid_post"
    stream = model.run(tokens, capture=site, edits=[] if layer == 0 else mute, stop_at=1, logits=False)[site]
    own = [f"{layer}.attn.result", f"{layer}.attn.v"]
    run = model.run(tokens, capture=own, start_at=layer, given=stream, logits=False)
    wrote, weights = run[own[0]][:, 0].double(), model.layers[layer]
    bias = getattr(weights, "b_V", None)
    if bias is not None:  # a bias writes the same for every token
        bias = bias.double().repeat_interleave(a.n_heads // a.n_kv_heads, 0)
        wrote = wrote - torch.einsum("hd,hdm->hm", bias, weights.W_O.double())
    after = weights.attn_post_norm
    if after is not None:
        wrote = after.centre(wrote) * after.gain.double()
    norm: Any = model.final_norm
    unembed = model.W_U.double() - model.W_U.double().mean(1, keepdim=True)
    return torch.einsum("thm,mv->htv", norm.centre(wrote) * norm.gain.double(), unembed)


@pytest.mark.parametrize("name", FAMILIES)
def test_eigenvalues_are_those_of_the_square_of_the_vocabulary(name: str) -> None:
    model = opened(name)
    data = mt.measure(model, "ov_copying")
    for layer in (0, 2):
        for head, matrix in enumerate(square(model, layer)):
            if model.layers[layer].attn_norm is not None and model.layers[layer].attn_norm.bias is not None:
                matrix = matrix - _of_bias(model, layer, head)
            roots = torch.linalg.eigvals(matrix)
            size = roots.abs().sum()
            share = float(roots.abs()[roots.real > 0].sum() / size)
            assert float(data["ov_copying"][layer, head]) == pytest.approx(share, abs=2e-3), (layer, head)
            assert float(data["ov_trace"][layer, head]) == pytest.approx(float(roots.real.sum() / size), abs=2e-3)
    assert float(np.abs(data["ov_copying"] - data["ov_copying_shuffled"]).max()) > 0.05


@torch.no_grad()
def _of_bias(model: mt.Model, layer: int, head: int) -> Tensor:
    """What the bias of the norm before attention adds to every row."""
    a, weights = model.anatomy, model.layers[layer]
    value = weights.W_V.double()[head // (a.n_heads // a.n_kv_heads)]
    bias: Any = weights.attn_norm
    norm: Any = model.final_norm
    wrote = bias.bias.double() @ value @ weights.W_O.double()[head]
    unembed = model.W_U.double() - model.W_U.double().mean(1, keepdim=True)
    return (norm.centre(wrote) * norm.gain.double()) @ unembed


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_ranks_in_the_rows_of_the_square(name: str) -> None:
    model = opened(name)
    pairs = [(s, (7 * s + 3) % 90 + 5) for s in range(5, 45)]
    data = relation_scores(model, {"own": pairs, "two": pairs[:2]}, top=30)
    order = _exchanged(len(pairs)).tolist()
    for layer in range(3):
        every = square(model, layer)
        for head, matrix in enumerate(every):
            for kind, signed in (("maps", matrix), ("suppress", -matrix)):
                for end, targets in (("", [t for _, t in pairs]), ("_shuffled", [pairs[i][1] for i in order])):
                    rank = [int((signed[s] > signed[s, t]).sum()) for (s, _), t in zip(pairs, targets, strict=True)]
                    share = np.mean([r < 30 for r in rank])
                    found = float(data[f"{kind}{end}"].sel(relation="own")[layer, head])
                    assert found == pytest.approx(share, abs=0.026), (kind, end, layer, head)  # one pair may be a tie
    assert data["pairs"].values.tolist() == [40, 2]
    assert np.isnan(data["maps"].sel(relation="two")).all()


def test_a_head_that_writes_nothing_has_no_share() -> None:
    value, write = torch.randn(2, 8, 3), torch.randn(2, 3, 8)
    write[1] = 0
    share, trace = copying(value, write, torch.eye(8))
    assert torch.isfinite(share).tolist() == torch.isfinite(trace).tolist() == [True, False]
    share, trace = copying(torch.eye(8)[None, :, :3], 2 * torch.eye(8)[None, :3], torch.eye(8))
    assert (float(share), float(trace)) == (1.0, 1.0)
    share, trace = copying(torch.eye(8)[None, :, :3], -torch.eye(8)[None, :3], torch.eye(8))
    assert (float(share), float(trace)) == (0.0, -1.0)


def test_changed_weights_are_read_again() -> None:
    model = opened("llama-gqa")
    before = mt.measure(model, "ov_copying")["ov_copying"].values
    with torch.no_grad():
        model.hf.get_input_embeddings().weight.mul_(torch.linspace(-1, 1, families.D_MODEL))
    after = mt.measure(model, "ov_copying")["ov_copying"].values
    fresh = mt.measure(mt.open(model.hf, prove=False), "ov_copying")["ov_copying"].values
    assert np.array_equal(after, fresh)
    assert np.abs(after - before).max() > 0.01


def test_shuffled_pairs_are_none_of_the_relation() -> None:
    for count in (2, 3, 30):
        order = _exchanged(count)
        assert sorted(order.tolist()) == list(range(count))
        assert not (order == torch.arange(count)).any()


def test_successors_of_a_shuffled_series_are_hit_by_chance() -> None:
    """Of random heads: one in eleven of the words that are left, and so is the right successor."""
    model = opened("llama-gqa")
    series = [list(range(first, first + 12)) for first in range(5, 89, 12)]
    every = [successors(model, layer, series) for layer in range(3)]
    for name in ("successor", "successor_shuffled"):
        assert 0.04 < float(torch.cat([found[name] for found in every]).mean()) < 0.2, name


def test_relations_and_series_are_pairs_of_different_words() -> None:
    for name, pairs in RELATIONS.items():
        assert len(pairs) >= 30, name
        assert all(one and other and one != other for one, other in pairs), name
        assert len({one for one, _ in pairs}) >= len(pairs) - 2, name
    for name, words in SERIES.items():
        assert len(set(words)) == len(words) >= 7, name


def test_words_are_tokens_behind_a_space_where_there_is_one() -> None:
    class Few:
        bos_token_id, all_special_ids = None, ()

        def decode(self, ids: list[int]) -> str:
            return [" one", "one", "two", " three four", "", "x"][min(ids[0], 5)]

    model = mt.open(families.build("llama-gqa"), tokenizer=Few(), prove=False)
    assert single_tokens(model, ["one", "two", "three", "x"]) == [0, 2, None, 5]
    assert single_tokens(mt.open(families.build("llama-gqa"), prove=False), ["one"]) == [None]


def test_a_token_alone_is_what_a_layer_reads_without_attention() -> None:
    model = opened("llama-gqa")
    run = model.run([[7, 8, 9]], capture="1.resid_pre", edits=[mt.edit.Zero("0.attn_out")])
    assert torch.allclose(alone(model, torch.tensor([7, 8, 9]), 2), run["1.resid_pre"][0], atol=1e-6)
    assert torch.equal(alone(model, torch.tensor([7, 9]), 0), model.W_E[[7, 9]])


@pytest.mark.parametrize(
    ("relations", "top", "says"),
    [
        ({}, 3, "relations need pairs, and top is 1 or more"),
        ({"a": [(5, 6)]}, 0, "top=0"),
        ({"a": [(5, 600)]}, 3, 'the relation "a" names a token that the vocabulary has not; got 600'),
    ],
)
def test_wrong_relations_are_refused(relations: Any, top: int, says: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises((mt.errors.ArgumentError, mt.errors.DataError), match=says):
        relation_scores(model, relations, top=top)


def test_a_stream_that_is_no_logits_has_no_functions() -> None:
    model = mt.open(families.build("opt-proj"), prove=False)
    for name in ("ov_copying", "head_functions"):
        with pytest.raises(mt.errors.SiteError):
            mt.measure(model, name)


def test_ordinals_are_read_by_what_other_series_teach_and_nothing_else() -> None:
    """Series without a common code are at chance; a series that is left out teaches nothing of itself."""
    model, _, _ = heads.moving_heads()
    series = {"one": list(range(8, 18)), "two": list(range(20, 30))}
    data = ordinal_direction(model, (1, 0), series, draws=2)
    assert data["words"].values.tolist() == [10, 10]
    assert float(data["accuracy"].max()) <= 0.4
    again = ordinal_direction(model, (1, 0), series, draws=2)
    assert np.array_equal(again["moved_shuffled"], data["moved_shuffled"])
    assert (int(data["layer"]), int(data["head"])) == (1, 0)
    with pytest.raises(mt.errors.DataError, match="two series of single tokens are needed; got one"):
        ordinal_direction(model, (1, 0), {"one": series["one"]})
    with pytest.raises(mt.errors.ArgumentError, match="there is no such head to read"):
        ordinal_direction(model, (1, 9), series)
    with pytest.raises(mt.errors.ArgumentError, match="must be above 0; got scale=0"):
        ordinal_direction(model, scale=0)
