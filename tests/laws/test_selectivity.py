"""What attention can select: hulls, slopes of the softmax and ranks against closed forms and other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements import norm_parts, pattern_fits, selectable
from microtome.measurements._norm_parts import _of_part, parts_of
from microtome.measurements._rank_bound import fit_error
from microtome.measurements._selectivity import effective_rank_of, mixes, softmax_norm
from microtome.measurements._unselectable import margin


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=rng(3))


def test_the_norm_of_the_softmax_is_that_of_its_derivative() -> None:
    scores = 4 * torch.randn(20, 7, generator=rng(), dtype=torch.float64)
    scores[0] = 0
    scores[1, :2] = 20
    found = softmax_norm(scores.softmax(-1))
    for row, norm in zip(scores, found, strict=True):
        slope = torch.autograd.functional.jacobian(lambda x: x.softmax(-1), row)
        assert float(norm) == pytest.approx(float(torch.linalg.matrix_norm(slope, 2)), abs=1e-9)
    assert float(found[0]) == pytest.approx(1 / 7)
    assert float(found.max()) <= 0.5
    two = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.8, 0.0]]).double()
    assert torch.allclose(softmax_norm(two), torch.tensor([0.5, 0.0, 0.32]).double())
    assert float(softmax_norm(torch.ones(1, 1).double())) == 0


def test_a_temperature_bounds_the_slope_of_the_softmax() -> None:
    scores = 3 * torch.randn(50, 6, generator=rng(2), dtype=torch.float64)
    for temperature in (0.5, 1.0, 4.0):
        slopes = softmax_norm((scores / temperature).softmax(-1)) / temperature
        assert float(slopes.max()) <= 1 / (2 * temperature)
        row = scores[3].clone().requires_grad_()
        slope = torch.autograd.functional.jacobian(lambda x, t=temperature: (x / t).softmax(-1), row)
        assert float(slopes[3]) == pytest.approx(float(torch.linalg.matrix_norm(slope, 2)), abs=1e-9)


def test_keys_are_selectable_just_at_the_corners_of_their_hull() -> None:
    for seed in range(4):
        keys = torch.randn(25, 3, generator=rng(seed), dtype=torch.float64) + 5  # far from the origin
        corners = set(ConvexHull(keys.numpy()).vertices.tolist())
        assert set(selectable(keys).nonzero().flatten().tolist()) == corners
        assert {i for i in range(25) if margin(keys.numpy(), i) > 1e-9} == corners


def test_keys_of_equal_norm_are_all_selectable_and_equal_keys_are_not() -> None:
    keys = torch.randn(60, 3, generator=rng(), dtype=torch.float64)
    keys = keys / keys.norm(dim=1, keepdim=True)
    assert bool(selectable(keys).all())
    assert selectable(torch.cat([keys[:5], keys[:1]])).tolist() == [False, True, True, True, True, False]
    assert selectable(torch.zeros(3, 2)).tolist() == [False] * 3
    assert selectable(torch.zeros(1, 2)).tolist() == [True]
    assert selectable(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])).tolist() == [True, True, False]


def test_the_measure_of_unselectable_keys_is_the_share_by_row_and_group() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    tokens = ids(2, 40)
    data = mt.measure(model, "unselectable", text=tokens)
    keys = model.run(tokens, capture="1.attn.k")["1.attn.k"]
    for head in range(4):
        share = np.mean([1 - float(selectable(keys[row, :, head // 2]).double().mean()) for row in range(2)])
        assert float(data["unselectable"][1, head]) == pytest.approx(share)
        rows = [keys[row, :, head // 2].double() for row in range(2)]
        own = [int((x @ x[k]).argmax()) == k for x in rows for k in range(40)]
        assert float(data["selected_along"][1, head]) == pytest.approx(np.mean(own))
    assert np.allclose(data["selected_along_equal"], 1)
    hull = ConvexHull(np.asarray(keys[0, :, 0, :3].double()))  # of three dimensions some keys are inside
    assert len(hull.vertices) < 40
    assert (data["unselectable_equal"] <= data["unselectable"] + 1e-9).all()


def test_the_rank_of_scores_is_at_most_the_width_of_a_head() -> None:
    q, k = (torch.randn(2, 30, 6, generator=rng(s), dtype=torch.float64) for s in (0, 1))
    assert float(effective_rank_of(q @ k.transpose(-1, -2)).max()) <= 6
    basis = torch.linalg.qr(torch.randn(30, 4, generator=rng(), dtype=torch.float64)).Q
    assert float(effective_rank_of(basis @ basis.T)) == pytest.approx(4)
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = mt.measure(model, "selectivity", text=ids(3, 30))
    assert (data["score_rank"] <= model.anatomy.d_head).all()
    run = model.run(ids(3, 30), capture=["1.attn.q", "1.attn.k"])
    scores = torch.einsum("bqd,bkd->bqk", run["1.attn.q"][:, :, 3], run["1.attn.k"][:, :, 1]).double()
    energy = torch.linalg.svdvals(scores) ** 2
    share = energy / energy.sum(-1, keepdim=True)
    expected = (-(share * share.log()).nansum(-1)).exp().mean()
    assert float(data["score_rank"][1, 3]) == pytest.approx(float(expected), rel=1e-6)


def test_attention_to_one_cluster_is_separable_and_random_keys_are_not() -> None:
    """Two far clusters of values; attention to all of one: its members are nearer to their mix than the others."""
    width = 16
    value = 0.1 * torch.randn(1, 1, width, 8, generator=rng(), dtype=torch.float64)
    value[..., :4, 0] += 10
    pattern = torch.zeros(1, 1, width, width, dtype=torch.float64)
    pattern[..., :4] = 0.25
    found = mixes(pattern, value, torch.ones(width, width, dtype=torch.bool), 4)
    assert float(found["separable"].min()) == 1
    assert float(found["selected_distance"].max()) < 0.1 < 1 < float(found["other_distance"].min())
    assert float(found["separable_random"].mean()) < 0.7


def test_distances_of_mixes_are_those_of_loops() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    tokens = ids()
    data = mt.measure(model, "selectivity", text=tokens)
    run = model.run(tokens, capture=["2.attn.pattern", "2.attn.v"])
    pattern, value = run["2.attn.pattern"].double(), run["2.attn.v"].double()
    near: list[float] = []
    far: list[float] = []
    fits: list[float] = []
    for row in range(3):
        for q in range(6, 12):
            a, v = pattern[row, 1, q, : q + 1], value[row, : q + 1, 0]
            best = a.topk(2).indices
            mixed = (a[best].unsqueeze(1) * v[best]).sum(0) / a[best].sum()
            gap, size = (v - mixed).norm(dim=1), v.pow(2).sum(1).mean().sqrt()
            rest = torch.tensor([k for k in range(q + 1) if k not in best.tolist()])
            near.append(float((gap[best] / size).mean()))
            far.append(float((gap[rest] / size).mean()))
            fits.append(float((gap[best] < gap[rest].min()).double().mean()))
    assert float(data["selected_distance"][2, 1, 1]) == pytest.approx(np.mean(near), rel=1e-6)
    assert float(data["other_distance"][2, 1, 1]) == pytest.approx(np.mean(far), rel=1e-6)
    assert float(data["separable"][2, 1, 1]) == pytest.approx(np.mean(fits), rel=1e-6)
    assert data["selected_distance"].dims == ("layer", "head", "count")
    assert np.isnan(data["separable"][..., 4]).all()  # no query sees more than 16 keys
    assert float(np.abs(data["separable"] - data["separable_random"])[..., 1].max()) > 0.01


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_scaled_inputs_select_themselves_and_projected_ones_know_no_mean(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    rows = torch.stack([torch.randperm(families.VOCAB - 5, generator=torch.Generator().manual_seed(s))[:16] + 5
                        for s in range(2)])  # fmt: skip
    data = norm_parts(model, rows)
    assert data["selects_itself"].sel(part=["scaling", "both"]).values.tolist() == [[1.0] * 3] * 2
    assert np.abs(data["ones_share"].sel(part=["projection", "both"])).max() < 1e-6
    assert float(data["ones_share"].sel(part=["none", "scaling"]).min()) > 1e-3
    assert set(data["norm"].values.tolist()) == {"both" if name == "gpt2" else "scaling"}
    own, layer = str(data["norm"].values[1]), 1
    keys = model.run(rows, capture=["1.resid_pre"])["1.resid_pre"].double()
    norm = model.layers[layer].attn_norm
    assert norm is not None
    read = parts_of(keys)[own] * norm.gain.double()
    key = read @ model.layers[layer].W_K.double()[1]
    lost = torch.stack([(~selectable(row)).double().mean() for row in key]).mean()
    assert float(data["unselectable"].sel(part=own, layer=layer, head=1)) == pytest.approx(float(lost))
    assert norm_parts(model, rows, layers=[2])["layer"].values.tolist() == [2]


def test_a_short_input_among_long_ones_is_selected_only_when_scaled() -> None:
    x = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 3] = x[0, 4:].mean(0)  # inside the hull of the others
    made = {name: _of_part(part, 1.0, torch.eye(6, dtype=torch.float64).unsqueeze(0))
            for name, part in parts_of(x).items()}  # fmt: skip
    assert float(made["none"]["unselectable"][0]) >= 1 / 12
    assert float(made["scaling"]["unselectable"][0]) == 0
    assert float(made["scaling"]["selects_itself"]) == 1 > float(made["none"]["selects_itself"])


def test_an_input_that_occurs_twice_is_selected_under_no_part() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = norm_parts(model, torch.tensor([[7, 8, 7, 9]]), layers=[0])
    assert data["selects_itself"].sel(part="scaling").values.tolist() == [0.5]
    with pytest.raises(mt.errors.SiteError, match="no layer of .* has a norm before its attention and keys"):
        norm_parts(model, torch.tensor([[7, 8]]), layers=[])


def test_patterns_are_fitted_at_the_width_of_the_row_and_not_below() -> None:
    data = pattern_fits(6, (1, 2, 6), draws=2, steps=150)
    error = data["error"].values
    assert (error[0] > error[1]).all()
    assert (error[1] > 0.02).all()
    assert (np.abs(error[2]) < 1e-4).all()
    assert (error[0] < data["even"].values).all()
    sharp = pattern_fits(6, (1,), draws=2, sharp=1e4, steps=1)  # probabilities that vanish
    np.testing.assert_allclose(sharp["even"], np.log(6), atol=1e-6)
    rng = torch.Generator().manual_seed(0)
    low = (torch.randn(8, 2, generator=rng, dtype=torch.float64) @ torch.randn(2, 8, generator=rng).double()).softmax(1)
    assert fit_error(low, 2, 150, rng) < 1e-4 < fit_error(low, 1, 150, rng)
    with pytest.raises(mt.errors.ArgumentError, match="fits need tokens, widths, draws and steps"):
        pattern_fits(1)
