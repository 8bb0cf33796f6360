"""Two circuits compared: what they share, and where their scores differ; before and after a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import ttest_ind
from tests import families
from tests.laws.test_circuits import GRAPH, MODEL, drawn
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits._differences import difference_of_means

GIVEN: dict[str, Any] = {"answer": 11, "foil": 13, "method": "eap", "edges": 0.3}


def scored(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *GRAPH.mask.shape, generator=generator, dtype=torch.float64)


def test_equal_circuits_share_all_and_differ_by_nothing() -> None:
    a = drawn(0)
    found = a.compare(a)
    assert found["jaccard"].values.tolist() == [1.0, 1.0]
    assert set(found["member"].values.tolist()) <= {0, 3}
    assert int((found["member"] == 3).sum()) == len(a.nodes)
    assert float(abs(found["difference"]).max()) == 0
    assert float(abs(found["node_difference"]).max()) == 0
    assert bool((found["edges"] == found["edges_other"]).all())
    other = circuits.compare(a, a, scores=(scored(9, 0), scored(9, 0)), paired=True)
    assert "5 % of them leave out 0" in other.attrs["intervals"]
    assert "intervals" not in found.attrs
    assert float(abs(other["difference"]).max()) == 0 == float(abs(other["node_difference_hi"]).max())


def test_members_and_edges_are_counted() -> None:
    a, b = drawn(0, 0.02), drawn(1, 0.02)
    found = a.compare(b)
    for name, code in zip(found["component"].values.tolist(), found["member"].values.tolist(), strict=True):
        assert code == (name in a.nodes) + 2 * (name in b.nodes)
        own = [u == name or circuits.node_of(v) == name for u, v, _ in a.listed]
        assert int(found["edges"].sel(component=name)) == sum(own)
    assert bool(found["edges"].equals(b.compare(a)["edges_other"]))
    assert torch.equal(torch.tensor(found["difference"].values).nan_to_num(7), (a.scores - b.scores).nan_to_num(7))


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_are_those_of_plain_tests(paired: bool) -> None:
    x, y = scored(9, 0)[:, :3, :4], 0.5 + 2 * scored(9 if paired else 8, 1)[:, :3, :4]
    mean, low, high = difference_of_means(x, y, paired=paired)
    assert torch.allclose(mean, x.mean(0) - y.mean(0))
    if paired:
        ends = mt.stream.mean_interval(x - y)[1:]
    else:
        found = ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
        ends = torch.as_tensor(found.low), torch.as_tensor(found.high)
    assert torch.allclose(low, ends[0], atol=1e-9)
    assert torch.allclose(high, ends[1], atol=1e-9)
    one = difference_of_means(x[:1], y, paired=False)
    assert bool(one[1].isnan().all())


def test_a_circuit_is_found_inside_of_an_edit_and_compared_with_the_one_before() -> None:
    clean, corrupt = ids(0)[0].tolist(), ids(1)[0].tolist()
    other: dict[str, Any] = GIVEN | {"method": "signal"}
    before = circuits.find(MODEL, clean, corrupt, **GIVEN)
    with MODEL.editing(mt.edit.Zero("1.attn.z[2]")):
        within = circuits.find(MODEL, clean, corrupt, **GIVEN)
        signal = circuits.find(MODEL, clean, corrupt, **other)
    changed = mt.open(families.build("llama-gqa"), prove=False)
    with torch.no_grad():
        changed.layers[1].W_O[2] = 0.0
    after = circuits.find(changed, clean, corrupt, **GIVEN)
    assert "1.attn.z[2]" in before.nodes
    for found in (within, after, signal):
        row = found.scores[found.senders.index("1.attn.z[2]")]
        assert float(row.nansum().abs()) < 1e-6
    compared = before.compare(after)
    assert int(compared["member"].sel(component="1.attn.z[2]")) == 1
    assert float(compared["jaccard"].sel(unit="edges")) < 1
    plain = within.compare(after)
    assert float(plain["jaccard"].sel(unit="nodes")) == 1.0


def test_what_does_not_fit_is_refused() -> None:
    a = drawn(0)
    with pytest.raises(mt.errors.DataError, match="scores of pairs must be \\[pair, sender, receiver\\]; got"):
        a.compare(a, scores=(scored(2, 0)[0], scored(2, 0)))
    with pytest.raises(mt.errors.DataError, match="scores that are paired must be of the same pairs; got 2 and 3"):
        a.compare(a, scores=(scored(2, 0), scored(3, 0)), paired=True)
    with pytest.raises(mt.errors.DataError, match="cannot read a circuit from nowhere"):
        circuits.compare("nowhere", a)
