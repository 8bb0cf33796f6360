"""Laws of probes, on states made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from microtome.probes._concept import normal, random_normals, rank_p
from microtome.probes._encoding import agreement, delayed, noise_ceiling, ridge, turned
from microtome.probes._folds import folds_of, groups_of, shuffled
from microtome.probes._ideal import ideal_points, nearer
from microtome.probes._mdl import SHARED, STRENGTHS, code_length, portions
from microtome.probes._mix import mixed, similarities
from microtome.probes._problem import with_shares
from microtome.probes._readers import KNOTS, REACH, linear, mass_mean, pattern, sparse, spline, strongest
from microtome.probes._signals import preferred


def drawn(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n) % 2)


# ------------------------------------------------------------------------------------------------------------- readers


def test_a_linear_probe_is_that_of_scikit_learn_in_the_units_of_the_site() -> None:
    x, y = drawn(60, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 7, halves(60)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    known = LogisticRegression(C=0.5).fit(standard.numpy(), y).decision_function(standard.numpy())
    logits = linear(2.0)(x, y, 2).logits(x)
    assert np.allclose((logits[:, 1] - logits[:, 0]).numpy(), known, atol=1e-9)
    three = np.arange(60) % 3
    known = LogisticRegression(C=0.5).fit(standard.numpy(), three).predict_log_proba(standard.numpy())
    assert np.allclose(linear(2.0)(x, three, 3).logits(x).log_softmax(-1).numpy(), known, atol=1e-9)


def test_units_in_other_measures_give_the_same_linear_probe() -> None:
    x, y = drawn(60, 5), halves(60)
    scales = torch.tensor([1.0, 9.0, 0.1, -2.0, 5.0], dtype=torch.float64)
    one, other = (linear(1.0)(a, y, 2).logits(a) for a in (x, x * scales + 3))
    assert torch.allclose(one, other, atol=1e-5)


def test_mass_mean_names_the_class_with_the_nearest_mean() -> None:
    x, y = drawn(90, 6), np.arange(90) % 3
    means = torch.stack([x[torch.from_numpy(y == c)].mean(0) for c in range(3)])
    reader = mass_mean(x, y, 3)
    assert torch.equal(reader.logits(x).argmax(-1), torch.cdist(x, means).argmin(-1))
    assert torch.allclose(reader.tensors["weight"], means)


def test_a_sparse_probe_reads_the_units_that_differ_and_no_other() -> None:
    x, y = drawn(200, 30), halves(200)
    x[:, 7] += 2 * torch.from_numpy(y)
    x[:, 21] -= 4 * torch.from_numpy(y)
    assert strongest(x, y, 2).tolist() == [21, 7]
    weight = sparse(1.0, 2)(x, y, 2).tensors["weight"]
    assert weight.abs().sum(0).nonzero().flatten().tolist() == [7, 21]


def test_a_spline_at_its_start_is_a_rectifier_and_goes_on_along_its_ends() -> None:
    knots = torch.linspace(-REACH, REACH, KNOTS, dtype=torch.float64).clamp(min=0).repeat(3, 1)
    x = torch.linspace(-9, 9, 91, dtype=torch.float64).unsqueeze(1).repeat(1, 3)
    assert torch.allclose(spline(x, knots), x.clamp(min=0), atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- folds


def test_no_group_is_on_both_sides_and_classes_are_even() -> None:
    groups = np.repeat(np.arange(20), 3)
    labels = groups % 2
    folds = folds_of(groups, labels, 5, 0, named=True)
    for fit, test in folds.split():
        assert not set(groups[fit]) & set(groups[test])
        assert labels[test].mean() == 0.5
    assert sorted(np.concatenate([test for _, test in folds.split()]).tolist()) == list(range(60))
    ones = folds.summed(torch.ones(60))
    assert ones.tolist() == folds.sizes.tolist() == [3.0] * 20


def test_rows_that_are_the_same_are_one_group() -> None:
    keys = [(1, 2), (3,), (1, 2), (4,)]
    assert groups_of(keys, None, ["a", "b", "c", "d"]).tolist() == [0, 1, 0, 2]


def test_the_control_task_gives_each_type_one_label_in_the_same_proportions() -> None:
    labels = np.repeat([0, 0, 0, 1], 25)
    types = [f"t{i % 40}" for i in range(100)]
    found = shuffled(labels, types, 0)
    by_type = {name: {int(found[i]) for i in range(100) if types[i] == name} for name in types}
    assert all(len(x) == 1 for x in by_type.values())
    assert sum(next(iter(x)) for x in by_type.values()) == 10, "a quarter of the types"
    assert not np.array_equal(found, shuffled(labels, types, 1))


# ----------------------------------------------------------------------------------------------------------------- MDL


def coded(x: Tensor, y: np.ndarray, seed: int = 0) -> float:
    return code_length(x, y, int(y.max()) + 1, *portions(np.arange(len(y)), seed))


def test_labels_at_random_take_the_uniform_code() -> None:
    for seed in range(3):
        bits = coded(drawn(300, 40, seed), halves(300, seed))
        most = math.log2(1 + len(STRENGTHS)) - 10 * math.log2(1 - SHARED + SHARED / (1 + len(STRENGTHS)))
        assert 0.97 * 300 <= bits <= 300 + most + 1e-9


def test_labels_that_are_there_take_less_and_more_examples_a_smaller_share() -> None:
    x, y = drawn(600, 10), halves(600)
    x[:, 0] += 6 * torch.from_numpy(y)
    few, many = coded(x[:150], y[:150]) / 150, coded(x, y) / 600
    assert many < few < 0.6
    assert many < 0.25


def test_the_scale_of_a_layer_moves_its_weight_in_the_mixture_but_not_its_code_length() -> None:
    y = halves(200)
    layers = torch.stack([drawn(200, 12, seed) for seed in range(3)])
    layers[1, :, 0] += 4 * torch.from_numpy(y)
    layers[2, :, 1] += 4 * torch.from_numpy(y)
    bits = [coded(layer, y) for layer in layers]
    scaled = [coded(layer * 10, y) for layer in layers]
    assert np.allclose(bits, scaled, atol=1e-3)
    assert bits[1] < 0.6 * bits[0]
    alike = mixed(layers, y, 2, 1.0, 0)[0]
    lesser = 1 + int(alike[1:].argmin())
    scales = torch.ones(3, 1, 1, dtype=torch.float64)
    scales[lesser] = 10.0
    moved = mixed(layers * scales, y, 2, 1.0, 0)[0]
    assert float(alike.sum()) == pytest.approx(1)
    assert float(alike[0]) < 0.1
    assert abs(float(moved[lesser] - alike[lesser])) > 0.1
    assert coded(layers[1] * 10, y) == pytest.approx(bits[1], abs=1e-3)


def test_portions_end_with_a_group() -> None:
    groups = np.repeat(np.arange(40), 5)
    order, ends = portions(groups, 0)
    assert sorted(order.tolist()) == list(range(200))
    assert ends[-1] == 200
    for end in ends:
        assert not set(groups[order[:end]]) & set(groups[order[end:]])


# ------------------------------------------------------------------------------------------------------------ encoding


def test_a_simulated_recording_peaks_at_its_layer_and_reaches_its_noise_ceiling() -> None:
    n, groups = 600, np.repeat(np.arange(30), 20)
    layers = [drawn(n, 8, seed) for seed in range(3)]
    shared = layers[1] @ drawn(8, 1, 9)[:, 0]
    signals = shared.unsqueeze(1) + 2 * drawn(n, 4, 10)
    folds = folds_of(groups, None, 5, 0, named=True)
    y = signals.mean(1)
    r = [float(agreement(layer, y, folds).mean()) for layer in layers]
    assert r[1] > 0.5 > 0.2 > max(abs(r[0]), abs(r[2]))
    truth = float(torch.corrcoef(torch.stack([shared, y]))[0, 1])
    assert noise_ceiling(signals) == pytest.approx(truth, abs=0.03)
    assert r[1] / noise_ceiling(signals) == pytest.approx(1, abs=0.06)
    assert abs(float(agreement(layers[1], turned(y, groups, 0), folds).mean())) < 0.15
    assert math.isnan(noise_ceiling(signals[:, :1]))


def test_delays_look_back_inside_a_group_alone() -> None:
    x, groups = torch.arange(12.0, dtype=torch.float64).reshape(6, 2), np.array([0, 0, 1, 0, 1, 1])
    seen = delayed(x, groups, (0, 1, 2))
    assert torch.equal(seen[:, :2], x)
    assert torch.equal(seen[:, 2:4], torch.stack([0 * x[0], x[0], 0 * x[0], x[1], x[2], x[4]]))
    assert torch.equal(seen[5, 4:], x[2])


def test_a_signal_of_the_past_is_read_with_delays_only() -> None:
    groups, x = np.repeat(np.arange(10), 30), drawn(300, 4)
    y = delayed(x, groups, (2,))[:, 0]
    folds = folds_of(groups, None, 5, 0, named=True)
    assert float(agreement(delayed(x, groups, (1, 2)), y, folds).mean()) > 0.99
    assert float(agreement(x, y, folds).mean()) < 0.3


def test_ridge_finds_a_map_in_its_own_units() -> None:
    x = drawn(200, 4) * torch.tensor([1.0, 100.0, 0.01, 5.0], dtype=torch.float64) + 2
    wanted = torch.tensor([1.0, 0.03, 20.0, -1.0], dtype=torch.float64)
    weight, bias = ridge(x, x @ wanted + 5)
    assert torch.allclose(weight, wanted, rtol=1e-3)
    assert bias == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize("sizes", [[20, 1, 2, 3, 8], [12, 1], [9, 8, 2], [1] * 6, [2, 2], [4, 4]])
def test_a_turned_signal_keeps_no_row_where_it_was(sizes: list[int]) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    y = torch.arange(len(groups), dtype=torch.float64)
    for seed in range(5):
        found = turned(y, groups, seed)
        assert sorted(found.tolist()) == y.tolist()
        assert not bool((found == y).any())


# ------------------------------------------------------------------------------------------- concepts and preferences


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_the_direction_of_preferences_is_the_mean_difference_in_any_noise(noise: float) -> None:
    way = torch.nn.functional.normalize(drawn(1, 8, 3)[0], dim=0)
    gaps = 3 * way + noise * drawn(400, 8)
    found = pattern(preferred(gaps, 1.0).tensors["weight"], gaps, 1, centred=False)
    assert float(torch.nn.functional.normalize(found, dim=0) @ way) > 0.95


def test_a_concept_like_any_other_is_seldom_called_one() -> None:
    """p <= 0.1 at most as often as it says, where the concept is examples like the others."""
    slopes, found = drawn(1, 12, 99)[0], []
    for seed in range(40):
        x = drawn(48, 12, seed)
        y, groups = np.arange(48) % 2, np.arange(48)
        random = x[torch.from_numpy(y == 0)]
        others = random_normals(random, groups[y == 0], 9, 10.0, seed) @ slopes
        found.append(rank_p(float(normal(x, y, 10.0) @ slopes), others))
    assert np.mean(np.array(found) <= 0.1) <= 0.22
    assert 0.3 < np.mean(found) < 0.75


def test_a_preference_is_the_same_turned_round_and_finds_what_chosen_texts_have_more_of() -> None:
    wanted = drawn(1, 6, 3)[0]
    gaps = drawn(300, 6)
    chosen = gaps * (gaps @ wanted).sign().unsqueeze(1)
    weight = preferred(chosen, 1.0).tensors["weight"]
    found = weight[1] - weight[0]
    assert float(found @ wanted / (found.norm() * wanted.norm())) > 0.97
    back = preferred(-chosen, 1.0).tensors["weight"]
    assert torch.allclose(back[0] - back[1], found, atol=1e-4)


def test_tastes_that_are_opposite_are_told_apart() -> None:
    wanted, users = drawn(1, 6, 3)[0], np.arange(240) % 6
    a, b = drawn(240, 6, 4), drawn(240, 6, 5)
    signs = torch.from_numpy(np.where(users % 2 == 0, 1.0, -1.0))
    turn = (((a - b) @ wanted * signs) < 0).unsqueeze(1)
    chosen, rejected = torch.where(turn, b, a), torch.where(turn, a, b)
    fit, test = np.arange(160), np.arange(160, 240)
    held = ideal_points(chosen[fit], rejected[fit], users[fit], 2, 1.0, 0)
    hits = (nearer(held, chosen[test], rejected[test], users[test]) > 0).double().mean()
    weight = preferred((chosen - rejected)[fit], 1.0).tensors["weight"]
    one = ((chosen - rejected)[test] @ (weight[1] - weight[0]) > 0).double().mean()
    assert float(hits) > 0.85 > 0.65 > float(one)
    sides = held["shares"].argmax(1)
    assert len(set(sides[::2].tolist())) == len(set(sides[1::2].tolist())) == 1
    assert sides[0] != sides[1]


def test_similarities_leave_out_the_own_group() -> None:
    x = drawn(6, 3).unsqueeze(0)
    groups = np.array([0, 0, 1, 1, 2, 2])
    seen = similarities(x, groups, np.array([0, 2]))
    products = x[0] @ x[0].T
    assert torch.allclose(seen[:, 0], torch.stack([
        products[0, 2], products[1, 2], products[2, 0], products[3, 0],
        products[4, [0, 2]].max(), products[5, [0, 2]].max(),
    ]))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- intervals


def interval(x: Tensor, y: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float, float]:
    folds = folds_of(groups, y, 5, seed, named=True)
    hits = torch.zeros(len(y), dtype=torch.float64)
    for fit, test in folds.split():
        named = linear(10.0)(x[fit], y[fit], 2).logits(x[test]).argmax(-1)
        hits[test] = (named == torch.from_numpy(y[test])).double()
    found = with_shares("x", folds.summed(hits), (), folds.sizes, folds.spread)
    mean, low, high = (float(found[f"x{end}"][1]) for end in ("", "_lo", "_hi"))
    return mean, low, high


def covered(level: float, draws: int) -> float:
    """Share of draws whose interval holds the accuracy that probes of this many examples have on average."""
    n, width = 120, 20
    truth, found = list[float](), list[Any]()
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(n // 3), 3)
        y = (rng.permutation(np.arange(n // 3) % 2))[groups]
        own = torch.from_numpy(rng.standard_normal((n // 3, width)))[torch.from_numpy(groups)]
        x = torch.from_numpy(rng.standard_normal((n, width))) + own
        x[:, 0] += level * torch.from_numpy(y)
        found.append(interval(x, y, groups, seed))
        truth.append(found[-1][0])
    mean = float(np.mean(truth))
    return float(np.mean([low <= mean <= high for _, low, high in found]))


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_interval_of_a_share_near_1_stays_below_it_and_has_a_width(wrong: int) -> None:
    hits, sizes = torch.full((10,), 4.0, dtype=torch.float64), torch.full((10,), 4.0, dtype=torch.float64)
    hits[0] -= wrong
    found = with_shares("x", hits, (), sizes, 1.34)
    mean, low, high = (float(found[f"x{end}"][1]) for end in ("", "_lo", "_hi"))
    assert mean == 1 - wrong / 40
    assert 0.4 < low < 0.9
    assert mean < high <= 1 if wrong else high == 1
    few = with_shares("x", hits[:7], (), sizes[:7])
    assert math.isnan(float(few["x_lo"][1]))


def test_a_control_task_is_at_chance_where_its_folds_are_even_in_its_labels() -> None:
    """Labels dealt in halves and folds that are not even in them leave more of the other class to fit: below chance."""
    n, found, uneven = 24, list[float](), list[float]()
    for seed in range(60):
        y = shuffled(np.arange(n) % 2, [str(i) for i in range(n)], seed)
        x = torch.zeros(n, 1, dtype=torch.float64)  # nothing is known but how many there are
        for labels, into in ((y, found), (np.arange(n) % 2, uneven)):
            folds = folds_of(np.arange(n), labels, 5, seed, named=False)
            hits = [
                float((linear(10.0)(x[fit], y[fit], 2).logits(x[test]).argmax(-1).numpy() == y[test]).sum())
                for fit, test in folds.split()
            ]
            into.append(sum(hits) / n)
    assert np.mean(found) > np.mean(uneven) + 0.05


def test_labels_at_random_are_at_chance_and_the_interval_says_so() -> None:
    assert covered(0.0, 40) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.0, 1.0, 3.0])
def test_intervals_hold_the_accuracy_that_they_promise_to(level: float) -> None:
    assert covered(level, 400) >= 0.93
