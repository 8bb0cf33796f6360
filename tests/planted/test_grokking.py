"""A network that adds and remembers: neurons of one wave are what adds, and the others are what remembers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import microtome as mt
from microtome.explain._fourier_neurons import _ratios, _shares_right
from microtome.explain._waves import spectrum
from microtome.planted import Planted
from microtome.stream import mean_interval, share_interval


def asked(it: Planted) -> dict[str, Any]:
    """All sums as prompts, in both orders, with their labels and kinds."""
    p, equals = it.truth["p"], it.truth["equals"]
    of = {(a, b): i for i, (a, b) in enumerate(it.truth["pairs"])}
    pairs = list(itertools.product(range(p), repeat=2))
    numbers = [of[min(a, b), max(a, b)] for a, b in pairs]
    return {
        "prompts": [[a, b, equals] for a, b in pairs], "numbers": range(p),
        "answers": [it.truth["labels"][i] for i in numbers], "groups": [it.truth["kinds"][i] for i in numbers],
    }  # fmt: skip


def test_one_wave_has_the_ratio_1_and_white_noise_what_is_known() -> None:
    n = 31
    draw = torch.Generator().manual_seed(0)
    place = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    waves = torch.stack([3 * torch.cos(k * place + 0.4 * k) + 1 for k in (1, 4, 15)])
    ratio, top = _ratios(waves.unsqueeze(0))
    np.testing.assert_allclose(ratio, 1.0, rtol=1e-9)
    assert top.tolist() == [1, 4, 15]
    two = torch.cos(2 * place) + 2 * torch.sin(5 * place)  # shares of 1/5 and 4/5
    np.testing.assert_allclose(_ratios(two.expand(1, 1, n))[0], 17 / 25, rtol=1e-9)
    noise = torch.randn(3, 4000, n, generator=draw, dtype=torch.float64)
    ratio = _ratios(noise)[0]
    assert float(ratio.mean()) == pytest.approx(2 / ((n - 1) / 2 + 1), rel=0.02)
    mixed = torch.stack([waves, noise[0, :3]])  # of two rows, the mean
    expected = (1 + spectrum(noise[0, :3]).square().sum(-1)) / 2
    torch.testing.assert_close(_ratios(mixed)[0], expected)
    flat = torch.cat([waves, torch.ones(1, n, dtype=torch.float64)]).unsqueeze(0)
    assert _ratios(flat)[0].isnan().tolist() == [False, False, False, True]


def test_the_interval_of_random_sets_is_over_sets() -> None:
    right = torch.zeros(1, 8, 6, dtype=torch.bool)  # [share, set, prompt]
    for number, hits in enumerate((3, 4, 5, 4, 2, 4, 6, 1)):
        right[0, number, :hits] = True
    member = torch.zeros(6, dtype=torch.long)
    found = _shares_right("random", right, member, 1)
    for name, end in zip(("random", "random_lo", "random_hi"), mean_interval(right[0].double().mean(-1)), strict=True):
        assert float(found[name][1]) == pytest.approx(float(end))
    assert _shares_right("few", right[:, :5], member, 1)["few_lo"][1].isnan().all(), "of five sets none is known"
    own = _shares_right("own", right[:, 0], member, 1)
    np.testing.assert_allclose([float(own[name][1]) for name in ("own_lo", "own_hi")], share_interval(3, 6))


def test_neurons_that_were_written_as_waves_are_found() -> None:
    it = mt.planted.modular(0, p=11, frequencies=(2, 3))
    pairs = list(itertools.product(range(11), repeat=2))
    data = mt.explain.fourier_neurons(
        it.model, [[a, b, 11] for a, b in pairs], range(11), answers=[(a + b) % 11 for a, b in pairs], layers=[1],
        shares=(0.5,), controls=2,
    )  # fmt: skip
    assert data.attrs["places"] == "0, 1"
    ratio = data["ipr"].sel(layer=1).values[it.truth["neurons"]]
    assert ratio.min() > 0.99
    assert set(data["top_frequency"].sel(layer=1).values[it.truth["neurons"]]) == {2.0, 3.0}
    assert np.nanmean(data["shuffled_ipr"].sel(layer=1).values[it.truth["neurons"]]) < 0.6
    assert np.isnan(data["ipr"].sel(layer=0).values).all()  # was not asked for
    assert float(data["accuracy"].sel(group="all")) == 1.0


def test_rows_of_neurons_are_the_rows_of_weights() -> None:
    it = mt.planted.corrupted_sums(0, p=7, width=12, steps=30)
    given = asked(it)
    data = mt.explain.fourier_neurons(it.model, given["prompts"], given["numbers"], layers=[1])
    u = it.truth["weights"]
    a, b = torch.tensor(it.truth["pairs"]).T
    trained = (u[a] + u[b]).square() @ (it.model.layers[1].W_out[:24:2].double().float() @ it.model.W_U)[:, :7]
    own = it.model.run([[x, y, 7] for x, y in it.truth["pairs"]]).logits[:, -1, :7]
    assert (own.argmax(-1) == trained.argmax(-1)).double().mean() > 0.95
    reads = spectrum(u.T).square().sum(-1)
    writes = spectrum(it.model.layers[1].W_out[:24:2].double() @ it.model.W_U[:, :7].double()).square().sum(-1)
    found = data["ipr"].sel(layer=1).values
    np.testing.assert_allclose(found[:24:2], (2 * reads + writes) / 3, rtol=0.02)  # the norm changes the third digit
    np.testing.assert_allclose(found[1:24:2], found[:24:2], rtol=1e-3)


@pytest.mark.slow
def test_without_neurons_of_low_ratio_what_was_remembered_is_lost_and_sums_are_not() -> None:
    it = mt.planted.corrupted_sums(0)
    given = asked(it)
    data = mt.explain.fourier_neurons(
        it.model, given["prompts"], given["numbers"], answers=given["answers"], groups=given["groups"], layers=[1],
        shares=(0.25, 0.75), controls=3,
    )  # fmt: skip
    before = {name: float(data["accuracy"].sel(group=name)) for name in ("clean", "corrupted", "held out")}
    assert before["clean"] > 0.98
    assert before["corrupted"] > 0.9
    assert before["held out"] > 0.9
    after = data["pruned_accuracy"].sel(share=0.75)
    random = data["random_accuracy"].sel(share=0.75)
    assert float(after.sel(group="corrupted")) < 0.2
    assert float(after.sel(group="clean")) > 0.95
    assert float(after.sel(group="held out")) > before["held out"] - 0.02
    assert float(random.sel(group="clean")) < float(after.sel(group="clean")) - 0.05


def test_what_cannot_be_asked() -> None:
    it = mt.planted.corrupted_sums(0, p=7, width=4, steps=0)
    given = asked(it)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (mt.errors.PromptError, "no place of the prompts holds all of the numbers", {"prompts": given["prompts"][:6]}),
        (mt.errors.PromptError, "prompts of several lengths", {"prompts": [[1, 2], [1, 2, 3]]}),
        (mt.errors.ArgumentError, "no such layers of neurons; got \\[5\\]", {"layers": [5]}),
        (mt.errors.ArgumentError, "these are no shares of the neurons", {"shares": [1.0]}),
        (mt.errors.ArgumentError, "there must be one group for each prompt; got 1", {"groups": ["a"]}),
        (mt.errors.ArgumentError, "there must be one answer for each prompt; got 1", {"answers": [3]}),
    ]
    for kind, text, more in wrong:
        with pytest.raises(kind, match=text) as refused:
            mt.explain.fourier_neurons(it.model, **(given | more))
        assert "\n" not in str(refused.value)
