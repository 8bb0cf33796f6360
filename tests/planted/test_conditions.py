"""A head that acts under one condition only is found, lost, lent to another task, and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import microtome as mt
from microtome import circuits
from microtome.planted._llama import SHARP, Layout, bench, codes

CODE, WORDS = 38, 40
START, FILL = WORDS, WORDS + 1
CUES = {"a": WORDS + 2, "b": WORDS + 3, "c": WORDS + 4}
"""The last token says which head is to copy the word; no head listens to the third."""


@pytest.fixture(scope="module")
def it() -> Any:
    layout = Layout(code=CODE, a=1, b=1, content=1, start=1, out=CODE)
    it = bench(layout, vocab=WORDS + 5, layers=1, heads=4, d_head=64, d_mlp=32, seed=0)
    words = codes(WORDS, CODE, it.rng)
    it.model.W_E[:WORDS, layout["code"]] = words
    it.model.W_E[:WORDS, layout["content"]] = 1.0
    it.model.W_E[START, layout["start"]] = 1.0
    for name in ("a", "b"):
        it.model.W_E[CUES[name], layout[name]] = 1.0
    it.model.W_U[layout["out"], :WORDS] = 20.0 * words.T
    it.model.W_U[layout["one"], FILL] = 5.0 / it.one  # what is said where nothing is known
    truth: dict[str, Any] = {}
    for name in ("a", "b"):
        head = it.free_head(0)
        q = torch.cat([it.part(name), 0.5 * it.part("one") / it.one], dim=1)
        it.match(0, head, q, torch.cat([it.part("content"), it.part("start")], dim=1), SHARP)
        it.move(0, head, it.part("code"), it.part("out").T)
        truth[name] = f"0.attn.z[{head}]"
    return it.finish(truth)


def asked(it: Any, cue: str, n: int = 8, seed: int = 0) -> dict[str, Any]:
    drawn = torch.randperm(WORDS, generator=torch.Generator().manual_seed(seed))[: 2 * n].tolist()
    rows = [[[START, FILL, word, FILL, CUES[cue]] for word in some] for some in (drawn[:n], drawn[n:])]
    return {"clean": rows[0], "corrupt": rows[1], "answer": drawn[:n], "foil": drawn[n:]}


def pairs(it: Any, cue: str, **more: Any) -> mt.explain.Pairs:
    return mt.explain.pairs_of(it.model, **asked(it, cue, **more), spans={"word": (2, 3), "first": (0, 1)})


def test_the_head_of_a_condition_is_found_and_only_that_condition_needs_it(it: Any) -> None:
    found = circuits.condition_heads(
        it.model, **asked(it, "a", n=18), other=pairs(it, "b", n=18, seed=1), edges=2, resamples=20
    )
    assert found.attrs["heads"] == [it.truth["a"]]
    assert int(found["count"]) == 1
    damage, random = found["damage"].values, found["damage_random"].values
    assert 0.45 < damage[0] < 0.55  # the corrupt prompts say the opposite: halfway is no preference
    assert abs(damage[1]) < 0.05
    assert abs(random[0]) < 0.5 * damage[0]
    assert float(found["selective"]) > 0.4 > 2 * float(found["selective_random"])
    assert float(found["damage_lo"][0]) > 0.4
    assert float(found["selective_lo"]) > 0.4
    same = circuits.condition_heads(it.model, **asked(it, "a"), other=pairs(it, "a", seed=1), edges=2, resamples=20)
    assert same.attrs["heads"] == []
    assert bool(same["damage"].isnull().all())


@pytest.mark.parametrize("how", ["keys", "like", "name"])
def test_a_task_is_repaired_by_the_pattern_of_another(it: Any, how: str) -> None:
    weak = {name: x for name, x in asked(it, "c").items() if name != "foil"}  # its answers are above all tokens
    if how == "like":
        found = _like(it, {"like": pairs(it, "a", seed=1)})
    else:
        keys = (2, 3) if how == "keys" else [(2, 3)] * len(weak["clean"])
        found = circuits.repair(it.model, **weak, heads=it.truth["a"], keys=keys)
        assert float(found["right_before"]) == 0.0
        assert float(found["right_random"]) < 0.5
    assert float(found["right"]) == 1.0
    assert float(found["after"]) > float(found["before"]) + 4
    assert float(found["random"]) < float(found["after"]) - 2


def _like(it: Any, given: dict[str, Any]) -> Any:
    made = tuple(
        mt.tasks.Pair("", "", tuple(a), tuple(b), str(x), str(y), (x,), (y,), {"word": (2, 3), "first": (0, 1)})
        for a, b, x, y in zip(*asked(it, "c").values(), strict=True)
    )
    task = mt.tasks.Task("weak", "no head listens", made, {"seed": 0})
    return circuits.repair(it.model, task, heads=it.truth["a"], **given)


def test_a_head_that_copies_what_differs_is_a_mover(it: Any) -> None:
    circuit = circuits.find(it.model, **asked(it, "a"), method="eap", edges=2)
    found = circuits.roles(it.model, circuit, **asked(it, "a"))
    own = found.sel(component=it.truth["a"])
    assert str(own["role"].values) == "mover"
    assert float(own["answer"]) > 15
    assert float(own["answer_corrupt"]) < -15
    assert float(own["look"].sel(span="what differs")) > 0.95
    assert float(own["look_others"].sel(span="what differs")) < 0.7
    assert float(own["effect"].sel(group="end")) < -5
    assert float(found["answered"]) == 1.0
