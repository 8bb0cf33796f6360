"""Edges that are in by a share: at 0 and 1 the rows of circuits, and between them differentiable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.agreement import Agreement, agreed
from tests.laws.test_circuit_rows import READ, read_of, some, two
from tests.laws.test_edges import FAMILIES, ids

import microtome as mt
from microtome.circuits._bench import Bench
from microtome.circuits._soft import first_order, soft_mean
from microtome.sweep import Circuits, bytes_of_gated, gated
from microtome.training import in_parts

GAP = mt.metric.FunctionMetric(lambda logits, prompts: logits[:, 0, 11] - logits[:, 0, 13], positions=(-1,))


@pytest.mark.parametrize("name", FAMILIES)
def test_gates_of_zero_and_one_are_a_circuit(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    engine = Circuits(model, two(0), two(1), READ)
    ends = [read_of(model.run(tokens).logits) for tokens in (two(0), two(1))]
    agree = Agreement(1e-4 * max(float((ends[0] - ends[1]).abs().max()), 1.0))
    with torch.no_grad():
        agree(gated(engine, engine.edges.float()), ends[0], name)
        agree(gated(engine, torch.zeros(engine.edges.shape)), ends[1], name)
        for share, seed in ((0.5, 0), (0.9, 1)):
            kept = some(engine, share, seed)
            agree.cell(gated(engine, kept.float()), engine.measure(kept), ends[0], (name, share))
    agree.stands_out(0.5)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox-parallel", "phi3", "qwen3"])
def test_the_slope_at_one_is_the_estimate(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    pairs = mt.explain.pairs_of(model, two(0).tolist(), two(1).tolist(), answer=11, foil=13)
    expected = mt.circuits.mean_scores(model, pairs, "eap")
    found = first_order(Bench(model, pairs).groups)
    assert torch.equal(found.isnan(), expected.isnan())
    there = ~expected.isnan()
    agreed(found[there], expected[there], 2e-5)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_the_slope_between_is_that_of_differences(ablation: str) -> None:
    model = mt.open(families.build("llama-gqa").double(), prove=False)
    pairs = mt.explain.pairs_of(model, two(0).tolist(), two(1).tolist(), metric=GAP)
    bench = Bench(model, pairs, None, ablation)
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(bench.edges.shape, generator=generator, dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(soft_mean(bench.groups, gates), gates)[0]
    assert float(slope.masked_fill(bench.edges, 0.0).abs().max()) == 0.0
    places = bench.edges.nonzero()[torch.randperm(int(bench.edges.sum()), generator=generator)[:12]]
    agree = Agreement(1e-4)
    for u, v in places.tolist():
        step = torch.zeros_like(gates)
        step[u, v] = 1e-2
        with torch.no_grad():
            ends = [float(soft_mean(bench.groups, gates + sign * step)) for sign in (1, -1)]
        agree(slope[u, v], torch.tensor((ends[0] - ends[1]) / 2e-2), (u, v))
    agree.stands_out(0.3)


def test_constants_are_what_edges_give() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    engine = Circuits(model, two(0), torch.zeros(1, 1, 1, 1), READ)
    kept = some(engine, 0.6)
    constants = torch.randn(engine.own.shape[1], 40, generator=torch.Generator().manual_seed(0))
    given = engine.giving(constants[None, :, None])
    with torch.no_grad():
        own = gated(engine, kept.float(), constants=constants)
        agree = Agreement(1e-4)
        agree.cell(own, given.measure(kept), engine.measure(kept), "constants")
        agree.cell(own, gated(given, kept.float()), gated(engine, kept.float()), "other")
    agree.stands_out(0.8)
    assert float(engine.away.sub(given.away).abs().max()) > 0.1  # the engine itself is as it was


def test_pairs_in_turns_are_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several lengths, one after the other, and of some of them."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    clean = [ids(s, length)[0].tolist() for s, length in ((0, 9), (2, 7), (4, 9))]
    corrupt = [ids(s, length)[0].tolist() for s, length in ((1, 9), (3, 7), (5, 9))]
    bench = Bench(model, mt.explain.pairs_of(model, clean, corrupt, metric=GAP))
    gates = torch.rand(bench.edges.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def slope(numbers: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        value = soft_mean(bench.groups, gates, numbers=numbers)
        return value.detach(), torch.autograd.grad(value, gates)[0]

    together = slope(None)
    one = [slope([i]) for i in range(3)]
    monkeypatch.setattr("microtome.circuits._soft.bytes_of_gated", lambda _: 2**60)
    alone = slope(None)
    for i in range(2):
        there = bench.edges if i else ...
        agreed(alone[i][there], together[i][there], 1e-5)
        agreed(torch.stack([x[i] for x in one]).mean(0)[there], together[i][there], 1e-5)


def test_a_sum_in_parts_has_the_gradient_of_the_sum() -> None:
    x, y = (torch.tensor([1.0, 2.0, 3.0]).requires_grad_() for _ in range(2))
    constant = torch.tensor(2.0)
    parts: list[Any] = [lambda t: (t[0] ** 2).sum() * t[2], lambda t: (t[0] * t[1]).sum(), lambda t: t[1].prod()]
    found = in_parts([2 * x, y, constant], parts)
    plain = torch.stack([part([2 * x, y, constant]) for part in parts]).sum()
    assert float(found.detach()) == pytest.approx(float(plain.detach()))
    for own, expected in zip(torch.autograd.grad(found, [x, y]), torch.autograd.grad(plain, [x, y]), strict=True):
        assert torch.allclose(own, expected)


def test_inside_editing_gates_are_of_the_changed_model() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with model.editing(mt.edit.Zero("1.attn.z[2]"), mt.edit.Scale("0.mlp_out", 0.5)):
        engine = Circuits(model, two(0), two(1), READ)
        kept = some(engine, 0.5)
        with torch.no_grad():
            agreed(gated(engine, kept.float()), engine.measure(kept), 1e-4)
    plain = Circuits(model, two(0), two(1), READ).measure(kept)
    assert float((plain - engine.measure(kept)).abs().max()) > 1e-3


def test_memory_is_of_the_size_that_is_expected() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    engine, longer = (Circuits(model, ids(0, n), ids(1, n), READ) for n in (9, 36))
    assert 3.5 < bytes_of_gated(longer) / bytes_of_gated(engine) < 6
