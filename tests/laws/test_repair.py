"""A repair is an edited run; a task's own pattern repairs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits._repair import _alike

CLEAN, CORRUPT = ids(0)[0].tolist(), ids(1)[0].tolist()
GIVEN: dict[str, Any] = {"answer": 11, "foil": 13}
SPANS = {f"token {k}": (k, k + 1) for k in range(9)}


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def task(clean: list[int], corrupt: list[int], spans: dict[str, tuple[int, int]]) -> mt.tasks.Task:
    pair = mt.tasks.Pair("", "", tuple(clean), tuple(corrupt), "11", "13", (11,), (13,), spans)
    return mt.tasks.Task("one", "one pair", (pair,), {"seed": 0})


def test_it_is_an_edited_run(model: mt.Model) -> None:
    found = circuits.repair(model, CLEAN, CORRUPT, heads=["1.attn.z[1]", "2.attn.z[3]"], keys=(2, 4), **GIVEN)
    row = torch.zeros(9)
    row[2:4] = 0.5
    edits = [mt.edit.Set(f"{i}.attn.pattern[{h}]@8", value=row) for i, h in ((1, 1), (2, 3))]
    runs = [model.run(CLEAN, edits=e).logits[0, -1] for e in ([], edits)]
    before, after = (float(z[11] - z[13]) for z in runs)
    assert float(found["before"]) == pytest.approx(before, abs=1e-6)
    assert float(found["after"]) == pytest.approx(after, abs=1e-6)
    assert abs(after - before) > 1e-4
    assert float(found["right"]) == float(after > 0)
    assert float(found["random"]) != pytest.approx(after, abs=1e-6)
    alone = circuits.repair(model, CLEAN, CORRUPT, heads="1.attn.z[1]", keys=3, answer=int(runs[0].argmax()))
    assert float(alone["right_before"]) == 1.0


def test_its_own_pattern_repairs_nothing_and_another_one_is_given_as_it_is(model: mt.Model) -> None:
    own, other = task(CLEAN, CORRUPT, SPANS), task(CORRUPT, CLEAN, SPANS)
    same = circuits.repair(model, own, heads="1.attn.z[1]", like=own)
    assert float(same["after"]) == pytest.approx(float(same["before"]), abs=1e-5)
    found = circuits.repair(model, own, heads="1.attn.z[1]", like=other)
    row = model.run(CORRUPT, capture="1.attn.pattern")["1.attn.pattern"][0, 1, -1]
    z = model.run(CLEAN, edits=[mt.edit.Set("1.attn.pattern[1]@-1", value=row)]).logits[0, -1]
    assert float(found["after"]) == pytest.approx(float(z[11] - z[13]), abs=1e-5)
    part = circuits.repair(model, task(CLEAN, CORRUPT, {"a": (2, 5)}), heads="1.attn.z[1]", like=other_of())
    own_row = model.run(CLEAN, capture="1.attn.pattern")["1.attn.pattern"][0, 1, -1]
    mass = float(row[1:3].sum())
    made = own_row / (1 - own_row[2:5].sum()) * (1 - mass)
    made[2:5] = own_row[2:5] / own_row[2:5].sum() * mass
    z = model.run(CLEAN, edits=[mt.edit.Set("1.attn.pattern[1]@-1", value=made)]).logits[0, -1]
    assert float(part["after"]) == pytest.approx(float(z[11] - z[13]), abs=1e-5)


def test_a_random_head_stands_for_one_head_of_its_layer(model: mt.Model) -> None:
    named = [(2, 3), (1, 1), (2, 0)]
    for seed in range(5):
        drawn = _alike(model, named, torch.Generator().manual_seed(seed))
        assert [layer for layer, _ in drawn] == [2, 1, 2]
        assert len(set(drawn)) == 3
        assert not set(drawn) & set(named)
    assert _alike(model, [(1, 0), (2, 0), (2, 1), (2, 2)], torch.Generator()) == []


def test_a_random_head_looks_as_the_head_that_it_stands_for(model: mt.Model) -> None:
    own, other = task(CLEAN, CORRUPT, SPANS), task(CORRUPT, CLEAN, SPANS)
    named = [(2, 3), (1, 1)]
    found = circuits.repair(model, own, heads=[f"{i}.attn.z[{h}]" for i, h in named], like=other, draws=1)
    assert found.attrs["random_heads"] == 2
    drawn = _alike(model, named, torch.Generator().manual_seed(found.attrs["seed"]))
    run = model.run(CORRUPT, capture="*.attn.pattern")
    edits = [mt.edit.Set(f"{i}.attn.pattern[{h}]@-1", value=run[f"{j}.attn.pattern"][0, g, -1])
             for (i, h), (j, g) in zip(drawn, named, strict=True)]  # fmt: skip
    z = model.run(CLEAN, edits=edits).logits[0, -1]
    assert float(found["random"]) == pytest.approx(float(z[11] - z[13]), abs=1e-5)
    assert abs(float(found["random"] - found["before"])) > 1e-4


def test_without_enough_other_heads_there_is_no_control(model: mt.Model) -> None:
    found = circuits.repair(model, CLEAN, CORRUPT, heads=[f"1.attn.z[{h}]" for h in range(3)], keys=2, **GIVEN)
    assert found.attrs["random_heads"] == 0
    assert bool(found["random"].isnull())
    assert bool(found["right_random"].isnull())
    assert bool(found["after"].notnull())


def other_of() -> mt.tasks.Task:
    return task(CORRUPT, CLEAN, {"a": (1, 3), "b": (4, 5)})


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({}, "ArgumentError", "repair needs one of keys= and like=; got neither"),
        ({"keys": 2, "like": 3}, "ArgumentError", "repair needs one of keys= and like=; got both"),
        ({"keys": 2, "query": 9}, "ArgumentError", "query is no position of every prompt; got 9"),
        ({"keys": (3, 5), "query": 3}, "PromptError", "pair 0: heads cannot look ahead; got a span up to token 4"),
        ({"keys": [1, 2]}, "PromptError", "there must be one place to look at per pair; got 2"),
        ({"keys": 2, "heads": "1.mlp_out"}, "SiteError", "is not a head"),
    ],
)
def test_what_cannot_be_asked_is_refused(model: mt.Model, change: dict[str, Any], kind: str, text: str) -> None:
    given: dict[str, Any] = {"heads": "1.attn.z[1]"} | GIVEN | change
    with pytest.raises(getattr(mt.errors, kind), match=text):
        circuits.repair(model, CLEAN, CORRUPT, **given)


def test_tasks_without_a_span_in_common_are_refused(model: mt.Model) -> None:
    own, other = task(CLEAN, CORRUPT, {"x": (1, 2)}), task(CORRUPT, CLEAN, {"y": (1, 2)})
    with pytest.raises(mt.errors.PromptError, match="the two tasks name no span in common; got"):
        circuits.repair(model, own, heads="1.attn.z[1]", like=other)


@pytest.mark.parametrize(
    ("query", "places", "kind", "text"),
    [
        (3, ((2, 5), (1, 2)), "PromptError", 'pair 0, span "a": heads cannot look ahead; got a span up to token 4'),
        (3, ((1, 2), (3, 5)), "PromptError", 'pair 0 of the other task, span "a": heads cannot look ahead'),
        (8, ((1, 2), (1, 2)), "ArgumentError", "query is no position of every prompt of the other task; got 8"),
    ],
)
def test_patterns_of_another_task_do_not_look_ahead(
    model: mt.Model, query: int, places: tuple[Any, Any], kind: str, text: str
) -> None:
    own, other = task(CLEAN, CORRUPT, {"a": places[0]}), task(CORRUPT[:7], CLEAN[:7], {"a": places[1]})
    with pytest.raises(getattr(mt.errors, kind), match=text):
        circuits.repair(model, own, heads="1.attn.z[1]", like=other, query=query)
