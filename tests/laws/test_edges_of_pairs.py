"""Edges scored over many pairs and along ways between two prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests import families
from tests.agreement import agreed
from tests.linear import linear

import microtome as mt
from microtome.explain import graph

METHODS = ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted")
CLEAN, CORRUPT = [7, 20, 33, 41, 52, 28], [7, 20, 64, 41, 52, 28]
MANY = [
    (CLEAN, CORRUPT, 11, 13),
    ([3, 9, 40, 22], [3, 70, 40, 22], 5, 8),
    ([5, 21, 34, 42, 53, 29], [5, 21, 65, 42, 53, 29], 12, 14),
    ([8, 2, 30, 61], [8, 2, 31, 61], 60, 2),
]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def scored(model: mt.Model, method: str, **more: Any) -> Any:
    given: dict[str, Any] = {"answer": 11, "foil": 13, "verify": 0, "direction": "noise"}
    return mt.explain.attribute(model, CLEAN, CORRUPT, method=method, **(given | more))


def together(model: mt.Model, method: str, some: Any = slice(None), **more: Any) -> Any:
    clean, corrupt, answer, foil = (list(x) for x in zip(*MANY[some], strict=True))
    given: dict[str, Any] = {"answer": answer, "foil": foil, "verify": 0, "direction": "noise"}
    return mt.explain.attribute(model, clean, corrupt, method=method, **(given | more))


# ------------------------------------------------------------------------------------------------------------ one pair


def test_all_are_equal_where_the_model_is_linear() -> None:
    net = linear()
    exact = mt.explain.edge_effects(net, CLEAN, CORRUPT, answer=11, foil=13, direction="noise")
    width = float(abs(exact["effect"]).max())
    for method in METHODS:
        found = scored(net, method, steps=2)
        assert float(found["gap"]) < 1e-6
        agreed(found["score"] / width, exact["effect"] / width, 1e-5, most=0.3)


def test_one_step_is_the_gradient_at_the_corrupt_prompt(model: mt.Model) -> None:
    at_corrupt = scored(model, "eap", direction="denoise")
    one = scored(model, "eap-ig", steps=1, direction="denoise")
    agreed(one["score"], at_corrupt["score"], 1e-5, most=0.3)
    # From the clean prompt the same gradient says what corrupting does.
    agreed(-scored(model, "eap-ig", steps=1)["score"], at_corrupt["score"], 1e-5, most=0.3)
    at_clean = scored(model, "eap")
    agreed(scored(model, "clean-corrupted")["score"], (at_clean["score"] - at_corrupt["score"]) / 2, 1e-5, most=0.3)
    assert float(abs(at_clean["score"] + at_corrupt["score"]).max()) > 1e-3


def test_many_steps_are_complete(model: mt.Model) -> None:
    few, many = (float(scored(model, "eap-ig", steps=steps)["gap"]) for steps in (5, 40))
    assert many < 0.2 * few  # the left rule leaves a gap that falls like 1 / m
    assert few > 0.05
    found = scored(model, "eap-ig", steps=40)
    whole = float(found["corrupt"] - found["clean"])
    assert float(found["score"].sel(sender="embed").sum()) == pytest.approx(whole, rel=0.02)
    assert found["score"].attrs["unit"] == "logits"


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_the_edges_of_a_sender_add_up_to_its_exact_effect(model: mt.Model, direction: str) -> None:
    """Along its own way an MLP's edges are complete; heads go together, so theirs add up to that of their layer."""
    found = scored(model, "eap-ig-activations", steps=24, direction=direction)["score"].sum("receiver")
    exact = mt.explain.node_effects(model, CLEAN, CORRUPT, answer=11, foil=13, direction=direction)["effect"]
    width = float(abs(exact).max())
    alone = ["embed", *(f"{i}.mlp_out" for i in range(model.anatomy.n_layers))]
    assert float(abs(found.sel(sender=alone) - exact.sel(sender=alone)).max()) < 1e-3 * width
    start, goal = (CLEAN, CORRUPT) if direction == "noise" else (CORRUPT, CLEAN)
    source = model.run([goal], capture="*.attn.z")
    for layer in range(model.anatomy.n_layers):
        edit = mt.edit.Patch(f"{layer}.attn.z", source=source)
        logits = [model.run([start], edits=edits).logits[0, -1].double() for edits in ([], [edit])]
        effect = float((logits[1] - logits[0])[11] - (logits[1] - logits[0])[13])
        heads = [f"{layer}.attn.z[{h}]" for h in range(model.anatomy.n_heads)]
        assert float(found.sel(sender=heads).sum()) == pytest.approx(effect, abs=1e-3 * width)
    # From one gradient they do not.
    plain = scored(model, "eap", direction=direction)["score"].sum("receiver")
    assert float(abs(plain.sel(sender=alone) - exact.sel(sender=alone)).max()) > 1e-2 * width


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gptj", "gemma2", "gpt2"])
def test_other_families(name: str, method: str) -> None:
    other = mt.open(families.build(name), prove=False)
    found = scored(other, method, steps=2)
    assert int(found["score"].notnull().sum()) == graph(other).n_edges
    assert np.isfinite(float(found["gap"]))


