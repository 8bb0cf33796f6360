"""Faithfulness, completeness and minimality are what their formulas say, by plain hooks and by ablated nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.laws.test_circuit_rows import some
from tests.laws.test_edges import ids, ungrouped
from tests.plain_circuits import PlainCircuit

import microtome as mt
from microtome import circuits
from microtome.circuits._circuit import strata_of
from microtome.circuits._judge import shuffled

HF = families.build("llama-gqa")
MODEL = mt.open(HF, prove=False)
GRAPH = mt.explain.graph(MODEL)
CLEAN, CORRUPT = [ids(s)[0].tolist() for s in (0, 2)], [ids(s)[0].tolist() for s in (1, 3)]
GIVEN: dict[str, Any] = {"answer": [11, 12], "foil": [13, 14]}


def scores() -> torch.Tensor:
    return torch.rand(GRAPH.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def difference(logits: torch.Tensor) -> np.ndarray:
    last = logits[:, -1].double()
    return np.array([float(last[i, a] - last[i, f]) for i, (a, f) in enumerate(((11, 13), (12, 14)))])


def test_faithfulness_is_the_share_of_the_gap() -> None:
    circuit = circuits.from_scores(MODEL, scores(), 1.0 - 1e-9, prune=False)
    found = circuits.faithfulness(MODEL, circuit, CLEAN, CORRUPT, shares=(1, 20, 100), **GIVEN)
    assert list(found["share"].values) == ["1%", "20%", "100%"]
    assert float(found["faithfulness"][-1]) == pytest.approx(1.0, abs=1e-5)
    assert float(found["faithfulness_control"][-1]) == pytest.approx(1.0, abs=1e-5)
    plain = PlainCircuit(ungrouped(HF), (GRAPH.senders, GRAPH.receivers))
    none = difference(plain(torch.tensor(CORRUPT), set(), {}))
    other = dict(plain.writes)
    clean = difference(plain(torch.tensor(CLEAN), set(), {}))
    size = scores().masked_fill(~GRAPH.mask, -1).flatten()
    kept = torch.zeros(size.shape, dtype=torch.bool)
    kept[size.argsort(descending=True)[: round(0.2 * GRAPH.n_edges)]] = True
    out = {
        (GRAPH.senders[u], GRAPH.receivers[v])
        for u, v in (GRAPH.mask & ~kept.view(GRAPH.mask.shape)).nonzero().tolist()
    }
    value = difference(plain(torch.tensor(CLEAN), out, other))
    each = (value - none) / (clean - none).mean()
    assert found["faithfulness_each"][:, 1].values == pytest.approx(each, abs=1e-4)
    f = found["faithfulness"].values
    assert float(found["cpr"]) == pytest.approx(np.trapezoid(f, [0.01, 0.2, 1.0]), rel=1e-6)
    assert float(found["cmd"]) == pytest.approx(np.trapezoid(abs(1 - f), [0.01, 0.2, 1.0]), rel=1e-6)
    assert found.attrs["gap"] == pytest.approx(float((clean - none).mean()), abs=1e-4)


def test_random_circuits_have_as_many_edges_of_each_kind() -> None:
    circuit = circuits.from_scores(MODEL, scores(), 1.0 - 1e-9, prune=False)
    mixed = shuffled(circuit, torch.Generator().manual_seed(1))
    strata = torch.from_numpy(strata_of(circuit.senders, circuit.receivers))
    own = circuit.scores.nan_to_num(0)
    assert not torch.equal(mixed, own)
    for stratum in strata[circuit.edges].unique():
        here = (strata == stratum) & circuit.edges
        assert torch.equal(mixed[here].sort().values, own[here].sort().values)


def test_the_whole_model_is_complete_and_its_nodes_matter_as_they_do() -> None:
    whole = circuits.of_mask(MODEL, GRAPH.mask)
    found = circuits.completeness(MODEL, whole, CLEAN, CORRUPT, sets=2, **GIVEN)
    assert float(found["complete"].max()) < 1e-6
    node = "1.attn.z[2]"
    source = MODEL.run(CORRUPT, capture=["*.attn.z", "*.mlp_out"])
    base, gap = difference(MODEL.run(CLEAN).logits).mean(), abs(found.attrs["gap"])
    gone = difference(MODEL.run(CLEAN, edits=[mt.edit.Patch(node, source=source)]).logits).mean()
    assert float(found["minimal"].sel(component=node)) >= abs(gone - base) / gap - 1e-5
    part = circuits.from_scores(MODEL, scores(), 0.3, prune=False)
    found = circuits.completeness(MODEL, part, CLEAN, CORRUPT, sets=3, **GIVEN)
    assert float(found["complete"].max()) > 0.01
    assert set(found["component"].values) == {name for name in part.nodes if "." in name}


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_edges_that_are_out_give_a_mean_or_nothing(ablation: str) -> None:
    engine = mt.sweep.Circuits(
        MODEL, torch.tensor(CLEAN), torch.tensor(CORRUPT), mt.metric.LogitDifference(11, foil=13)
    )
    kept = some(engine, 0.5)
    circuit = circuits.of_mask(MODEL, kept, kept.double())
    share = 100 * circuit.n_edges / GRAPH.n_edges
    found = circuits.faithfulness(MODEL, circuit, CLEAN, CORRUPT, shares=(share,), ablation=ablation, **GIVEN)
    own = engine.own
    value = torch.zeros(1, 1, 1, 1) if ablation == "zero" else own.mean((0, 2), keepdim=True)
    metric = mt.metric.LogitDifference([11, 12], foil=[13, 14])
    by_hand = mt.sweep.Circuits(MODEL, torch.tensor(CLEAN), value, metric)
    values = by_hand.measure(torch.stack([torch.zeros_like(kept), kept])).double().mean(1)
    expected = (values[1] - values[0]) / (by_hand.clean.values.double().mean() - values[0])
    assert float(found["faithfulness"][0]) == pytest.approx(float(expected), abs=1e-4)


def test_what_cannot_be_judged_is_refused() -> None:
    circuit = circuits.of_mask(MODEL, GRAPH.mask)
    with pytest.raises(mt.errors.ArgumentError, match="shares must be above 0"):
        circuits.faithfulness(MODEL, circuit, CLEAN, CORRUPT, shares=(0,), **GIVEN)
    with pytest.raises(mt.errors.DataError, match="this circuit has no heads and MLPs"):
        circuits.completeness(MODEL, circuits.of_mask(MODEL, torch.zeros_like(GRAPH.mask)), CLEAN, CORRUPT, **GIVEN)
    same = mt.metric.FunctionMetric(lambda logits, prompts: logits.sum((1, 2)) * 0)
    with pytest.raises(mt.errors.DataError, match="the metric is the same with all edges and with none"):
        circuits.faithfulness(MODEL, circuit, CLEAN, CORRUPT, metric=same)
