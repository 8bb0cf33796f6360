"""Integrated gradients of nodes: complete to the exact effect of a whole site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.agreement import agreed
from tests.linear import linear

import microtome as mt
from microtome.explain import _integrated as integrated
from microtome.explain._quadrature import integrate

CLEAN, CORRUPT = [7, 20, 33, 41, 52, 28], [7, 20, 64, 41, 52, 28]
SITES = ["resid_pre", "mlp_out", "attn.z[head]", "attn.pattern[head]"]


def scored(model: mt.Model, method: str = "ig", **more: Any) -> Any:
    given: dict[str, Any] = {"answer": 11, "foil": 13, "verify": 0, "direction": "noise", "sites": SITES}
    return mt.explain.attribute(model, CLEAN, CORRUPT, method=method, **(given | more))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gptj"])
def test_scores_add_up_to_the_effect_of_the_whole_site(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    data = scored(model)
    width = float(abs(data["corrupt"] - data["clean"]))
    source = model.run([CORRUPT], capture=["*.resid_pre", "*.mlp_out", "*.attn.z", "*.attn.pattern"])
    base = model.run([CLEAN]).logits[0, -1].double()
    for site in SITES:
        for layer in range(model.anatomy.n_layers):
            patched = model.run([CLEAN], edits=[mt.edit.Patch(f"{layer}.{site.partition('[')[0]}", source=source)])
            change = patched.logits[0, -1].double() - base
            total = float(data[site][layer].sum())
            left = abs(total - float(change[11] - change[13]))
            assert left <= 0.011 * width
            assert left / width == pytest.approx(float(data["ig_gap"].sel(site=site)[layer]), abs=2e-5)
    assert float(data["ig_gap"].max()) <= 0.01
    assert int(data["ig_steps"].min()) == 5


def test_a_gap_that_is_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = families.build("llama-gqa")
    for layer in hf.model.layers:
        layer.self_attn.q_proj.weight.data *= 8
    model = mt.open(hf, prove=False)
    sites = ["resid_pre"]
    whole = scored(model, sites=sites)
    assert float(whole["ig_gap"].max()) <= 0.01
    assert int(whole["ig_steps"].max()) > 5
    monkeypatch.setattr(integrated, "MOST_STEPS", 1)
    data = scored(model, steps=1, sites=sites)
    assert float(data["ig_gap"].max()) > 0.02
    assert int(data["ig_steps"].max()) == 1


def test_it_is_the_gradient_where_the_model_is_linear() -> None:
    net = linear()
    data, plain = scored(net, steps=1), scored(net, "atp")
    width = float(abs(data["corrupt"] - data["clean"]))
    for site in SITES[:3]:
        agreed(data[site] / width, plain[site] / width, 1e-5, most=0.5)
    assert int(data["ig_steps"].max()) == 1


def test_points_gather_where_the_metric_turns() -> None:
    """A step of width 1e-4: m(t) = tanh((t - 0.37) / 1e-4), one part of slope m', another of none."""

    def read(at: Any) -> torch.Tensor:
        return torch.tanh((torch.tensor(at, dtype=torch.float64) - 0.37) / 1e-4)

    def scores(at: Any, weights: Any) -> torch.Tensor:
        slope = 1e4 * (1 - read(at).square())
        return torch.stack([(slope * torch.tensor(weights, dtype=torch.float64)).sum(), torch.zeros(()).double()])

    found = integrate(read, scores, points=4, most=400, tolerance=0.01)
    assert found.gap <= 0.01
    assert found.points < 200
    assert found.scores.tolist() == pytest.approx([2.0, 0.0], abs=0.01)
    spaced = integrate(read, scores, points=200, most=200, tolerance=0.01)
    assert spaced.gap > 0.5


def test_heads_of_a_pattern_are_scored_as_units() -> None:
    """The axis of heads, not that of queries: six positions, four heads."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    for method in ("atp", "ig"):
        assert scored(model, method, sites=["attn.pattern[head]"])["attn.pattern[head]"].sizes == {
            "layer": 3,
            "head": 4,
        }
