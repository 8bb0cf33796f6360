"""Circuits as values: sets of edges, chosen by scores, compared, pruned, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from tests import families
from tests.laws.test_edges import ids, ungrouped
from tests.plain_circuits import PlainCircuit

import microtome as mt
from microtome import circuits
from microtome.circuits import Circuit
from microtome.circuits._bench import Bench
from microtome.circuits._scores import number_of

HF = families.build("llama-gqa")
MODEL = mt.open(HF, prove=False)
GRAPH = mt.explain.graph(MODEL)
PLAN = circuits.Sparsification(1.0, 60)


def drawn(seed: int, share: float = 0.1) -> Circuit:
    scores = torch.rand(GRAPH.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return circuits.from_scores(MODEL, scores, share, prune=False, task=f"task {seed}")


def test_the_largest_scores_are_chosen() -> None:
    scores = torch.randn(GRAPH.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = circuits.from_scores(MODEL, scores, 50, prune=False)
    size = scores.abs().masked_fill(~GRAPH.mask, -1)
    least = size.flatten().sort(descending=True).values[49]
    assert bool((found.kept == (size >= least)).all())
    assert found.n_edges == 50
    assert found.listed[0][2] == pytest.approx(float(scores[GRAPH.mask][scores[GRAPH.mask].abs().argmax()]))
    assert circuits.from_scores(MODEL, scores, 0.1, prune=False).n_edges == round(0.1 * GRAPH.n_edges)
    data = xr.Dataset(
        {"score": (("receiver", "sender"), scores.T.numpy())},
        coords={"sender": list(GRAPH.senders), "receiver": list(GRAPH.receivers)},
    )
    assert bool((circuits.from_scores(MODEL, data, 50, prune=False).kept == found.kept).all())


def greedy(size: torch.Tensor, n: int) -> set[tuple[int, int]]:
    """Brute force: each time the largest edge into what is in."""
    inside, chosen = {"final"}, set[tuple[int, int]]()
    node = [mt.circuits.node_of(name) for name in GRAPH.receivers]
    for _ in range(n):
        open_ = [(float(size[u, v]), u, v) for u, v in GRAPH.mask.nonzero().tolist() if node[v] in inside]
        _, u, v = max(edge for edge in open_ if edge[1:] not in chosen)
        chosen.add((u, v))
        inside.add(GRAPH.senders[u])
    return chosen


def test_greedy_goes_back_from_the_logits() -> None:
    scores = torch.randn(GRAPH.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = circuits.from_scores(MODEL, scores, 25, rule="greedy", prune=False)
    assert {tuple(e) for e in found.kept.nonzero().tolist()} == greedy(scores.abs(), 25)


def test_what_leads_nowhere_is_left_out_and_changes_nothing() -> None:
    whole = drawn(3, 0.2)
    pruned = whole.pruned()
    assert 0 < pruned.n_edges < whole.n_edges
    names = set(pruned.nodes)
    for u, v in pruned.kept.nonzero().tolist():
        sender, node = pruned.senders[u], mt.circuits.node_of(pruned.receivers[v])
        assert sender == "embed" or any(mt.circuits.node_of(r) == sender for _, r, _ in pruned.listed)
        assert node == "final" or any(s == node for s, _, _ in pruned.listed)
        assert {sender, node} <= names
    engine = mt.sweep.Circuits(MODEL, ids(0), ids(1), mt.metric.LogitDifference(11, foil=13))
    values = engine.measure(torch.stack([whole.kept, pruned.kept]))
    assert float((values[0] - values[1]).abs().max()) < 1e-5


def test_unions_and_intersections() -> None:
    a, b = drawn(0), drawn(1)
    assert bool(((a | b).kept == (a.kept | b.kept)).all())
    assert bool(((a & b).kept == (a.kept & b.kept)).all())
    assert bool(((a - b).kept == (a.kept & ~b.kept)).all())
    assert (a | b).attrs["method"] == "task 0 or task 1"


def test_an_edge_that_only_one_has_takes_its_score() -> None:
    a, b = drawn(0), drawn(1)
    both = a | b
    assert torch.equal(both.scores[a.kept], a.scores[a.kept])
    assert torch.equal(both.scores[b.kept & ~a.kept], b.scores[b.kept & ~a.kept])


def test_labels_say_which_edge_a_score_is_of() -> None:
    scores = torch.randn(GRAPH.mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = {"sender": list(GRAPH.senders), "receiver": list(GRAPH.receivers)}
    data = xr.DataArray(scores.numpy(), dims=tuple(labels), coords=labels)
    plain = circuits.from_scores(MODEL, scores, 60, prune=False)
    mixed = data.isel(sender=slice(None, None, -1), receiver=torch.randperm(len(GRAPH.receivers)).numpy())
    for given in (data, mixed, data.drop_vars(list(labels))):
        found = circuits.from_scores(MODEL, given, 60, prune=False)
        assert (found.senders, bool((found.kept == plain.kept).all())) == (GRAPH.senders, True)
    other = data.assign_coords(receiver=["9.mlp.in", *GRAPH.receivers[1:]])
    with pytest.raises(mt.errors.DataError, match=r"the receivers of these scores .*got 9\.mlp\.in"):
        circuits.from_scores(MODEL, other, 60)
    twice = data.assign_coords(sender=[*GRAPH.senders[:-1], GRAPH.senders[1]])
    with pytest.raises(mt.errors.DataError, match="the senders of these scores"):
        circuits.from_scores(MODEL, twice, 60)
    with pytest.raises(mt.errors.DataError, match="these are no scores of edges"):
        circuits.from_scores(MODEL, data.rename(sender="unit"), 60)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_pruning_changes_no_value_where_edges_are_not_resampled(ablation: str) -> None:
    pairs = mt.explain.pairs_of(MODEL, ids(0), ids(1), answer=11, foil=13)
    bench = Bench(MODEL, pairs, None, ablation)
    far: list[float] = []
    for seed in range(3, 9):
        scores = torch.rand(GRAPH.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        whole = circuits.from_scores(MODEL, scores, 0.2, prune=False, ablation=ablation)
        pruned = circuits.from_scores(MODEL, scores, 0.2, ablation=ablation)
        resampled = circuits.from_scores(MODEL, scores, 0.2)
        assert resampled.n_edges <= pruned.n_edges < whole.n_edges
        assert (pruned | resampled).pruned().n_edges == pruned.n_edges
        values = bench.measure(torch.stack([whole.kept, pruned.kept, resampled.kept]))[:, 0]
        assert float((values[0] - values[1]).abs()) < 1e-5
        far.append(float((values[0] - values[2]).abs()))
    assert max(far) > 1e-4


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_exact_scores_are_of_the_ablation(ablation: str) -> None:
    metric = mt.metric.LogitDifference(11, foil=13)
    pairs = mt.explain.pairs_of(MODEL, ids(0), ids(1), metric=metric)
    found = circuits.mean_scores(MODEL, pairs, "exact", ablation)
    plain = PlainCircuit(ungrouped(HF), (GRAPH.senders, GRAPH.receivers))
    base = plain(ids(0), set(), {})[0, -1]
    own = dict(plain.writes)
    mean = {k: x.mean((0, 1), keepdim=True) for k, x in own.items()}
    other = mean if ablation == "mean" else {k: torch.zeros_like(x) for k, x in own.items()}
    for sender, receiver in (("0.attn.z[1]", "2.mlp.in"), ("embed", "1.attn.v[0]"), ("1.mlp_out", "final")):
        z = plain(ids(0), {(sender, receiver)}, other)[0, -1]
        expected = float(z[11] - z[13] - base[11] + base[13])
        value = float(found[GRAPH.senders.index(sender), GRAPH.receivers.index(receiver)])
        assert value == pytest.approx(expected, abs=2e-5)
    resampled = circuits.mean_scores(MODEL, pairs, "exact")
    assert float((found - resampled).abs().nan_to_num(0).max()) > 1e-2


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupted"])
def test_estimates_are_those_of_attribute_whatever_is_read(method: str) -> None:
    given: dict[str, Any] = {"answer": 11, "foil": 13, "method": method, "direction": "noise", "verify": 0}
    expected = mt.explain.attribute(MODEL, ids(0), ids(1), **given)["score"].values
    metric = mt.metric.LogitDifference(11, foil=13)
    found = circuits.find(MODEL, ids(0), ids(1), metric=metric, method=method, edges=0.3)
    assert torch.allclose(found.scores, torch.from_numpy(expected), atol=1e-6, equal_nan=True)
    read = mt.metric.FunctionMetric(lambda logits, prompts: logits[:, -1, 11] - logits[:, -1, 13])
    assert circuits.find(MODEL, ids(0), ids(1), metric=read, method="greedy", edges=0.3).n_edges > 0


def test_an_edge_that_an_estimate_needs_is_below_0() -> None:
    found = circuits.circuit(MODEL, ids(0), ids(1), method="eap", edges=0.3, answer=11, foil=13, draws=1, verify=5)
    assert "below 0, the answer needs it" in found.attrs["reading"]
    pairs = mt.explain.pairs_of(MODEL, ids(0), ids(1), answer=11, foil=13)
    exact = torch.from_numpy(found["score_exact"].values)
    some = exact.isfinite()
    assert int(some.sum()) == 5
    assert torch.allclose(exact[some], circuits.mean_scores(MODEL, pairs, "exact")[some], atol=1e-5)


@pytest.mark.parametrize("cost", ["kl", pytest.param("metric", marks=pytest.mark.slow)])
def test_an_edge_that_acdc_needs_is_above_0_in_what_it_costs(cost: str) -> None:
    read = mt.metric.LogitDifference(11, foil=13)
    given: dict[str, Any] = {"metric": read, "cost": cost, "tau": 3e-2, "draws": 1, "verify": 5}
    found = circuits.circuit(MODEL, ids(0), ids(1), method="acdc", **given)
    assert "above 0, the answer needs it" in found.attrs["reading"]
    sign, metric = (1.0, mt.metric.Divergence.of(MODEL.run(ids(0)))) if cost == "kl" else (-1.0, read)
    assert found["score_exact"].attrs["unit"] == found["score"].attrs["unit"] == ("nats" if cost == "kl" else "logits")
    engine = mt.sweep.Circuits(MODEL, ids(0), ids(1), metric)
    exact = torch.from_numpy(found["score_exact"].values)
    assert int(exact.isfinite().sum()) == 5
    for u, v in exact.isfinite().nonzero().tolist():
        kept = engine.edges.clone()
        kept[u, v] = False
        expected = sign * float(engine.measure(kept) - engine.clean.values)
        assert float(exact[u, v]) == pytest.approx(expected, abs=1e-5)


def test_words_are_no_number_of_edges() -> None:
    for wrong in ("many", None, True):
        with pytest.raises(mt.errors.ArgumentError, match=r"edges must be a number of edges, .*allowed: 1 to 9"):
            number_of(wrong, 9)
    assert [number_of(x, 200) for x in (0.1, 1, 7.0, 200)] == [20, 1, 7, 200]


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(mt.errors.DataError, match='records "x", which no file can hold; got Tensor'):
        circuits.of_mask(MODEL, GRAPH.mask, x=torch.zeros(1)).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_overlap_of_two_circuits_and_its_null() -> None:
    a = drawn(0)
    same = a.overlap(a).sel(unit="edges")
    assert float(same["jaccard"]) == 1.0
    assert float(same["p"]) == pytest.approx(1 / 2001)
    assert float(same["hypergeometric"]) < 1e-20
    ps = [float(a.overlap(drawn(seed), seed=seed)["p"].sel(unit="edges")) for seed in range(1, 41)]
    assert 0.3 < sum(ps) / len(ps) < 0.75  # of independent circuits they are spread evenly
    # Two circuits that only share a taste for late MLPs: edges drawn from all alike take that for agreement.
    late = torch.tensor(
        [[(".mlp_out" in s and r == "final") or r.startswith("2.mlp") for r in GRAPH.receivers] for s in GRAPH.senders]
    )
    p, plain = [], []
    for seed in range(20):
        pair = []
        for k in (0, 100):
            g = torch.Generator().manual_seed(seed + k)
            scores = torch.rand(GRAPH.mask.shape, generator=g, dtype=torch.float64) + 0.6 * late
            pair.append(circuits.from_scores(MODEL, scores, 0.05, prune=False))
        found = pair[0].overlap(pair[1]).sel(unit="edges")
        p.append(float(found["p"]))
        plain.append(float(found["hypergeometric"]))
    assert sum(x < 0.05 for x in plain) > 10 > 3 * sum(x < 0.05 for x in p)


def test_it_is_saved_and_read_again(tmp_path: Path) -> None:
    a = drawn(0)
    path = a.save(tmp_path / "circuit.safetensors")
    b = circuits.load(path, MODEL)
    assert (b.senders, b.receivers, dict(b.attrs)) == (a.senders, a.receivers, dict(a.attrs))
    assert bool((b.kept == a.kept).all())
    assert torch.equal(b.scores.nan_to_num(-1), a.scores.nan_to_num(-1))
    data = a.dataset()
    assert int(data["writes"].sum() + data["mlp_writes"].sum()) + int(a.kept[0].sum()) == a.n_edges
    assert int(data["reads"].sum() + data["mlp_reads"].sum()) + int(a.kept[:, -1].sum()) == a.n_edges
    assert "score" in str(mt.view.View(data))


def test_a_circuit_of_another_model_is_refused(tmp_path: Path) -> None:
    path = drawn(0).save(tmp_path / "circuit.safetensors")
    other = mt.open(families.build("llama-mha"), prove=False)
    with pytest.raises(mt.errors.DataError, match="this circuit is one of another model; got"):
        circuits.load(path, other)
    with pytest.raises(mt.errors.DataError, match="is one of another model"):
        circuits.faithfulness(other, drawn(0), ids(0)[0].tolist(), ids(1)[0].tolist(), answer=11)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(mt.errors.DataError, match="cannot read a circuit from"):
        circuits.load(tmp_path / "no.safetensors")
    big = mt.open(families.build("gpt2"), prove=False)
    with pytest.raises(mt.errors.MicrotomeError):
        circuits.from_scores(big, torch.zeros(3, 3), 5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "guess"}, "method must be one of acdc, eap"),
        ({"method": "eap", "edges": 1.0}, "1.0, which may be one or all"),
        ({"method": "eap", "edges": 2.5}, "edges must be a number of edges"),
        ({"method": "eap", "edges": 1}, "no edge is left in the circuit"),
        ({"method": "acdc", "tau": 1e9}, "no edge is left in the circuit"),
        ({"method": "acdc", "tau": float("nan")}, "tau must be a number"),
        ({"method": "exact", "ablation": "optimal"}, "exact would fit optimal constants anew for every edge"),
        ({"method": "acdc", "ablation": "optimal"}, "acdc would fit optimal constants anew for every edge"),
        ({"method": "mask", "ablation": "zero"}, "a mask cannot be learned against zero"),
        ({"cost": "loss"}, "cost must be one of kl, metric"),
        ({"ablation": "noise"}, "ablation must be one of resample"),
        ({"method": "eap", "edges": 0}, "edges must be a number of edges"),
        ({"method": "eap", "edges": 10**9}, "edges must be a number of edges"),
    ],
)
def test_options_that_are_none_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(mt.errors.ArgumentError, match=text):
        circuits.find(MODEL, ids(0)[0].tolist(), ids(1)[0].tolist(), answer=11, foil=13, **change)  # type: ignore


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupted", "exact", "greedy", "acdc"])
def test_circuits_are_found(method: str) -> None:
    clean, corrupt = [[*ids(s)[0].tolist()] for s in (0, 2)], [[*ids(s)[0].tolist()] for s in (1, 3)]
    found = circuits.find(MODEL, clean, corrupt, method=method, answer=[11, 12], foil=[13, 14], edges=0.2, tau=1e-3)
    assert 0 < found.n_edges < GRAPH.n_edges
    assert found.attrs["pairs"] == 2
    assert found.attrs["fingerprint"] == MODEL.fingerprint
    if method == "exact":
        each = [
            mt.explain.edge_effects(MODEL, c, k, answer=a, foil=f, direction="noise")["effect"].values
            for c, k, a, f in zip(clean, corrupt, (11, 12), (13, 14), strict=True)
        ]
        mean = torch.from_numpy((each[0] + each[1]) / 2)
        assert float((mean - found.scores).abs().nan_to_num(0).max()) < 1e-5


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": "eap-ig", "steps": 0}, "steps of a method; got 0; allowed: 1 or more"),
        ({"method": "mask", "steps": -3}, "steps of a method; got -3; allowed: 1 or more"),
        ({"method": "mask", "mask": PLAN, "steps": 4}, "mask= says how a mask is learned; got steps too"),
        ({"method": "mask", "mask": PLAN, "sparsity": 1.0, "steps": 4}, "got steps and sparsity too"),
        ({"method": "eap", "mask": PLAN}, "eap learns no mask; got mask="),
        ({"method": "acdc", "scores": GRAPH.mask.double()}, "acdc finds its edges without scores; got scores="),
        ({"method": "mask", "scores": GRAPH.mask.double()}, "mask finds its edges without scores; got scores="),
    ],
)
def test_options_that_would_not_be_used_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(mt.errors.ArgumentError, match=text):
        circuits.find(MODEL, ids(0)[0].tolist(), ids(1)[0].tolist(), answer=11, foil=13, **given)


def test_eap_ig_takes_the_steps_that_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def scores(*_: Any) -> torch.Tensor:
        taken.append(_[-1])
        return drawn(0).scores

    monkeypatch.setattr("microtome.circuits._find.mean_scores", scores)
    for steps in (None, 1, 7):
        circuits.find(
            MODEL, ids(0)[0].tolist(), ids(1)[0].tolist(), answer=11, foil=13, method="eap-ig", steps=steps, edges=0.5
        )
    assert taken == [5, 1, 7]
