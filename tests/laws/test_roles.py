"""Roles: what nodes write is what contributions say, where they matter is what patches say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits._roles import LOOKS, role_of

PROMPT = ids(0)[0].tolist()
OTHER = [*PROMPT[:3], 77, 78, *PROMPT[5:]]
GIVEN: dict[str, Any] = {"answer": 11, "foil": 13}


def found_in(kind: str, **more: Any) -> tuple[mt.Model, Any]:
    model = mt.open(families.build(kind), prove=False)
    circuit = circuits.find(model, PROMPT, OTHER, method="eap", edges=0.5, **GIVEN)
    return model, circuits.roles(model, circuit, PROMPT, OTHER, **(GIVEN | more))


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "olmo2", "gpt_neox-parallel", "granite"])
def test_what_they_add_to_the_answer_is_their_contribution(kind: str) -> None:
    model, found = found_in(kind)
    for prompt, name in ((PROMPT, "answer"), (OTHER, "answer_corrupt")):
        parts = mt.explain.contributions(model, prompt, **GIVEN).isel(batch=0)
        for node in found["component"].values.tolist():
            layer, rest = int(node.split(".")[0]), node.split(".", 1)[1]
            own = parts["mlp"][layer] if rest == "mlp_out" else parts["attn"][layer, int(rest[7:-1])]
            assert float(found[name].sel(component=node)) == pytest.approx(float(own), abs=2e-5)


def test_effects_are_those_of_edited_runs_and_looks_sum_to_1() -> None:
    model, found = found_in("llama-gqa")
    other = model.run(OTHER, capture=["*.attn.z", "*.mlp_out"])
    base = model.run(PROMPT).logits[0, -1]
    for node in found["component"].values.tolist()[::3]:
        for group, at in (("what differs", "3,4"), ("between", "0,1,2,5,6,7"), ("end", "8")):
            edit = mt.edit.Patch(f"{node}@{at}", source=other)
            z = model.run(PROMPT, edits=[edit]).logits[0, -1]
            expected = float((z - base)[11] - (z - base)[13])
            assert float(found["effect"].sel(component=node, group=group)) == pytest.approx(expected, abs=1e-5)
    heads = [n for n in found["component"].values.tolist() if "attn" in n]
    assert float(abs(found["look"].sel(component=heads).sum("span") - 1).max()) < 1e-5
    pattern = model.run(PROMPT, capture="*.attn.pattern")
    layer, head = int(heads[0][0]), int(heads[0][9:-1])
    own = pattern[f"{layer}.attn.pattern"][0, head, -1]
    assert float(found["look"].sel(component=heads[0], span="what differs")) == pytest.approx(
        float(own[3:5].sum()), abs=1e-6
    )
    assert float(found["look"].sel(component=heads[0], span="first")) == pytest.approx(float(own[0]), abs=1e-6)
    mlps = [n for n in found["component"].values.tolist() if "mlp" in n]
    assert bool(found["look"].sel(component=mlps).isnull().all())


def test_pairs_without_such_tokens_do_not_count() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    circuit = circuits.find(model, PROMPT, OTHER, method="eap", edges=0.5, **GIVEN)
    last = [*PROMPT[:-1], 79]  # differs at the end alone
    both = circuits.roles(model, circuit, [PROMPT, PROMPT], [OTHER, last], **GIVEN)
    one = circuits.roles(model, circuit, PROMPT, OTHER, **GIVEN)
    end = circuits.roles(model, circuit, PROMPT, last, **GIVEN)
    assert bool(end["effect"].sel(group="what differs").isnull().all())
    assert bool(end["effect"].sel(group="end").notnull().all())
    assert set(end["role"].values.tolist()) <= {"none", "answer", "mover", "relation"}
    here = both["effect"].sel(group="what differs")
    assert float(abs(here - one["effect"].sel(group="what differs")).max()) < 1e-6
    mean = (one["effect"] + end["effect"]).sel(group="end") / 2
    assert float(abs(both["effect"].sel(group="end") - mean).max()) < 1e-6
    assert float(both["answered_lo"]) <= float(both["answered"]) <= float(both["answered_hi"])


def test_a_role_follows_from_where_a_node_acts_and_looks() -> None:
    at = {name: torch.eye(3)[i].double() for i, name in enumerate(("differs", "between", "end"))}
    look = {name: torch.eye(4)[i].double() for i, name in enumerate(LOOKS)}
    assert role_of("1.attn.z[2]", -at["end"], look["what differs"], 1.0) == "mover"
    assert role_of("1.attn.z[2]", at["end"], look["others"], 1.0) == "relation"
    assert role_of("1.mlp_out", at["end"], look["others"], 1.0) == "answer"
    assert role_of("1.mlp_out", at["differs"], look["others"], 1.0) == "subject"
    assert role_of("1.attn.z[2]", at["between"], look["others"], 1.0) == "between"
    assert role_of("1.attn.z[2]", 0.01 * at["end"], look["others"], 1.0) == "none"


def test_the_largest_nodes_are_shown_and_what_is_none_is_refused() -> None:
    model, found = found_in("llama-gqa", nodes=4)
    assert found.sizes["component"] == 4
    assert found.attrs["nodes"] > found.attrs["shown"] == 4
    empty = mt.circuits.from_scores(model, torch.eye(*mt.explain.graph(model).mask.shape), 1, prune=False)
    mask = torch.zeros_like(empty.kept)
    mask[0, -1] = True
    direct = circuits.of_mask(model, mask)
    with pytest.raises(mt.errors.DataError, match="this circuit has no heads and MLPs; got 1 edges"):
        circuits.roles(model, direct, PROMPT, OTHER, **GIVEN)
