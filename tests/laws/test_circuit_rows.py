"""A circuit is one row: with all edges it is the clean run, with none the other one, and between them plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.agreement import Agreement, agreed
from tests.laws.test_edges import FAMILIES, ids, ungrouped
from tests.plain_circuits import PlainCircuit
from torch import Tensor

import microtome as mt
from microtome.sweep import Circuits

READ = mt.metric.FunctionMetric(lambda logits, prompts: logits.flatten(1), positions=(-1, 5))


def two(seed: int) -> Tensor:
    return torch.cat([ids(seed), ids(seed + 10)])


def read_of(logits: Tensor) -> Tensor:
    return logits[:, [-1, 5]].flatten(1)


def some(engine: Circuits, share: float, seed: int = 0) -> Tensor:
    return engine.edges & (torch.rand(engine.edges.shape, generator=torch.Generator().manual_seed(seed)) < share)


def plain(model: mt.Model, hf: Any, kept: Tensor, edges: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
    """What `READ` reads of a circuit by plain hooks."""
    graph = mt.explain.graph(model)
    circuit = PlainCircuit(hf, (graph.senders, graph.receivers))
    circuit(corrupt, set(), {})
    other = dict(circuit.writes)
    out = {(graph.senders[u], graph.receivers[v]) for u, v in (edges & ~kept).nonzero().tolist()}
    return read_of(circuit(clean, out, other))


@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_are_the_clean_run_and_none_the_other(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    clean, corrupt = two(0), two(1)
    engine = Circuits(model, clean, corrupt, READ)
    ends = [read_of(model.run(tokens).logits) for tokens in (clean, corrupt)]
    gap = float((ends[0] - ends[1]).abs().max())
    none = torch.zeros_like(engine.edges)
    agree = Agreement(1e-4 * max(gap, 1.0))
    for kept, end in ((engine.edges, ends[0]), (none, ends[1])):
        agree(engine.measure(kept), end, name)
    # From a circuit between them, each of its layers computed anew, it is as far to either end.
    between = engine.state(some(engine, 0.5))
    assert float((between.values - ends[0]).abs().max()) > 0.05 * gap
    agree(engine.measure(some(engine, 0.5)), between.values, name)
    for kept, end in ((engine.edges, ends[0]), (none, ends[1])):
        agree(engine.measure(kept, start=between), end, name)
    agree.stands_out(0.5)


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "llama-mqa", "llama-bias"])
def test_a_circuit_is_that_of_plain_hooks(name: str) -> None:
    hf = families.build(name)
    model, at_least_float32 = mt.open(hf, prove=False), ungrouped(hf)
    clean, corrupt = two(0), two(1)
    engine = Circuits(model, clean, corrupt, READ)
    agree = Agreement(5e-5)
    kept = torch.stack([some(engine, share, seed) for seed, share in enumerate((0.1, 0.5, 0.9, 0.97))])
    values = engine.measure(kept)
    base = read_of(model.run(clean).logits)
    for i, mask in enumerate(kept):
        expected = plain(model, at_least_float32, mask, engine.edges, clean, corrupt)
        agree.cell(values[i], expected, base, (name, i))
    agree.stands_out(1.0)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gemma3", "gpt2", "falcon-gqa", "olmo2"])
def test_own_weights_are_the_projections_of_the_model(name: str) -> None:
    """Where a norm spans all heads the projections of the model are used, and elsewhere they give the same."""
    model = mt.open(families.build(name), prove=False)
    engine = Circuits(model, two(0), two(1), READ)
    kept = some(engine, 0.5)
    fast = engine.measure(kept)
    assert engine.own_weights == (name != "olmo2")
    engine.own_weights = False
    agreed(engine.measure(kept), fast, 2e-5)


def test_one_edge_that_is_out_is_that_edge_of_a_sweep() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    clean, corrupt = ids(0), ids(1)
    engine, graph = Circuits(model, clean, corrupt, READ), mt.explain.graph(model)
    source = model.run(corrupt, capture=["embed", "*.attn.z", "*.mlp_out"])
    places = engine.edges.nonzero()[torch.randperm(int(engine.edges.sum()), generator=torch.Generator())[:60]]
    kept = engine.edges.repeat(len(places), 1, 1)
    kept[torch.arange(len(places)), places[:, 0], places[:, 1]] = False
    values = engine.measure(kept)[:, 0]
    cells = [mt.sweep.Edge(graph.senders[u], graph.receivers[v], source=source) for u, v in places.tolist()]
    swept = model.sweep(clean, cells, READ).run()
    agree = Agreement(2e-5)
    for value, expected, place in zip(values, swept.values, places.tolist(), strict=True):
        agree.cell(value, expected, swept.base[0], place)
    agree.stands_out(0.8)


def test_a_node_without_its_edges_is_ablated() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    clean = two(0)
    engine, graph = Circuits(model, clean, torch.zeros(1, 1, 1, 1), READ), mt.explain.graph(model)
    agree = Agreement(2e-5)
    base = read_of(model.run(clean).logits)
    for sender in ("0.attn.z[1]", "1.mlp_out", "2.attn.z[3]"):
        kept = engine.edges.clone()
        kept[graph.senders.index(sender)] = False
        expected = read_of(model.run(clean, edits=[mt.edit.Zero(sender)]).logits)
        agree.cell(engine.measure(kept), expected, base, sender)
    agree.stands_out(1.0)


def test_rows_in_which_edges_go_one_after_the_other() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    engine = Circuits(model, two(0), two(1), READ)
    start = engine.state(some(engine, 0.5))
    agree = Agreement(2e-5)
    for receiver in (engine.numbering.receivers - 1, engine.numbering.mlp_in(1), engine.numbering.inputs(1).start + 5):
        senders = start.kept[:, receiver].nonzero().flatten().tolist()
        ran, n = engine.removing(start, receiver, senders)
        rows = ran.values.unflatten(0, (len(senders), n))
        for i in range(len(senders)):
            kept = start.kept.clone()
            kept[senders[: i + 1], receiver] = False
            expected = engine.measure(kept)
            agree.cell(rows[i], expected, start.values, (receiver, i))
        last = torch.arange(n) + n * (len(senders) - 1)
        kept = start.kept.clone()
        kept[senders, receiver] = False
        after = engine.accept(start, ran, kept, last)
        agree.cell(
            engine.measure(some(engine, 0.4, 7), start=after), engine.measure(some(engine, 0.4, 7)), after.values
        )
    agree.stands_out(0.5)


def test_inside_editing_they_are_circuits_of_the_changed_model() -> None:
    hf, changed = families.build("llama-gqa"), families.build("llama-gqa")
    model, layers, width = mt.open(hf, prove=False), changed.model.layers, hf.config.head_dim
    with torch.no_grad():
        layers[1].self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0
        layers[0].mlp.down_proj.weight *= 0.5
        layers[2].self_attn.v_proj.weight[:width] *= -1
        layers[1].mlp.up_proj.weight[7] = 0
    edits = [
        mt.edit.Zero("1.attn.z[2]"), mt.edit.Scale("0.mlp_out", 0.5), mt.edit.Scale("2.attn.v[0]", -1.0),
        mt.edit.Zero("1.mlp.up[7]"),
    ]  # fmt: skip
    expected = Circuits(mt.open(changed, prove=False), two(0), two(1), READ)
    kept = torch.stack([some(expected, 0.5), some(expected, 0.9, 1)])
    plain = Circuits(model, two(0), two(1), READ).measure(kept)
    with model.editing(*edits):
        found = Circuits(model, two(0), two(1), READ).measure(kept)
        with_vector = [mt.edit.Add("1.resid_pre", torch.ones(40))]
    agreed(found - plain, expected.measure(kept) - plain, 5e-5)
    with model.editing(*with_vector):
        engine = Circuits(model, two(0), two(1), READ)
        ends = [engine.measure(engine.edges), engine.measure(torch.zeros_like(engine.edges))]
        agreed(torch.stack(ends), torch.stack([read_of(model.run(t).logits) for t in (two(0), two(1))]), 1e-4)


def test_what_is_no_circuit_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.EditError, match="the other prompts do not fit the clean ones"):
        Circuits(model, two(0), two(1)[:, :4], READ)
    with pytest.raises(mt.errors.EditError, match=r"must be \[prompt, sender, pos, d_model\]"):
        Circuits(model, two(0), torch.zeros(2, 5, 1, 1), READ)
    for edit, text in (
        (mt.edit.Scale("1.resid_pre", 0.5), "it changes the sum that the stream is"),
        (mt.edit.Zero("1.attn_out"), "heads write what it changes"),
        (mt.edit.Mean("1.mlp_out"), "may depend on others"),
        (mt.edit.Zero("1.mlp_out", rows=(0,)), "it names rows"),
        (mt.edit.Zero("final"), "it acts behind the layers"),
    ):
        with model.editing(edit), pytest.raises(mt.errors.EditError, match=text):
            Circuits(model, two(0), two(1), READ)
    with pytest.raises(mt.errors.SiteError, match="has no edges between heads and MLPs"):
        Circuits(mt.open(families.build("bert"), prove=False), two(0), two(1), READ)
