"""Faithfulness, completeness and minimality are what their formulas say, by plain hooks and by ablated nodes."""

from __future__ import annotations

import warnings
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
from microtome.circuits._judge import shares_of, shuffled

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


def many(n: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 60, (2, n, 5), generator=g)
    answers = torch.randint(0, 60, (n,), generator=g)
    return tokens[0].tolist(), tokens[1].tolist(), answers


def test_faithfulness_is_a_ratio_of_sums_and_its_interval_too() -> None:
    clean, corrupt, answers = many(12)
    pairs: dict[str, Any] = {"answer": answers.tolist(), "foil": ((answers + 1) % 60).tolist()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mt.errors.MicrotomeWarning)
        found = circuits.faithfulness(MODEL, scores(), clean, corrupt, shares=(20, 50, 100), draws=2, **pairs)
    for end in ("", "_lo", "_hi"):
        assert float(found[f"faithfulness{end}"][-1]) == pytest.approx(1.0, abs=1e-4)
        assert float(found[f"faithfulness_diff{end}"][-1]) == pytest.approx(0.0, abs=1e-4)
    both = torch.tensor([*clean, *corrupt])
    last = MODEL.run(both).logits[:, -1].double()
    at = answers.repeat(2), torch.arange(24)
    values = last[at[1], at[0]] - last[at[1], (at[0] + 1) % 60]
    gap = values[:12] - values[12:]
    above = torch.from_numpy(found["faithfulness_each"][:, 1].values) * gap.mean()
    own = torch.stack([above[torch.arange(12) != i].sum() / gap[torch.arange(12) != i].sum() for i in range(12)])
    ratio = above.sum() / gap.sum()
    assert float(found["faithfulness"][1]) == pytest.approx(float(ratio), abs=1e-4)
    pseudo = 12 * ratio - 11 * own
    spread = float(found["faithfulness_hi"][1] - found["faithfulness_lo"][1])
    assert 0.5 < spread / (2 * 2.2 * float(pseudo.std()) / 12**0.5) < 3


def test_a_gap_that_may_be_none_is_told() -> None:
    clean, corrupt, answers = many(16)
    pairs: dict[str, Any] = {"answer": answers.tolist(), "foil": ((answers + 1) % 60).tolist()}
    with pytest.warns(mt.errors.MicrotomeWarning, match="may be none"):
        found = circuits.faithfulness(MODEL, scores(), clean, corrupt, shares=(50,), draws=1, **pairs)
    assert found.attrs["gap_lo"] < 0 < found.attrs["gap_hi"]


def test_the_control_is_the_mean_of_several_random_circuits() -> None:
    generator = torch.Generator().manual_seed(mt.context.current().seed)
    circuit = circuits.from_scores(MODEL, scores(), 1.0 - 1e-9, prune=False)
    found = circuits.faithfulness(MODEL, circuit, CLEAN, CORRUPT, shares=(5, 30), draws=4, **GIVEN)
    drawn = [
        circuits.faithfulness(MODEL, shuffled(circuit, generator), CLEAN, CORRUPT, shares=(5, 30), draws=1, **GIVEN)
        for _ in range(4)
    ]
    values = np.stack([x["faithfulness"].values for x in drawn])
    assert found["faithfulness_control"].values == pytest.approx(values.mean(0), abs=1e-5)
    assert found["spread"].values == pytest.approx(values.std(0, ddof=1), abs=1e-5)
    assert float(found["cmd_control"]) == pytest.approx(np.mean([float(x["cmd"]) for x in drawn]), abs=1e-5)
    assert bool(np.isnan(drawn[0]["spread"].values).all())


def test_completeness_and_minimality_are_their_formulas() -> None:
    part = circuits.from_scores(MODEL, scores(), 8, rule="greedy")
    found = circuits.completeness(MODEL, part, CLEAN, CORRUPT, sets=2, draws=2, **GIVEN)
    inner = [name for name in part.nodes if "." in name]
    assert set(found["component"].values) == set(inner)
    plain = PlainCircuit(ungrouped(HF), (GRAPH.senders, GRAPH.receivers))
    none = difference(plain(torch.tensor(CORRUPT), set(), {}))
    other = dict(plain.writes)
    every = {(GRAPH.senders[u], GRAPH.receivers[v]) for u, v in GRAPH.mask.nonzero().tolist()}
    kept = {(u, v) for u, v, _ in part.listed}

    def value(edges: set[tuple[str, str]], nodes: set[str]) -> np.ndarray:
        left = {(u, v) for u, v in edges if u not in nodes and mt.circuits.node_of(v) not in nodes}
        return difference(plain(torch.tensor(CLEAN), every - left, other))

    def change(edges: set[tuple[str, str]], start: set[str], node: str) -> float:
        return abs((value(edges, start | {node}) - value(edges, start)).mean())

    gap = (value(every, set()) - none).mean()
    sets = [set(names.split(", ")) for names in found.attrs["sets"]]
    for i, names in enumerate(sets):
        expected = (value(kept, names) - value(every, names)).mean() / gap
        assert float(found["complete"][i]) == pytest.approx(abs(expected), abs=1e-4)
        each = (value(kept, names) - value(every, names)) / gap * np.sign(expected)
        assert found["complete_each"][:, i].values == pytest.approx(each, abs=1e-4)
    for i, (node, outside) in enumerate(zip(inner, found.attrs["outside"], strict=True)):
        assert outside not in inner
        for name, edges, v in (("minimal", kept, node), ("minimal_control", every, outside)):
            most = max(change(edges, start, v) for start in (set[str](), sets[0])) / abs(gap)
            assert float(found[name][i]) == pytest.approx(most, abs=1e-4)
    assert float(found["minimal"].max()) > 1e-3
    assert float(found["minimal_control"].max()) > 1e-3


def test_the_whole_model_is_complete_and_has_no_node_outside() -> None:
    found = circuits.completeness(MODEL, circuits.of_mask(MODEL, GRAPH.mask), CLEAN, CORRUPT, sets=2, **GIVEN)
    assert float(found["complete"].max()) < 1e-6
    assert bool(np.isnan(found["minimal_control"].values).all())
    assert found.attrs["outside"] == []


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
    with pytest.raises(mt.errors.ArgumentError, match="shares must be above 0"):
        shares_of(("a",))
    edges = torch.cat([GRAPH.mask[:1], GRAPH.mask])
    divided = circuits.of_mask(MODEL, edges, None, ["embed", "pos_embed"])
    with pytest.raises(mt.errors.DataError, match="embedding has several parts cannot be judged"):
        circuits.faithfulness(MODEL, divided, CLEAN, CORRUPT, **GIVEN)
    with pytest.raises(mt.errors.DataError, match="this circuit has no heads and MLPs"):
        circuits.completeness(MODEL, circuits.of_mask(MODEL, torch.zeros_like(GRAPH.mask)), CLEAN, CORRUPT, **GIVEN)
    same = mt.metric.FunctionMetric(lambda logits, prompts: logits.sum((1, 2)) * 0)
    with pytest.raises(mt.errors.DataError, match="the metric is the same with all edges and with none"):
        circuits.faithfulness(MODEL, circuit, CLEAN, CORRUPT, metric=same)
