"""AtP*: its closed form, a saturated softmax, and two ways that cancel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from tests import families
from tests.agreement import agreed

import microtome as mt
from microtome.explain._atp_star import Attention, star_scores
from microtome.explain._pairs import pairs_of

CLEAN, CORRUPT = [7, 20, 33, 41, 52, 28], [7, 20, 64, 41, 52, 28]
FIXED = ["attn.q", "attn.k", "attn.q[head]", "attn.k[head]"]


def scored(model: mt.Model, method: str, **more: Any) -> Any:
    given: dict[str, Any] = {"answer": 11, "foil": 13, "verify": 0, "direction": "noise"}
    return mt.explain.attribute(model, CLEAN, CORRUPT, method=method, **(given | more))


def attention(sink: bool) -> tuple[Attention, torch.Tensor]:
    """Random scores [1, 2, 7, 7] under a causal mask, changes of them, and the pattern's gradient."""
    rng = torch.Generator().manual_seed(3)
    scores = 3 * torch.randn(1, 2, 7, 7, generator=rng)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    column = torch.full((1, 2, 7, 1), 0.5 if sink else -torch.inf)
    pattern = torch.cat([scores, column], dim=-1).double().softmax(-1)[..., :-1]
    by_query, by_key = (2 * torch.randn(1, 2, 7, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    slope = torch.randn(1, 2, 7, 7, generator=rng, dtype=torch.float64)
    return Attention(scores, pattern, by_query, by_key), slope


@pytest.mark.parametrize("sink", [False, True])
def test_the_closed_form_is_the_softmax_formed_again(sink: bool) -> None:
    it, slope = attention(sink)
    found = it.keys(slope)
    for key in range(7):
        alone = torch.zeros_like(it.by_key)
        alone[..., key] = it.by_key[..., key]
        formed = ((it.softmax(alone) - it.softmax(torch.zeros_like(alone))) * slope).sum((-1, -2))
        torch.testing.assert_close(found[..., key], formed, rtol=0, atol=2e-15 if not sink else 1e-7)


def test_a_saturated_head_is_seen() -> None:
    """Attention of 0.99999 to a key whose score falls by 25: the gradient sees nothing, the closed form all of it."""
    scores = torch.tensor([[[[np.log(99_999.0), 0.0]]]], dtype=torch.float64)
    change = torch.tensor([[[[-25.0, 0.0]]]], dtype=torch.float64)
    slope = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    it = Attention(scores, scores.softmax(-1), change, change)
    p = scores.softmax(-1)[..., 0]
    plain = float((p * (1 - p) * change[..., 0]).sum())
    assert plain == pytest.approx(-2.5e-4, rel=1e-3)
    for found in (it.keys(slope)[0, 0, 0], it.keys_together(slope)[0, 0], it.queries(slope)[0, 0, 0]):
        assert float(found) == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize("drop", [600.0, 80.0])
def test_scores_beyond_the_range_of_numbers(drop: float) -> None:
    scores = torch.tensor([[[[drop, 0.0, 1.0]]]], dtype=torch.float64)
    change = torch.tensor([[[[-2 * drop, 0.0, 0.0]]]], dtype=torch.float64)
    it = Attention(scores, scores.softmax(-1), change, change)
    slope = torch.tensor([[[[1.0, 0.5, 0.0]]]], dtype=torch.float64)
    expected = 0.5 / (1 + np.e) - 1.0
    assert float(it.keys(slope)[0, 0, 0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bloom", "gpt_oss", "qwen3"])
def test_queries_and_keys_are_what_patching_does_to_the_pattern(name: str) -> None:
    """With the rest of the model linear in the pattern of the last layer, the correction is exact."""
    model = mt.open(families.build(name), prove=False)
    last = model.anatomy.n_layers - 1
    pairs = pairs_of(model, CLEAN, CORRUPT, answer=11, foil=13)
    run, goal = (model.run([t], capture=[f"{last}.attn.{s}" for s in ("q", "k", "pattern", "scores")], grad=True)
                 for t in (CLEAN, CORRUPT))  # fmt: skip
    it = Attention.of(run, goal, last)
    for site, change in (("q", it.by_query), ("k", it.by_key)):
        edit = mt.edit.Patch(f"{last}.attn.{site}", source=goal)
        pattern = model.run([CLEAN], capture=f"{last}.attn.pattern", edits=[edit])[f"{last}.attn.pattern"]
        torch.testing.assert_close(it.softmax(change).to(pattern), pattern, rtol=1e-4, atol=1e-5)
        assert float((pattern - run[f"{last}.attn.pattern"].detach()).abs().max()) > 1e-4
    assert pairs.lengths == [6]


def test_the_correction_is_nearer_to_the_truth_than_the_gradient() -> None:
    """Sharp attention, as of a planted head: queries and keys as the sweep measures them."""
    hf = families.build("llama-gqa")
    for layer in hf.model.layers:
        layer.self_attn.q_proj.weight.data *= 6
    model = mt.open(hf, prove=False)
    exact = mt.explain.patch(model, CLEAN, CORRUPT, answer=11, foil=13, direction="noise", sites=FIXED, share=False)
    errors = {}
    for method in ("atp", "atp*"):
        found = scored(model, method, sites=FIXED)
        errors[method] = {site: float(abs(abs(found[site]) - abs(exact[site])).mean()) for site in FIXED}
    for site in FIXED:
        assert errors["atp*"][site] < errors["atp"][site], (site, errors)


def test_two_ways_that_cancel_are_seen() -> None:
    """The last layer is scaled until the gradient of a node of the first is 0; its effect is not."""
    hf = families.build("llama-gqa")
    model = mt.open(hf, prove=False)
    layer = hf.model.layers[-1]
    own = [layer.self_attn.o_proj.weight.data.clone(), layer.mlp.down_proj.weight.data.clone()]

    def atp(scale: float, method: str = "atp", **more: Any) -> Any:
        layer.self_attn.o_proj.weight.data, layer.mlp.down_proj.weight.data = (scale * w for w in own)
        return scored(model, method, sites=["mlp_out"], **more)

    def score(scale: float) -> float:
        return float(atp(scale)["mlp_out"][0, 2])

    ends = np.linspace(-40, 40, 17)
    values = [score(x) for x in ends]
    crossing = next(i for i in range(16) if values[i] * values[i + 1] < 0)
    zero = brentq(score, ends[crossing], ends[crossing + 1], xtol=1e-9, rtol=1e-12)
    plain, star = (float(atp(zero, m)["mlp_out"][0, 2]) for m in ("atp", "atp*"))
    exact = mt.explain.patch(
        model, CLEAN, CORRUPT, answer=11, foil=13, direction="noise", sites=["mlp_out"], share=False
    )
    truth = float(exact["mlp_out"][0, 2])
    assert abs(plain) < 1e-4 * abs(star)
    assert abs(truth) > 10 * abs(plain)
    assert abs(star) > 10 * abs(plain)


def test_dropped_layers_are_those_of_a_model_without_their_gradient() -> None:
    """Each summand is that of a run whose branches in one layer are held for gradients."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    n = model.anatomy.n_layers
    pairs = pairs_of(model, CLEAN, CORRUPT, answer=11, foil=13)
    found = star_scores(model, pairs, "noise", None, ["mlp_out", "resid_pre"])[1]
    goal = model.run([CORRUPT], capture=["*.mlp_out", "*.resid_pre"])
    parts: dict[str, list[Any]] = {"mlp_out": [], "resid_pre": []}
    for dropped in range(n):
        base = model.run([CLEAN], capture=[f"{dropped}.attn_out", f"{dropped}.mlp_out"])
        held = [mt.edit.Set(f"{dropped}.{name}", value=base[f"{dropped}.{name}"]) for name in ("attn_out", "mlp_out")]
        run = model.run([CLEAN], capture=["*.mlp_out", "*.resid_pre"], edits=held, grad=True)
        slope = run.grad(run.logits[0, -1, 11] - run.logits[0, -1, 13])
        for site, rows in parts.items():
            change = [goal[f"{i}.{site}"] - run[f"{i}.{site}"].detach() for i in range(n)]
            own = [(x * slope[f"{i}.{site}"]).sum(-1)[0] for i, x in enumerate(change)]
            if site == "mlp_out":  # a set value is a leaf of its own: what reaches it does not come through the layer
                own[dropped] = torch.zeros(6)
            rows.append(torch.stack(own).double())
    expected = {"mlp_out": torch.stack(parts["mlp_out"]).abs().sum(0) / (n - 1),
                "resid_pre": torch.stack(parts["resid_pre"]).abs().mean(0)}  # fmt: skip
    for site, x in expected.items():
        agreed(found[site][0].abs(), x, 1e-5, most=0.5)


def test_capped_scores_are_refused() -> None:
    capped = mt.open(families.build("gemma2"), prove=False)
    with pytest.raises(mt.errors.SiteError, match="are no constant times queries times keys; got a gradient"):
        scored(capped, "atp*", sites=["attn.k"])
    assert scored(capped, "atp*", sites=["mlp_out"])["mlp_out"].notnull().any()


def test_what_it_scores_by_default() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = scored(model, "atp*", verify=3)
    assert data.attrs["sites"][-2:] == ["attn.q[head]", "attn.k[head]"]
    assert data["attn.k[head]"].dims == ("layer", "kv_head")
    assert data.attrs["method"] == "AtP*"
    assert int(data["measured"].sel(site="attn.k[head]")) == 6
