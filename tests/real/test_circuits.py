"""On the default model: a circuit is one row, and ACDC on a part of its graph is the literal algorithm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.plain_circuits import PlainCircuit, acdc
from transformers import LlamaForCausalLM

import microtome as mt
from microtome import circuits
from microtome.circuits._bench import Bench
from microtome.sweep import Circuits

pytestmark = pytest.mark.real
CLEAN, CORRUPT = "The capital of France is", "The capital of Italy is"


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


def ungrouped(hf: Any) -> LlamaForCausalLM:
    """The same with keys and values of its own for every head."""
    config: Any = copy.deepcopy(hf.config)
    groups = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    made, state = LlamaForCausalLM(config).eval(), hf.state_dict()
    for key in [k for k in state if "k_proj" in k or "v_proj" in k]:
        x = state[key].unflatten(0, (hf.config.num_key_value_heads, -1))
        state[key] = x.repeat_interleave(groups, 0).flatten(0, 1)
    made.load_state_dict(state)
    return made


def engine_of(model: mt.Model) -> Circuits:
    clean, corrupt = (model.to_tokens(text) for text in (CLEAN, CORRUPT))
    return Circuits(model, clean, corrupt, mt.metric.Divergence.of(model.run(CLEAN)))


def test_all_edges_are_the_clean_run_and_none_the_other(model: mt.Model) -> None:
    engine = engine_of(model)
    runs = [model.run(text).logits[0, -1].log_softmax(-1) for text in (CLEAN, CORRUPT)]
    gap = float((runs[0].exp() * (runs[0] - runs[1])).sum())
    half = engine.edges & (torch.rand(engine.edges.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    state = engine.state(half)
    assert float(state.values[0]) > 0.1
    assert float(engine.measure(engine.edges, start=state)[0]) == pytest.approx(0.0, abs=1e-4)
    assert float(engine.measure(torch.zeros_like(half), start=state)[0]) == pytest.approx(gap, rel=1e-3)


@pytest.mark.slow
def test_gates_of_zero_and_one_are_a_circuit_and_their_slope_is_the_estimate(model: mt.Model) -> None:
    engine = engine_of(model)
    scores = torch.rand(engine.edges.shape, generator=torch.Generator().manual_seed(0))
    kept = engine.edges & (scores < 0.5)
    with torch.no_grad():
        own = float(mt.sweep.gated(engine, kept.float())[0])
    assert own == pytest.approx(float(engine.measure(kept)[0]), rel=2e-3)
    pairs = mt.explain.pairs_of(model, CLEAN, CORRUPT, answer=" Paris", foil=" Rome")
    found = Bench(model, pairs).first_order()
    expected = circuits.mean_scores(model, pairs, "eap")
    there = ~expected.isnan()
    assert float((found - expected)[there].abs().max()) < 1e-3 * float(expected[there].abs().max())


@pytest.mark.slow
def test_acdc_on_a_part_of_the_graph_is_the_literal_algorithm(model: mt.Model) -> None:
    engine, graph = engine_of(model), mt.explain.graph(model)
    n, tau = engine.numbering, 2e-4
    receivers = [n.receivers - 1, n.inputs(1).start + 20, n.mlp_in(0)]
    found = circuits.acdc([engine], tau, receivers=receivers)
    plain = PlainCircuit(ungrouped(model.hf), (graph.senders, graph.receivers))
    plain(model.to_tokens(CORRUPT), set(), {})
    other, tokens = dict(plain.writes), model.to_tokens(CLEAN)
    base = plain(tokens, set(), other)[:, -1].log_softmax(-1)

    def cost(logits: torch.Tensor) -> float:
        return float((base.exp() * (base - logits[:, -1].log_softmax(-1))).sum())

    tried = [(graph.senders[u], graph.receivers[v]) for v in receivers for u in reversed(range(n.before(v)))]
    out, _ = acdc(lambda out: plain(tokens, out, other), tried, cost, tau)
    mine = {edge for edge in tried if found.kept[graph.senders.index(edge[0]), graph.receivers.index(edge[1])]}
    assert mine == set(tried) - out
    assert 10 < len(mine) < 0.5 * len(tried)


@pytest.mark.slow
def test_without_its_signal_the_answer_falls_and_random_bases_do_as_well(model: mt.Model) -> None:
    prompt = "While Jessica and Henry were sitting in the school, Henry passed a book to"
    found = circuits.signals(model, prompt, head="23.attn.z[3]", answer=" Jessica", foil=" Henry")
    assert float(found["dimension"]) <= 5
    assert float(found["dimension_random"]) <= 5  # few directions of any basis reach a sum whose terms cancel
    assert float(found["agreement"]) > 2 * float(found["agreement_random"])
    assert 0.9 < float(found["carried"]) < 1.1 < float(found["carried_random"])
    assert float(found["attention_without"]) < 0.2 < 0.5 < float(found["attention"])
    assert float(found["attention_random"]) < 0.2
    assert float(found["effect"]) < -1
    for side in ("query", "key"):
        assert float(found[side].sum()) == pytest.approx(1.0, abs=1e-4)
