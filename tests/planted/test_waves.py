"""Numbers as waves: the spectrum that was written into a model is found, and its bands are what it needs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import microtome as mt
from microtome.explain._helix import helix_basis
from microtome.explain._waves import in_order, places_of_sums, spectrum, sums_in, waves, written
from microtome.planted import Planted


@pytest.fixture(scope="module")
def it() -> Planted:
    return mt.planted.modular(0)


def sums(it: Planted, every: int = 1) -> tuple[list[list[int]], list[int]]:
    p, equals = it.truth["p"], it.truth["equals"]
    pairs = list(itertools.product(range(p), repeat=2))[::every]
    return [[a, b, equals] for a, b in pairs], [(a + b) % p for a, b in pairs]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_sum_is_right(seed: int) -> None:
    made = mt.planted.modular(seed)
    prompts, answers = sums(made)
    assert {check.status for check in made.model.proof} == {"holds"}
    assert made.model.run(prompts).logits[:, -1].argmax(-1).tolist() == answers


def test_the_spectrum_shares_sum_to_one_and_a_wave_is_one_frequency() -> None:
    draw = torch.Generator().manual_seed(0)
    for n in (9, 10):
        x = torch.randn(3, n, generator=draw)
        torch.testing.assert_close(spectrum(x).sum(-1), torch.ones(3, dtype=torch.float64))
        for k in range(1, n // 2 + 1):
            wave = torch.cos(2 * math.pi * k * torch.arange(n) / n + 0.3)
            assert float(spectrum(wave)[k - 1]) == pytest.approx(1.0)
        if n % 2 == 0:  # a cosine has half the variance of what changes its sign at every number
            both = torch.cos(2 * math.pi * torch.arange(n) / n) + (-1.0) ** torch.arange(n)
            np.testing.assert_allclose(spectrum(both)[[0, -1]], [1 / 3, 2 / 3], rtol=1e-6)
        basis = waves(n, range(1, n // 2 + 1))
        assert torch.linalg.matrix_rank(basis) == n - 1, "all but the mean"


def test_the_frequencies_written_in_are_found_and_no_others(it: Planted) -> None:
    prompts, answers = sums(it, 7)
    data = mt.explain.fourier(it.model, prompts, range(it.truth["p"]), answers=answers)
    outliers = data["frequency"].values[data["outlier"].values > 0].tolist()
    assert outliers == it.truth["frequencies"]
    last = data["power"].sel(layer=1)
    assert float(last.sel(frequency=outliers).sum()) > 0.999
    assert float(data["mlp_power"].sel(layer=1, frequency=outliers).sum()) > 0.999
    assert float(data["shuffled_power"].sel(layer=1, frequency=outliers).sum()) < 0.5
    assert float(data["accuracy"]) == 1.0
    lost = {
        (s, b): float(data["lost"].sel(site=s, band_group=b))
        for s in ("attn_out", "mlp_out")
        for b in ("low", "high", "outliers")
    }
    assert lost["mlp_out", "outliers"] > 0.9
    assert max(lost["mlp_out", band] for band in ("low", "high")) < 0.2, "any one wave is largest at the sum"
    assert all(lost["attn_out", band] == 0.0 for band in ("low", "high", "outliers")), "attention writes no logits here"


def test_a_filter_takes_its_band_from_the_logits_and_nothing_else(it: Planted) -> None:
    """On the stream of the last layer, where nothing reads on: the other frequencies keep their shares."""
    from microtome.explain._fourier import directions_of

    p, wanted = it.truth["p"], it.truth["frequencies"]
    directions = directions_of(it.model, range(p))
    basis = (waves(p, wanted[:1]) @ directions).float()
    prompts, _ = sums(it, 50)
    plain, cut = (
        it.model.run(prompts, edits=e).logits[:, -1, :p] for e in ([], [mt.edit.Project("1.mlp_out@-1", basis)])
    )
    before, after = (torch.fft.rfft(x.double()).abs() for x in (plain, cut))
    assert float((after[:, wanted[0]] / before[:, wanted[0]].clamp(min=1e-9)).max()) < 1e-3
    ratio = after[:, wanted[1]] / before[:, wanted[1]]
    assert float(ratio.std()) < 0.05
    assert float(ratio.mean()) > 0.9


def test_the_helix_of_the_frequencies_fits_and_stands_in_for_the_states(it: Planted) -> None:
    p, equals = it.truth["p"], it.truth["equals"]
    periods = [p / k for k in it.truth["frequencies"]]
    prompts = [[a, 4, equals] for a in range(p)]
    data = mt.explain.helix(it.model, prompts, range(p), position=0, periods=periods, layers=[0], folds=23)
    assert float(data["helix_r2"][0]) > 0.98
    assert float(data["shuffled_r2"][0]) < 0.5
    assert float(data["helix_kept"][0]) == 1.0
    assert float(data["mean_kept"][0]) < 0.3
    wrong = mt.explain.helix(it.model, prompts, range(p), position=0, periods=[p / 3, p / 7, p / 11], layers=[0])
    assert float(wrong["helix_r2"][0]) < 0.5, "other frequencies are not there"


def test_a_basis_of_a_helix_is_its_waves_and_the_number() -> None:
    a = torch.arange(100, 112, dtype=torch.float64)
    basis = helix_basis(a, [10.0])
    np.testing.assert_allclose(basis[:, 1], a / 111)
    np.testing.assert_allclose(basis[:, 2] ** 2 + basis[:, 3] ** 2, 1.0)
    assert torch.allclose(basis[0, 2:], basis[10, 2:])


def test_what_cannot_be_is_refused_in_a_line(it: Planted) -> None:
    prompts, answers = sums(it, 100)
    wrong = [
        (mt.errors.ArgumentError, "4 different tokens or more; got 3",
         lambda: mt.explain.fourier(it.model, prompts, [1, 2, 3])),
        (mt.errors.PromptError, "token id 99 is not in", lambda: mt.explain.fourier(it.model, prompts, [1, 2, 3, 99])),
        (mt.errors.ArgumentError, "one answer for each prompt; got 1",
         lambda: mt.explain.fourier(it.model, prompts, range(23), answers=answers[:1])),
        (mt.errors.ArgumentError, "an answer is none of the numbers; got 23; allowed: 0 to 22",
         lambda: mt.explain.fourier(it.model, prompts, range(23), answers=[23, *answers[1:]])),
        (mt.errors.ArgumentError, "too few numbers for this helix",
         lambda: mt.explain.helix(it.model, prompts, range(len(prompts)))),
        (mt.errors.ArgumentError, "no such layers; got",
         lambda: mt.explain.helix(it.model, [[a, 0] for a in range(23)], range(23), layers=[7])),
    ]  # fmt: skip
    for kind, text, call in wrong:
        with pytest.raises(kind, match=text) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_helix_has_the_rank_that_is_there() -> None:
    """The sine of a period of 2 is 0 at every integer, so that what stands beside the helix has one dimension less."""
    from microtome.explain._helix import _fits, _rank

    a = torch.arange(40, dtype=torch.float64)
    assert [_rank(a, periods) for periods in ((2.0,), (2.0, 5.0), (5.0, 10.0), (1.0,))] == [2, 4, 5, 1]
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = _fits(x, a, (2.0, 5.0), 12, 5)
    shifted = _fits(x, a + 2**20, (2.0, 5.0), 12, 5)  # sines of large multiples of pi are not 0 to the last digit
    torch.testing.assert_close(made["helix"], shifted["helix"], rtol=0, atol=1e-3)
    fold = (made["mean"] == made["mean"][0]).all(1)  # the numbers of one part, which one fit to the others predicts
    assert int(torch.linalg.matrix_rank((made["components"] - made["mean"])[fold])) == 4


def test_a_text_with_choices_is_its_prompts() -> None:
    assert written("{0-2} + {5,ab} =") == ["0 + 5 =", "0 + ab =", "1 + 5 =", "1 + ab =", "2 + 5 =", "2 + ab ="]
    assert written("{abc}!") == ["a!", "b!", "c!"]
    assert written(["a", "b"]) == ["a", "b"]
    assert in_order("98-101") == ["98", "99", "100", "101"]
    for wrong in ("no braces", "{5-2} =", "{}"):
        with pytest.raises(mt.errors.ArgumentError, match="a text of prompts needs choices"):
            written(wrong)
    for wrong in ("a-z", "1-2-3", "-5"):
        with pytest.raises(mt.errors.ArgumentError, match="only a range of numbers is written with a hyphen; got"):
            in_order(wrong)


def test_only_the_choices_of_a_text_are_added_up() -> None:
    assert sums_in("Q1: {0-2} + {5,12} =") == [5, 12, 6, 13, 7, 14]
    assert sums_in("3 + {7-8}") == [7, 8]
    wrong = [
        (["1 + 2 ="], "sums are those of one text with choices in braces; got list"),
        ("{1,a} + {1-2} =", "a choice is no number to add up; got 'a'"),
        ("{5-9} - {1-2} =", "the choices of this text are not added up; got '{5-9} - {1-2} ='"),
    ]
    for prompts, text in wrong:
        with pytest.raises(mt.errors.ArgumentError, match=text) as refused:
            sums_in(prompts)
        assert "\n" not in str(refused.value)


def test_a_sum_is_looked_up_among_the_numbers() -> None:
    asked = "{1-4} + {1-4} = "
    words = [str(n) for n in range(1, 10)]
    assert places_of_sums(words, asked) == [a + b - 1 for a in range(1, 5) for b in range(1, 5)]
    backwards = [f" {n}" for n in range(9, 0, -1)]
    assert places_of_sums(backwards, asked) == [9 - a - b for a in range(1, 5) for b in range(1, 5)]
    text = "a sum is none of the numbers; got 8; allowed: 1, 2, 3"
    with pytest.raises(mt.errors.ArgumentError, match=text) as refused:
        places_of_sums(words[:7], asked)
    assert "\n" not in str(refused.value)
