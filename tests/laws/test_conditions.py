"""Heads of one condition: what drawing pairs gives, and what is lost by an edited run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import ttest_ind
from tests import families
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits._conditions import alike, damage_of

KIND = "llama-gqa"
MODEL = mt.open(families.build(KIND), prove=False)


def pairs(first: int, n: int = 4) -> mt.explain.Pairs:
    rows = [[ids(first + 2 * i + k)[0].tolist() for i in range(n)] for k in (0, 1)]
    return mt.explain.pairs_of(MODEL, *rows, answer=11, foil=13)


def test_damage_is_what_runs_with_heads_at_their_mean_lose() -> None:
    a, b = pairs(0), pairs(40, 3)
    chosen = torch.zeros(3, 4, dtype=torch.bool)
    chosen[1, 2] = chosen[2, 0] = True
    found = damage_of(MODEL, a, [a, b], [chosen])
    prompts = [pair[0] for some in (a, b) for pair in some.tokens]
    z = [MODEL.run(p[None], capture="*.attn.z") for p in prompts]
    mean = {f"{i}": torch.cat([run[f"{i}.attn.z"][0] for run in z]).mean(0) for i in range(3)}
    edits = [mt.edit.Set(f"{i}.attn.z[{h}]", value=mean[str(i)][h]) for i, h in ((1, 2), (2, 0))]
    sides: list[tuple[int, Any]] = [(0, []), (0, edits), (1, [])]
    logits = [[MODEL.run(p[side][None], edits=e).logits[0, -1] for p in a.tokens] for side, e in sides]
    read = [[float(z[11] - z[13]) for z in row] for row in logits]
    clean, lost, corrupt = (torch.tensor(x, dtype=torch.float64) for x in read)
    expected = (clean - lost) / (clean - corrupt).mean().abs()
    assert torch.allclose(found[0], expected, atol=1e-5)
    assert float(found.abs().max()) > 1e-3


def test_random_heads_are_others_of_the_same_layers() -> None:
    chosen = torch.zeros(5, 8, dtype=torch.bool)
    chosen[1, :3] = chosen[4, 7] = True
    for seed in range(5):
        found = alike(chosen, torch.Generator().manual_seed(seed))
        assert found.sum(1).tolist() == chosen.sum(1).tolist()
        assert not bool((found & chosen).any())
    most = torch.ones(1, 4, dtype=torch.bool)
    assert int(alike(most, torch.Generator()).sum()) == 0


def test_a_single_pair_of_either_says_what_their_circuits_say() -> None:
    a, b = pairs(0, 1), pairs(40, 1)
    given: dict[str, Any] = {"answer": 11, "foil": 13, "edges": 60}
    rows = [a.tokens[0][0].tolist(), a.tokens[0][1].tolist()]
    found = circuits.condition_heads(MODEL, *rows, other=b, resamples=3, **given)
    for some, name in ((a, "held"), (b, "held_other")):
        one = circuits.find(MODEL, *(x.tolist() for x in some.tokens[0]), method="eap", **given)
        for i in range(3):
            for h in range(4):
                assert float(found[name][i, h]) == (f"{i}.attn.z[{h}]" in one.nodes)
    given_by_name = {"clean": b.tokens[0][0].tolist(), "corrupt": b.tokens[0][1].tolist(), "answer": 11, "foil": 13}
    again = circuits.condition_heads(MODEL, *rows, other=given_by_name, resamples=3, **given)
    assert again["held_other"].equals(found["held_other"])
    chosen = (found["held"] == 1) & (found["held_other"] == 0)
    assert bool((chosen == (found["chosen"] == 1)).all())
    assert bool(found["damage"].isnull().all())  # no pair is left to judge by
    assert len(found.attrs["heads"]) == int(found["count"]) == int(chosen.sum()) > 0


def test_heads_are_chosen_and_judged_on_other_pairs() -> None:
    a, b = pairs(0, 18), pairs(80, 18)
    given: dict[str, Any] = {"edges": 30, "resamples": 4, "draws": 2, "sure": 0.5}
    with mt.settings(seed=1):
        found = circuits.condition_heads(MODEL, **as_given(a), other=b, **given)
        again = circuits.condition_heads(MODEL, **as_given(a.take(ALIKE)), other=b.take(ALIKE), **given)
    assert found.attrs["pairs_judged"] == [9, 9]
    assert bool(found["held"].equals(again["held"]))
    assert bool(found["held_other"].equals(again["held_other"]))
    chosen = torch.tensor(found["chosen"].values > 0)
    assert bool(chosen.any())
    odd = [some.take(range(1, 18, 2)) for some in (a, b)]
    lost = [damage_of(MODEL, some, odd, [chosen])[0] for some in odd]
    assert float(found["damage"][0]) == pytest.approx(float(lost[0].mean()))
    assert float(found["damage"][1]) == pytest.approx(float(lost[1].mean()))
    ends = ttest_ind(*(x.numpy() for x in lost), equal_var=False).confidence_interval(0.95)
    assert float(found["selective"]) == pytest.approx(float(lost[0].mean() - lost[1].mean()))
    assert float(found["selective_lo"]) == pytest.approx(float(ends.low))
    assert float(found["selective_hi"]) == pytest.approx(float(ends.high))


ALIKE = [i // 2 * 2 for i in range(18)]
"""The pairs that choose, and in the place of the others the same ones."""


def as_given(some: mt.explain.Pairs) -> dict[str, Any]:
    rows = [[pair[side].tolist() for pair in some.tokens] for side in (0, 1)]
    return {"clean": rows[0], "corrupt": rows[1], "answer": 11, "foil": 13}


def test_without_enough_other_heads_there_is_no_control(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([torch.ones(3, 4).double(), torch.zeros(3, 4).double()])
    monkeypatch.setattr("microtome.circuits._conditions._held", lambda *_: next(held))
    found = circuits.condition_heads(MODEL, **as_given(pairs(0, 2)), other=pairs(40, 2))
    assert found.attrs["random_heads"] == 0
    assert bool(found["damage"].notnull().all())
    assert bool(found["damage_random"].isnull().all())
    assert bool(found["selective_random"].isnull())


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(mt.errors.PromptError, match="there is no corrupt prompt"):
        circuits.condition_heads(MODEL, ids(0)[0].tolist(), ids(1)[0].tolist(), other=[1, 2], answer=11)
    with pytest.raises(mt.errors.ArgumentError, match="sure"):
        circuits.condition_heads(MODEL, ids(0)[0].tolist(), ids(1)[0].tolist(), other=pairs(0), answer=11, sure=0.2)
