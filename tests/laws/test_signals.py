"""Attention scores as sums over singular pairs, who wrote them, and circuits that are traced by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits._bench import Bench
from microtome.circuits._qk import HELD, READ, Attention, agreement, fewest, largest
from microtome.circuits._traced import Back, signal_scores
from microtome.edit import Freeze

PROMPT, OTHER = ids(0)[0].tolist(), ids(1)[0].tolist()
KINDS = [
    "llama-gqa", "llama-bias", "gpt2", "gpt_neox-parallel", "gpt_neox-sequential", "qwen3", "phi-qknorm", "olmo2",
    "bloom", "gptj", "falcon-gqa", "gemma3", "stablelm-qknorm", "cohere-qknorm", "granite", "phi3",
    "deepseek_v3-qlora", "gpt_oss",
]  # fmt: skip
SLOW = {
    "gpt_neox-sequential",
    "falcon-gqa",
    "stablelm-qknorm",
    "granite",
    "phi3",
    "gptj",
    "deepseek_v3-qlora",
    "gpt_oss",
}


def opened(kind: str) -> mt.Model:
    return mt.open(families.build(kind), prove=False)


def split(model: mt.Model) -> Attention:
    run = model.run(ids(0), capture=READ, edits=[HELD], grad=True, logits=False)
    return Attention(model, run)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS])
def test_the_terms_sum_to_the_score(kind: str) -> None:
    model = opened(kind)
    attention, plain = split(model), model.run(ids(0), capture="*.attn.scores")
    generator = torch.Generator().manual_seed(0)
    last = model.anatomy.n_layers - 1
    for layer, head, q, k in ((0, 1, 7, 5), (last, 3, 6, 6), (last, 2, 3, 1)):
        score = float(plain[f"{layer}.attn.scores"][0, head, q, k])
        terms = attention.terms(layer, head, q, k)
        size = float(terms.values.abs().sum()) + abs(terms.bias)
        assert float(terms.values.sum()) + terms.bias == pytest.approx(score, abs=2e-5 * size)
        assert size > 1e-3
        for side, at in ((terms.query, q), (terms.key, k)):
            assert torch.allclose(side @ attention.stream(layer, at), terms.values, atol=1e-9 * size)
        drawn = attention.random_terms(layer, head, q, k, 3, generator)
        assert torch.allclose(drawn.sum(1) + terms.bias, torch.full((3,), score).double(), atol=2e-5 * size)
    assert (abs(terms.bias) > 1e-3) == (kind == "bloom")


def test_what_is_read_is_what_the_weights_say() -> None:
    model = opened("llama-bias")
    attention, weights = split(model), model.layers[1]
    run = model.run(ids(0), capture=["1.attn.scale", "1.attn.q"])
    norm = weights.attn_norm
    assert norm is not None
    plain = (weights.W_Q[2] * norm.gain.unsqueeze(1)).T.double() / run["1.attn.scale"][0, 0].double()  # type: ignore
    read = attention.reads("q", 1, 2)
    assert torch.allclose(read[0, :, :-1], plain.detach(), atol=1e-6)  # position 0 is not turned
    assert torch.allclose(read[0, :, -1], weights.b_Q[2].double().detach(), atol=1e-5)  # type: ignore[index]
    turned = read[5]
    assert not torch.allclose(turned[:, :-1] * run["1.attn.scale"][0, 5] / run["1.attn.scale"][0, 0], plain, atol=1e-3)
    assert float(turned[:, -1].norm()) == pytest.approx(float(read[0, :, -1].norm()), rel=1e-4)


def test_the_fewest_terms_are_the_fewest() -> None:
    values = torch.tensor([3.0, -1.0, 5.0, 0.5, 1.5])  # 9 in all
    assert fewest(values, 0.9).tolist() == [2, 0, 4]
    assert fewest(values, 0.5).tolist() == [2]
    assert fewest(-values, 0.9).tolist() == [2, 0, 4]
    assert len(fewest(values, 1.0)) == 3
    assert len(fewest(torch.ones(7), 1.0)) == 7
    assert fewest(torch.zeros(3), 0.9).tolist() == [0]
    both = torch.stack([values, -values])
    assert largest(both, 2).tolist() == [8, -8]
    assert largest(both, 5).tolist() == [9, -9]
    assert agreement(values).tolist() == pytest.approx(9 / 11)
    assert agreement(torch.tensor([[1.0, -1.0], [2.0, 1.0]])).tolist() == [0, 1]


def test_controls_choose_among_random_directions_as_the_signal_does() -> None:
    model = opened("llama-gqa")
    with mt.settings(seed=3):
        found = circuits.signals(model, PROMPT, head="1.attn.z[2]", query=-1, key=3, share=0.7, answer=11, foil=13)
    attention, generator = split(model), torch.Generator().manual_seed(3)
    drawn = attention.random_terms(1, 2, len(PROMPT) - 1, 3, 20, generator)
    n, sizes, sums, left = int(found["dimension"]), [], [], []
    plain = model.run(PROMPT, capture="1.attn.scores")["1.attn.scores"][0, 2, -1].double()
    for row in drawn.tolist():
        sign, whole = (1 if sum(row) >= 0 else -1), sum(row)
        best = sorted(row, key=lambda x: -sign * x)
        sizes.append(next(k for k in range(1, len(row) + 1) if sign * sum(best[:k]) >= 0.7 * abs(whole)))
        sums.append(sum(best[:n]) / whole)
        less = plain.clone()
        less[3] -= sum(best[:n])
        left.append(float(less.softmax(0)[3]))
    assert float(found["dimension_random"]) == pytest.approx(sum(sizes) / 20)
    assert float(found["carried_random"]) == pytest.approx(sum(sums) / 20)
    assert float(found["attention_random"]) == pytest.approx(sum(left) / 20, abs=1e-6)


def test_heads_of_untrained_weights_need_no_fewer_directions_than_random_bases_do() -> None:
    model, sizes = opened("llama-gqa"), list[tuple[float, float]]()
    for head in ("0.attn.z[0]", "0.attn.z[3]", "1.attn.z[1]", "1.attn.z[2]", "2.attn.z[0]", "2.attn.z[1]"):
        found = circuits.signals(model, PROMPT, head=head, answer=11)
        sizes.append((float(found["dimension"]), float(found["dimension_random"])))
    own, random = torch.tensor(sizes).mean(0).tolist()
    assert own == pytest.approx(random, rel=0.5)


def test_terms_that_cancel_have_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.circuits._signals.CANCEL", 1.1)
    found = circuits.signals(opened("llama-gqa"), PROMPT, head="1.attn.z[2]", answer=11)
    assert bool(found["carried"].isnull())
    assert bool(found["carried_random"].isnull())
    assert 0 < float(found["agreement"]) < 1


@pytest.mark.parametrize(
    ("kind", "what"),
    [("gemma2", "are no multiple of queries times keys"), ("olmo-clip", "are no linear map of the stream")],
)
def test_scores_that_are_no_sum_are_refused(kind: str, what: str) -> None:
    with pytest.raises(mt.errors.SiteError, match=what):
        circuits.signals(opened(kind), PROMPT, head="1.attn.z[1]", answer=11)


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "olmo2", "gpt_neox-parallel"])
def test_shares_of_writers_sum_to_1(kind: str) -> None:
    model = opened(kind)
    found = circuits.signals(model, PROMPT, head="2.attn.z[1]", answer=11)
    for side in ("query", "key"):
        assert float(found[side].sum()) == pytest.approx(1.0, abs=1e-4)
        assert float(found[f"{side}_random"].sum()) == pytest.approx(1.0, abs=1e-4)
    assert (abs(float(found["query"].sel(sender="biases"))) > 1e-6) == (kind == "gpt2" or "neox" in kind)
    assert float(found["term"].sum() + found["bias"]) == pytest.approx(float(found["score"]), abs=1e-4)
    terms = found["term"].values
    assert float(found["agreement"]) == pytest.approx(abs(terms.sum()) / abs(terms).sum())
    assert not float(found["carried"]) < 0.9 - 1e-9


def test_what_is_lost_without_a_signal_is_what_an_edited_run_loses() -> None:
    model = opened("llama-gqa")
    with mt.settings(seed=3):
        found = circuits.signals(model, PROMPT, head="1.attn.z[2]", query=-1, key=3, share=0.7, answer=11, foil=13)
    attention = split(model)
    terms = attention.terms(1, 2, len(PROMPT) - 1, 3)
    kept = fewest(terms.values, 0.7)
    at = torch.zeros(len(PROMPT))
    at[3] = 1.0
    edit = mt.edit.Add("1.attn.scores[2]@-1", value=-terms.values[kept].sum() * at)
    run = model.run(PROMPT, capture="1.attn.pattern", edits=[edit])
    plain = model.run(PROMPT, capture="1.attn.pattern")
    assert float(found["attention"]) == pytest.approx(float(plain["1.attn.pattern"][0, 2, -1, 3]), abs=1e-6)
    assert float(found["attention_without"]) == pytest.approx(float(run["1.attn.pattern"][0, 2, -1, 3]), abs=1e-6)
    read = [float(r.logits[0, -1, 11] - r.logits[0, -1, 13]) for r in (plain, run)]
    assert float(found["base"]) == pytest.approx(read[0], abs=1e-5)
    assert float(found["effect"]) == pytest.approx(read[1] - read[0], abs=1e-5)
    assert abs(float(found["effect"])) > 1e-4
    whole = found["query_loss"].sum()
    assert float(whole) == pytest.approx(float(found["attention"] - found["attention_without"]), rel=0.3)


def test_a_learned_sink_takes_part() -> None:
    model = opened("gpt_oss")
    run = model.run(ids(0), capture=READ, edits=[HELD], grad=True, logits=False)
    attention = Attention(model, run)
    own = float(run["1.attn.pattern"][0, 2, 7, 6].detach())
    assert float(attention.without(1, 2, 7, 6, torch.zeros(()))) == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt_neox-parallel", "olmo2"])
def test_where_no_attention_matters_scores_are_those_of_a_frozen_pattern(kind: str) -> None:
    model = opened(kind)
    pairs = mt.explain.pairs_of(model, PROMPT, OTHER, answer=11, foil=13)
    rules = Freeze(norms=True, patterns=True, activations=False)
    plain = mt.explain.edge_scores(model, pairs, "noise", method="eap", steps=1, rules=rules).scores
    found = signal_scores(model, pairs, Bench(model, pairs).groups, 1.0, least=torch.inf)
    assert found.sizes == []
    size = float(plain.abs().nan_to_num(0).max())
    if kind == "olmo2":  # what heads write behind a norm is their share of what it gives, not its first order
        plain, found.scores[:] = plain[:, ::5], found.scores
        assert torch.allclose(found.scores[:, ::5], plain, atol=1e-4 * size, equal_nan=True)
    else:
        assert torch.allclose(found.scores, plain, atol=1e-4 * size, equal_nan=True)


def test_the_attention_that_matters_is_scored_by_what_is_lost() -> None:
    model = opened("llama-gqa")
    pairs = mt.explain.pairs_of(model, PROMPT, OTHER, answer=11, foil=13)
    back = Back(model, pairs, 0.9, 0.0)
    i = model.anatomy.n_layers - 1
    behind = back.slope + back.run.vjp(back.slope[None], f"{i}.mlp_out", f"{i}.resid_mid")[0]
    heads = back.heads(i, behind)
    # All that a query reads of its stream is what is lost by taking out signals: one edited run a key.
    h, q = 1, len(PROMPT) - 1
    lost = 0.0
    for k in range(len(PROMPT)):
        terms = back.attention.terms(i, h, q, k)
        signal = terms.values[fewest(terms.values, 0.9)].sum()
        at = torch.zeros(len(PROMPT))
        at[k] = -float(signal)
        site = f"{i}.attn.z[{h}]@{q}"
        z = [model.run(PROMPT, capture=site, edits=e)[site][0, 0, 0] for e in
             ([], [mt.edit.Add(f"{i}.attn.scores[{h}]@{q}", value=at)])]  # fmt: skip
        lost -= float((z[1] - z[0]) @ model.layers[i].W_O[h].detach() @ behind[0, q])
    assert abs(lost) > 1e-5
    assert float(heads[0, h, q] @ back.attention.stream(i, q)[:-1]) == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_a_circuit_is_found_by_signals(ablation: str) -> None:
    model = opened("llama-gqa")
    given: dict[str, Any] = {"answer": 11, "foil": 13, "edges": 0.3, "ablation": ablation}
    found = circuits.find(model, PROMPT, OTHER, method="signal", **given)
    assert 0 < found.n_edges < mt.explain.graph(model).n_edges
    exact = circuits.find(model, PROMPT, OTHER, method="exact", **given)
    some = exact.edges & exact.scores.isfinite()
    both = torch.stack([found.scores[some], exact.scores[some]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.3


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"head": "1.mlp_out"}, "SiteError", '"1.mlp_out" is not a head'),
        ({"head": "1.attn.z"}, "SiteError", r'"1.attn.z" is not one head; got 4 heads'),
        ({"query": 99}, "ArgumentError", "query is no position of the prompt; got 99"),
        ({"key": -99}, "ArgumentError", "key is no position of the prompt"),
        ({"query": 2, "key": 4}, "SiteError", "the head cannot look there; got key 4, which a mask hides"),
        ({"share": 1.5}, "ArgumentError", "share"),
    ],
)
def test_what_cannot_be_asked_is_refused(change: dict[str, Any], kind: str, text: str) -> None:
    given: dict[str, Any] = {"head": "1.attn.z[1]", "answer": 11} | change
    with pytest.raises(getattr(mt.errors, kind), match=text):
        circuits.signals(opened("llama-gqa"), PROMPT, **given)
