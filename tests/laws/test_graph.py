"""The graph: its edges are counted right, and are exactly those that an edge cell can be made of."""

from __future__ import annotations

import pytest
from tests import families

import microtome as mt
from microtome.explain import graph
from microtome.explain._graph import graph_of_size


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "edges"),
    [(12, 12, 32_491), (30, 9, 123_211), (32, 15, 367_521)],  # GPT-2 small (the published count), SmolLM2-135M, -360M
)
def test_the_published_number_of_edges(n_layers: int, n_heads: int, edges: int) -> None:
    found = graph_of_size(n_layers, n_heads, parallel=False)
    assert found.n_edges == edges
    assert len(found.senders) == 1 + n_layers * (n_heads + 1)
    assert len(found.receivers) == n_layers * (3 * n_heads + 1) + 1
    assert graph_of_size(n_layers, n_heads, parallel=True).n_edges == edges - n_layers * n_heads


@pytest.mark.parametrize("name", ["llama-gqa", "gptj"])
def test_edges_are_the_pairs_that_a_cell_can_be_made_of(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    found = graph(model)
    tokens = [[7, 20, 33]]
    source = model.run(tokens, capture=["embed", "*.attn.z", "*.mlp_out"])
    metric = mt.metric.LogitDifference(11, foil=13)
    assert found.senders[:6] == ("embed", "0.attn.z[0]", "0.attn.z[1]", "0.attn.z[2]", "0.attn.z[3]", "0.mlp_out")
    assert found.receivers[:2] == ("0.attn.q[0]", "0.attn.q[1]")
    assert found.receivers[4] == "0.attn.k[0]"
    assert found.receivers[12:14] == ("0.mlp.in", "1.attn.q[0]")
    assert found.receivers[-1] == "final"
    for i, sender in enumerate(found.senders):
        for j, receiver in enumerate(found.receivers):
            if found.mask[i, j]:
                mt.sweep.Edge(sender, receiver, source=source)
            else:
                with pytest.raises(mt.errors.EditError, match="does not come before"):
                    model.sweep(tokens, [mt.sweep.Edge(sender, receiver, source=source)], metric).run()


def test_a_stream_with_norms_on_it_has_no_graph() -> None:
    with pytest.raises(mt.errors.SiteError, match="has no edges between heads and MLPs"):
        graph(mt.open(families.build("bert"), prove=False))
