"""ACDC in rows finds what the literal algorithm finds edge by edge, with plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.laws.test_edges import ids, ungrouped
from tests.plain_circuits import PlainCircuit, acdc

import microtome as mt
from microtome import circuits
from microtome.sweep import Circuits


def two(seed: int) -> torch.Tensor:
    return torch.cat([ids(seed), ids(seed + 10)])


def order(engine: Circuits, graph: mt.explain.Graph) -> list[tuple[str, str]]:
    """Edges from the last receiver to the first, of each the senders from the last to the first."""
    n = engine.numbering
    return [
        (graph.senders[u], graph.receivers[v])
        for v in reversed(range(n.receivers))
        for u in reversed(range(n.before(v)))
    ]


@pytest.mark.parametrize(
    ("name", "tau"),
    [
        ("llama-gqa", 3e-3),
        pytest.param("llama-mha", 2e-3, marks=pytest.mark.slow),
        pytest.param("llama-mqa", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_literal_algorithm(name: str, tau: float) -> None:
    hf = families.build(name)
    model, plain, graph = mt.open(hf, prove=False), ungrouped(hf), None
    clean, corrupt = two(0), two(1)
    graph = mt.explain.graph(model)
    metric = mt.metric.Divergence.of(model.run(clean))
    engine = Circuits(model, clean, corrupt, metric)
    found = circuits.acdc([engine], tau)
    literal = PlainCircuit(plain, (graph.senders, graph.receivers))
    literal(corrupt, set(), {})
    other = dict(literal.writes)
    base = plain(input_ids=clean).logits[:, -1].detach().float().log_softmax(-1)

    def cost(logits: torch.Tensor) -> float:
        z = logits[:, -1].float().log_softmax(-1)
        return float((base.exp() * (base - z)).sum(-1).double().mean())

    out, forwards = acdc(lambda out: literal(clean, out, other), order(engine, graph), cost, tau)
    kept = {(graph.senders[u], graph.receivers[v]) for u, v in found.kept.nonzero().tolist()}
    every = set(order(engine, graph))
    assert every - out == kept
    assert 0.02 * len(every) < len(kept) < 0.7 * len(every), len(kept)
    assert found.rows[1] < forwards  # what leads nowhere is not run


def test_a_threshold_of_nothing_keeps_all_and_a_large_one_none() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    clean, corrupt = two(0), two(1)
    engine = Circuits(model, clean, corrupt, mt.metric.Divergence.of(model.run(clean)))
    none = circuits.acdc([engine], 1e9)
    assert not none.kept.any()
    whole = engine.measure(torch.zeros_like(engine.edges))
    assert none.cost == pytest.approx(float(whole.double().mean()), rel=1e-4)
    assert none.rows[1] == engine.numbering.senders  # the logits' own edges: nothing else leads there any more
    every = circuits.acdc([engine], -1e9)
    assert bool((every.kept == engine.edges).all())


def test_the_metric_as_cost_and_some_receivers_alone() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    metric = mt.metric.LogitDifference(11, foil=13)
    engines = [Circuits(model, two(a), two(a + 1), metric) for a in (0, 2)]
    n = engines[0].numbering
    tried = [n.receivers - 1, n.mlp_in(2), n.inputs(2).start + 1]
    found = circuits.acdc(engines, 0.01, sign=-1.0, receivers=tried)
    rest = [v for v in range(n.receivers) if v not in tried]
    assert bool((found.kept[:, rest] == engines[0].edges[:, rest]).all())
    assert found.costs[:, tried].isfinite().sum() == sum(n.before(v) for v in tried)
    assert found.costs[:, rest].isnan().all()
    values = torch.cat([e.measure(found.kept) for e in engines])
    assert found.cost == pytest.approx(-float(values.double().mean()), abs=1e-5)
    assert bool((found.kept[:, tried] < engines[0].edges[:, tried]).any())


def test_a_budget_makes_fewer_rows_at_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    engine = Circuits(model, two(0), two(1), mt.metric.LogitDifference(11, foil=13))
    most, run = list[int](), Circuits.run

    def counted(self: Circuits, prompts: torch.Tensor, *given: Any) -> Any:
        most.append(len(prompts))
        return run(self, prompts, *given)

    monkeypatch.setattr(Circuits, "run", counted)
    found = [circuits.acdc([engine], 1e-3, sign=-1.0)]
    wide, budget = max(most), 3 * 2 * engine.bytes_of_row(engine.numbering.senders)
    most.clear()
    with mt.settings(budget=budget):
        found.append(circuits.acdc([engine], 1e-3, sign=-1.0))
        assert engine.room() == budget
    assert torch.equal(found[0].kept, found[1].kept)
    assert max(most) * engine.bytes_of_row(1) < budget
    assert max(most) < wide
    most.clear()
    with mt.settings(budget=1):
        engine.measure(torch.stack([engine.edges] * 3))
    assert max(most) == 1


def test_no_threshold_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    engine = Circuits(model, two(0), two(1), mt.metric.LogitDifference(11, foil=13))
    assert engine.measure(engine.edges[None][:0]).shape == (0, 2)
    with pytest.raises(mt.errors.ArgumentError, match="tau must be a number"):
        circuits.acdc([engine], float("nan"))
