"""Laws of sinks, massive activations, registers and inertia: closed forms, identities, and plain captures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome import planted
from microtome.measurements import register, secondary_sinks, sink_scores, token_loss
from microtome.measurements._massive_effect import entry_means, largest_entries, other_entries
from microtome.measurements._registers import outliers
from microtome.measurements._secondary_sinks import _REAL, _WHOLE, Traced, _list_sinks
from microtome.stream import TokenBatch

LAYERS = script("tools/planted_cases/layers.py")
T = 16


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa").double(), prove=False)


def ids(rows: int = 8, length: int = 12) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def uniform(width: int = T) -> Tensor:
    even = torch.ones(1, 1, width, width).tril()
    return even / even.sum(-1, keepdim=True)


def test_uniform_attention_has_the_score_of_harmonic_numbers() -> None:
    alpha = sink_scores(uniform(64))[0, 0]
    harmonic = [sum(1 / n for n in range(k + 1, 65)) / (64 - k) for k in range(64)]
    assert alpha.tolist() == pytest.approx(harmonic)
    assert float(alpha[0]) == pytest.approx(0.0741, abs=1e-4)
    assert sink_scores(torch.full((1, 1, T, T), 1 / T), causal=False)[0, 0].tolist() == pytest.approx([1 / T] * T)


def test_a_perfect_sink_scores_one_and_its_place_alone() -> None:
    for k in (0, 3):
        a = torch.zeros(1, 1, T, T)
        a[..., k] = 1
        a[..., :k, :] = torch.eye(T)[:k]
        alpha = sink_scores(a)[0, 0]
        assert float(alpha[k]) == 1
        assert float(alpha[k + 1 :].max()) == 0


def test_columns_of_sinks_are_those_of_captures(model: mt.Model) -> None:
    data = mt.measure(model, "sinks", text=ids(), threshold=0.25)
    harmonic = sum(1 / n for n in range(1, 13))
    assert np.allclose(data["sink_uniform"], harmonic / 12)
    assert np.allclose(data["secondary_uniform"], (harmonic - 1) / 11)
    both_ways = mt.measure(mt.open(families.build("bert"), prove=False), "sinks", text=ids())
    assert np.allclose(both_ways["sink_uniform"], 1 / 12)
    assert np.allclose(both_ways["secondary_uniform"], 1 / 12)
    run = model.run(ids(), capture=["*.attn.pattern", "*.attn.v"])
    for layer in range(3):
        a = run[f"{layer}.attn.pattern"]
        alpha = torch.stack([a[:, :, k:, k].mean(-1) for k in range(12)], -1)
        expected = {
            "sink_attention": alpha[..., 0].mean(0), "sink_share": (alpha[..., 0] > 0.25).double().mean(0),
            "secondary_attention": alpha[..., 1:6].amax(-1).mean(0),
        }  # fmt: skip
        norm = run[f"{layer}.attn.v"].norm(dim=-1)
        for name, place in (("value_drain", 0), ("value_drain_elsewhere", 6)):
            ratio = norm[:, place] / norm.median(1).values
            expected[name] = ratio.mean(0)[[0, 0, 1, 1]]  # four heads share two values
        for name, value in expected.items():
            np.testing.assert_allclose(data[name][layer], value, rtol=1e-6, err_msg=name)


def test_shares_by_group_are_those_of_its_rows(model: mt.Model) -> None:
    both = mt.measure(model, "sinks", text={"a": ids()[:4], "b": ids()[4:]}, groups=True)
    for name, rows in (("a", ids()[:4]), ("b", ids()[4:])):
        alone = mt.measure(model, "sinks", text=rows)
        np.testing.assert_allclose(both["sink_attention"].sel(group=name), alone["sink_attention"])


# ------------------------------------------------------------------------------------------------- massive activations


def test_what_is_one_number_in_every_row_is_its_own_mean() -> None:
    """All rows begin with one token whose stream is the largest: its mean is the identity, and 0 is not."""
    hf: Any = LAYERS.tiny(mute=False)
    with torch.no_grad():
        hf.get_input_embeddings().weight[0].mul_(30)
    tokens = torch.cat([torch.zeros(8, 1, dtype=torch.int64), ids() % 60], dim=1)
    data = mt.measure(mt.open(hf, prove=False), "massive_effect", text=tokens, entries=3)
    assert float(abs(data["loss_massive_mean"]).max()) < 1e-6
    assert float(abs(data["loss_massive_zero"]).min()) > 1e-4
    assert float(abs(data["loss_massive_control"]).min()) > 1e-6


def test_columns_of_massive_tokens_are_those_of_captures(model: mt.Model) -> None:
    data = mt.measure(model, "massive_tokens", text=ids())
    for layer in range(3):
        size = model.run(ids(), capture=f"{layer}.resid_post")[f"{layer}.resid_post"].abs()
        place = size.amax(-1).argmax(1).tolist()
        for name, on in (("massive_ratio", 0), ("massive_ratio_elsewhere", 6)):
            own = [row[(p + on) % 12] for row, p in zip(size, place, strict=True)]
            expected = np.mean([float(token.max() / token.median()) for token in own])
            assert float(data[name][layer]) == pytest.approx(expected)
        assert float(data["massive_first"][layer]) == np.mean([p == 0 for p in place])
        assert float(data["massive_position"][layer]) == np.mean(place)


def test_entries_are_the_largest_and_others_are_none_of_them() -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    chosen = largest_entries(x, 3)
    assert chosen.sum((1, 2)).tolist() == [3, 3, 3]
    for row in range(3):
        assert float(x[row][chosen[row]].abs().min()) >= float(x[row][~chosen[row]].abs().max())
    means = entry_means(x, chosen)
    for d in range(7):
        own = x[..., d][chosen[..., d]]
        assert (len(own) == 0 and bool(means[d].isnan())) or float(means[d]) == pytest.approx(float(own.mean()))
    others = other_entries(chosen, torch.Generator().manual_seed(0))
    assert not bool((others & chosen).any())
    assert torch.equal(others.sum(-1), chosen.sum(-1))


def test_losses_without_the_largest_are_those_of_literal_edits(model: mt.Model) -> None:
    data = mt.measure(model, "massive_effect", text=ids(), entries=2)
    run = model.run(ids(), capture="1.resid_post")
    zeroed = run["1.resid_post"].masked_fill(largest_entries(run["1.resid_post"], 2), 0)
    edited = model.run(ids(), edits=mt.edit.Patch("1.resid_post", source={"1.resid_post": zeroed})).logits
    expected = token_loss(edited, ids()).mean() - token_loss(run.logits, ids()).mean()
    assert float(data["loss_massive_zero"][1]) == pytest.approx(float(expected), abs=1e-6)


# ----------------------------------------------------------------------------------------------------- secondary sinks


def test_a_second_sink_is_none_without_the_mlp_that_is_named() -> None:
    it = planted.sink()
    tokens = LAYERS.fillers(it)
    places = LAYERS.second_sinks(it, tokens)
    listed = secondary_sinks(it.model, tokens, threshold=LAYERS.SCORE)
    assert {(int(r), int(p)) for r, p in zip(listed["row"], listed["position"], strict=True)} == set(places)
    assert set(listed["made_by"].values) == {it.truth["layer"]}
    assert float(listed["made_cos"].min()) > 0.99
    assert set(listed["lifetime"].values) == {2}
    for row, position in places:
        at = mt.edit.Zero(f"{it.truth['layer']}.mlp_out@{position}", rows=(row,))
        other = mt.edit.Zero(f"1.mlp_out@{position}", rows=(row,))
        for edit, gone in ((at, True), (other, False)):
            run = it.model.run(tokens, capture="*.attn.pattern", edits=edit)
            score = max(float(sink_scores(run[f"{i}.attn.pattern"])[row].mean(0)[position]) for i in (1, 2))
            assert (score < 0.1) == gone


def test_the_mlp_that_is_named_adds_most_in_that_direction_before_the_birth() -> None:
    zeros = torch.zeros(5, 2, 8, dtype=torch.float64)
    score, norm, cosine = zeros.clone(), zeros + 1, zeros.clone()
    score[3:, 1, 2] = torch.tensor([0.4, 0.5])
    score[2, 0, 0] = 0.9  # the first token is no secondary sink
    score[2, 0, 6] = 0.9  # nor is one of the second half
    norm[:, 1, 2] = torch.tensor([3.0, 10, 5, 99, 99])
    cosine[:, 1, 2] = torch.tensor([0.1, 0.2, 0.9, 1, 1])
    found: dict[str, list[float]] = {name: [] for name in (*_WHOLE, *_REAL)}
    _list_sinks(found, Traced(score, zeros, norm, cosine), torch.arange(16).reshape(2, 8), 10, 0.3)
    expected = {
        "row": 11, "position": 2, "token": 10, "birth": 3, "lifetime": 2, "made_by": 2, "score": 0.5, "made_norm": 5.0,
        "made_cos": 0.9,
    }  # fmt: skip
    assert {name: pytest.approx(values) for name, values in found.items()} == {n: [v] for n, v in expected.items()}


def test_sinks_by_layer_count_the_same_tokens() -> None:
    it = planted.sink()
    tokens = LAYERS.fillers(it)
    LAYERS.second_sinks(it, tokens)
    data = mt.measure(it.model, "secondary_sinks", text=tokens, threshold=LAYERS.SCORE)
    assert data["sink_tokens"].values.tolist() == [0, 0.5, 0.5]  # one in every other row
    assert data["sink_births"].values.tolist() == [0, 0.5, 0]
    assert float(data["sink_alignment"][1]) > 0.9
    assert float(data["sink_alignment_elsewhere"][1]) < 0.5


def test_alignment_is_the_correlation_of_captures(model: mt.Model) -> None:
    data = mt.measure(model, "secondary_sinks", text=ids())
    run = model.run(ids(), capture=["2.attn.pattern", "2.resid_pre"])
    score = sink_scores(run["2.attn.pattern"]).mean(1)[:, 1:6]
    x = run["2.resid_pre"]
    cosine = torch.cosine_similarity(x, x[:, :1], dim=-1)[:, 1:6]
    expected = np.corrcoef(score.flatten(), cosine.flatten())[0, 1]
    assert float(data["sink_alignment"][2]) == pytest.approx(expected, abs=1e-6)
    halves = [mt.measure(model, "secondary_sinks", text=[TokenBatch.of(p, s) for p, s in parts])
              for parts in (((ids(), torch.arange(8) * 12),),
                            ((ids()[:3], torch.arange(3) * 12), (ids()[3:], torch.arange(3, 8) * 12)))]  # fmt: skip
    assert np.allclose(halves[0]["sink_alignment"], halves[1]["sink_alignment"], rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------- registers


def test_moving_a_neuron_to_its_own_token_is_the_identity() -> None:
    it = planted.sink()
    tokens, pair = LAYERS.fillers(it), (it.truth["layer"], it.truth["neuron"])

    def stream(edits: list[mt.edit.Edit]) -> Tensor:
        return it.model.run(tokens, capture="2.resid_post", edits=edits)["2.resid_post"]

    plain = stream([])
    assert float((plain - stream(register([pair], blank=False))).abs().max()) < 1e-4
    moved = stream(register([pair], position=4, blank=False))
    assert float((plain - moved)[:, 0].abs().max()) > 100
    assert float((plain - moved)[:, 4].abs().max()) > 100


def test_registers_are_those_of_captures(model: mt.Model) -> None:
    data = mt.measure(model, "registers", text=ids())
    run = model.run(ids(), capture=["*.resid_post", "*.mlp.post"])
    norm = torch.stack([run[f"{i}.resid_post"].norm(dim=-1) for i in range(3)])
    ratio = norm / norm.median(-1, keepdim=True).values
    position, birth = outliers(ratio)
    write = torch.zeros(3, 56, dtype=torch.float64)
    loud = torch.zeros(3, 56, dtype=torch.float64)
    for row in range(8):
        d = run[f"{int(birth[row])}.resid_post"][row, position[row]]
        for layer in range(int(birth[row]) + 1):
            a = run[f"{layer}.mlp.post"][row]
            rest = torch.cat([a[: position[row]], a[position[row] + 1 :]])
            w_out = mt.measurements.neuron_directions(model, layer)["w_out"].detach()
            write[layer] += (a[position[row]] - rest.mean(0)) * (w_out @ d / d.norm()) / 8
            loud[layer] += (a[position[row]].abs() - rest.abs().mean(0)) / 8
    np.testing.assert_allclose(data["register_write"], write, atol=1e-9)
    np.testing.assert_allclose(data["register_activation"], loud, atol=1e-9)


def test_an_outlier_appears_where_it_has_half_of_its_size() -> None:
    ratio = torch.ones(4, 2, 6)
    ratio[1:, 0, 2] = torch.tensor([4.0, 9.0, 10.0])
    ratio[0:, 1, 5] = 3.0
    position, birth = outliers(ratio)
    assert position.tolist() == [2, 5]
    assert birth.tolist() == [2, 0]


def test_no_neuron_to_move_is_refused_in_one_line() -> None:
    with pytest.raises(mt.errors.ArgumentError, match="no neuron to move") as refused:
        register([])
    assert "\n" not in str(refused.value)
    with pytest.raises(mt.errors.SiteError, match="register neurons need layers with neurons"):
        mt.measure(mt.open(families.build("mixtral"), prove=False), "registers", text=ids())
    late = mt.measure(mt.open(families.build("qwen3_moe"), prove=False), "registers", text=ids())
    assert float(abs(late["register_write"][0]).max()) == 0  # neurons behind the layer in which outliers appear


# ------------------------------------------------------------------------------------------------------------- inertia


def test_inertia_is_the_correlation_of_captures(model: mt.Model) -> None:
    data = mt.measure(model, "inertia", text=ids())
    run = model.run(ids(), capture=["*.resid_pre", "*.resid_post"])
    for layer in range(3):
        pre, post = run[f"{layer}.resid_pre"], run[f"{layer}.resid_post"]
        turn = 1 - torch.cosine_similarity(pre, post, dim=-1)
        size = pre.norm(dim=-1).log()
        other = size[:, 1:].roll(-5, 1)
        for name, x in (("inertia", size[:, 1:]), ("inertia_elsewhere", other)):
            expected = np.corrcoef(turn[:, 1:].flatten(), x.flatten())[0, 1]
            assert float(data[name][layer]) == pytest.approx(expected, abs=1e-9)
        assert float(data["turn_first"][layer]) == pytest.approx(float(turn[:, 0].mean()))
        assert float(data["turn_other"][layer]) == pytest.approx(float(turn[:, 1:].mean()))


def test_larger_tokens_turn_less_where_a_layer_adds_the_same_to_all() -> None:
    """Embeddings of several lengths, and a branch that reads them through a norm."""
    hf: Any = LAYERS.tiny(1, mute=False)
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(torch.linspace(1, 20, 60).unsqueeze(1))
        hf.model.layers[0].self_attn.o_proj.weight.zero_()
    tokens = torch.randint(5, 60, (8, 24), generator=torch.Generator().manual_seed(1))
    data = mt.measure(mt.open(hf, prove=False), "inertia", text=tokens)
    assert float(data["inertia"][0]) < -0.6
    assert abs(float(data["inertia_elsewhere"][0])) < 0.3


# ------------------------------------------------------------------------------------------------------- planted cases


@pytest.mark.parametrize("seeds", [(0,), pytest.param((0, 1, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["sinks", "massive", "secondary", "register_neurons", "moved_register"])
def test_what_is_planted_is_found_and_nothing_else(
    case: str, seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LAYERS, "SEEDS", seeds)
    told = getattr(LAYERS, case)()
    found, of = told["found"].split(" of ")
    assert found == of
    assert told["false"].split(" of ")[0] == "0"