def test_other_weights_give_another_map(model: mt.Model) -> None:
    """The control: with weights drawn anew from the last layer down, ever less is left of the ranks of the edges."""
    whole = scored(model, "eap-ig", steps=3)["score"].values
    there = np.isfinite(whole)
    left: list[float] = []
    hf = families.build("llama-gqa")
    rng = torch.Generator().manual_seed(1)
    for layer in reversed(hf.model.layers):
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn(parameter.shape, generator=rng) * parameter.std()
        other = scored(mt.open(hf, prove=False), "eap-ig", steps=3)["score"].values
        left.append(abs(float(spearmanr(whole[there], other[there]).statistic)))
    assert left[-1] < 0.3 < 0.99
    again = scored(mt.open(families.build("llama-gqa"), prove=False), "eap-ig", steps=3)["score"].values
    assert float(spearmanr(whole[there], again[there]).statistic) > 0.999


# --------------------------------------------------------------------------------------------------------- many pairs


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_over_pairs_is_that_of_each_alone(model: mt.Model, method: str) -> None:
    given: dict[str, Any] = {"method": method, "steps": 2, "verify": 0, "direction": "noise"}
    alone = [mt.explain.attribute(model, a, b, answer=x, foil=y, **given) for a, b, x, y in MANY]
    found = together(model, method, steps=2)
    assert found["score"].dims == ("sender", "receiver")
    agreed(found["score"], np.mean([one["score"].values for one in alone], axis=0), 1e-5, most=0.3)
    for end in ("clean", "corrupt"):
        np.testing.assert_allclose(found[end], [float(one[end]) for one in alone], rtol=1e-4)
    assert found.attrs["pairs"] == 4
    assert int(found["score"].notnull().sum()) == graph(model).n_edges


def test_means_have_intervals(model: mt.Model) -> None:
    rng = torch.Generator().manual_seed(0)
    clean = torch.randint(2, 90, (9, 5), generator=rng)
    corrupt = clean.clone()
    corrupt[:, 1] = (corrupt[:, 1] + 7) % 90
    data = mt.explain.attribute(model, clean, corrupt, answer=11, foil=13, method="eap", verify=0)
    inside = (data["score_lo"] <= data["score"]) & (data["score"] <= data["score_hi"])
    assert bool((inside | data["score"].isnull()).all())
    given: dict[str, Any] = {"answer": 11, "foil": 13, "method": "eap", "verify": 0}
    each = [mt.explain.attribute(model, a, b, **given)["score"].values for a, b in zip(clean, corrupt, strict=True)]
    there = np.isfinite(each[0])
    low = mt.stream.mean_interval(torch.tensor(np.array(each)[:, there]))[1]
    np.testing.assert_allclose(data["score_lo"].values[there], low, rtol=1e-5, atol=1e-5)


def test_the_best_are_measured_over_all_pairs(model: mt.Model) -> None:
    data = together(model, "eap-ig", verify=6)
    measured = data["score_exact"].stack(edge=("sender", "receiver")).dropna("edge")
    assert measured.sizes["edge"] == 12 == int(data["measured"][0])
    each = [mt.explain.edge_effects(model, a, b, answer=x, foil=y, direction="noise")["effect"] for a, b, x, y in MANY]
    whole = sum(each) / len(each)
    expected = [float(whole.sel(sender=s, receiver=r)) for s, r in measured["edge"].values]
    agreed(measured.values, np.array(expected), 1e-5)
    again = mt.explain.verify(model, together(model, "eap-ig"), top=6)
    np.testing.assert_allclose(again["score_exact"], data["score_exact"], atol=1e-6)


def test_nodes_of_many_pairs(model: mt.Model) -> None:
    some, sites = slice(0, 3, 2), ["mlp_out", "attn.z[head]"]  # the two of one length
    for method in ("atp", "atp*", "ig"):
        given: dict[str, Any] = {"method": method, "sites": sites, "verify": 0, "direction": "noise"}
        alone = [mt.explain.attribute(model, a, b, answer=x, foil=y, **given) for a, b, x, y in MANY[some]]
        found = together(model, method, some, sites=sites)
        for site in sites:
            agreed(found[site], (alone[0][site] + alone[1][site]) / 2, 1e-5, most=0.5)
            assert found[f"{site}_each"].sizes["example"] == 2
    by_head = together(model, "atp", sites=["attn.z[head]"], verify=2)
    assert int(by_head["measured"][0]) == 4
    exact = by_head["attn.z[head]_exact"]
    layer, head = (int(i) for i in np.argwhere(np.isfinite(exact.values))[0])
    given = {"sites": ["attn.z[head]"], "direction": "noise", "share": False}
    each = [mt.explain.patch(model, a, b, answer=x, foil=y, **given)["attn.z[head]"] for a, b, x, y in MANY]
    truth = float(np.mean([float(one[layer, head]) for one in each]))
    assert float(exact[layer, head]) == pytest.approx(truth, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_how_many_prompts_are_answered_is_reported(model: mt.Model) -> None:
    found = together(model, "eap")
    right = float((found["clean"] > 0).mean())
    assert float(found["answered"]) == pytest.approx(right)
    logits = model.run([CLEAN]).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    for answer, share in ((best, 1.0), (worst, 0.0)):
        alone = scored(model, "eap", answer=answer, foil=None)
        assert float(alone["answered"]) == share
    mixed = mt.explain.attribute(model, [CLEAN] * 2, [CORRUPT] * 2, answer=[best, worst], method="eap", verify=0)
    assert float(mixed["answered"]) == 0.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"method": "atp", "sites": ["mlp_out"]},
            r"pairs of several lengths .*got \[4, 6\]. To do: name sites",
        ),
        ({"steps": 0}, r"steps must be an integer of 1 or more \(points\); got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(model: mt.Model, change: dict[str, Any], text: str) -> None:
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        together(model, **({"method": "eap-ig"} | change))
