"""Recipes for a task without demonstrations: on a planted task they do it, and each is the edits that it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families

import microtome as mt
from microtome.explain._task_vectors import RECIPES

PAIRS = [([i], [100 - i]) for i in range(5, 50)]


def test_recipes_set_a_planted_mood_and_random_heads_do_not() -> None:
    it = mt.planted.steering(0, words=60)
    truth = it.truth
    it.model.W_U[it.model.W_E.argmax(1).mode().values, truth["neutral"]] = 0.5  # so that no mood means a neutral word
    pairs = [([n], [g]) for n, g in zip(truth["neutral"], truth["good"], strict=True)]
    data = mt.explain.task_vectors(it.model, pairs, shots=6, heads=1, samples=8, tests=16, behind="nothing")
    layer, head = truth["head"]
    assert data.attrs["best_heads"] == f"L{layer}H{head}"
    assert float(data["zero_shot"]) == 0.0
    assert float(data["few_shot"]) == 1.0
    for recipe in ("heads", "heads scaled", "heads in place", "state", "difference"):
        assert float(data["accuracy"].sel(recipe=recipe)) == 1.0, recipe
    for recipe in ("heads", "heads scaled", "heads in place"):
        assert float(data["control_accuracy"].sel(recipe=recipe)) == 0.0, recipe
        assert float(data["gain_diff_lo"].sel(recipe=recipe)) > 0


def test_a_recipe_is_the_edits_that_it_says() -> None:
    model = mt.open(families.build("llama-gqa").requires_grad_(False), prove=False)
    data = mt.explain.task_vectors(model, PAIRS, shots=3, heads=2, samples=3, tests=8)
    assert list(data["recipe"].values) == list(RECIPES)
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0)).tolist()
    pairs, asked = [PAIRS[i] for i in order], 3 + 12 + 8

    def shown(number: int, *, shuffled: bool = False) -> list[int]:
        draw = torch.Generator().manual_seed(number)
        own, other = (torch.randperm(len(pairs) - asked, generator=draw)[:3].tolist() for _ in range(2))
        rows = zip(own, other if shuffled else own, strict=True)
        return [t for i, j in rows for t in (*pairs[asked + i][0], *pairs[asked + j][1])]

    def mean(site: str, prompts: list[list[int]]) -> Any:
        return torch.stack([model.run([p], site)[site].flatten(0, 1)[0] for p in prompts]).mean(0)

    first = [pairs[i][0] for i in range(3)]
    behind = [shown(i) + x for i, x in enumerate(first)]
    mixed = [shown(i, shuffled=True) + x for i, x in enumerate(first)]
    question, answer = pairs[15][0], pairs[15][1][0]

    def gain(edits: list[Any]) -> float:
        after, before = (model.run([question], edits=e).logits[0, -1].log_softmax(-1)[answer] for e in (edits, []))
        return float(after - before)

    def found(recipe: str, kind: str = "") -> float:
        return float(data[f"{kind}gain_each"].sel(recipe=recipe)[0])

    layer = int(data.attrs["setting_state"].removeprefix("layer "))
    site = f"{layer}.resid_post@-1"
    for kind, prompts in (("", behind), ("control_", mixed)):
        assert found("state", kind) == pytest.approx(gain([mt.edit.Set(site, mean(site, prompts))]), abs=1e-5)
    layer, times = (int(w.rstrip(",")) for w in data.attrs["setting_difference"].split() if w[0].isdigit())
    site = f"{layer}.resid_post@-1"
    change = mean(site, behind) - mean(site, first)
    assert found("difference") == pytest.approx(gain([mt.edit.Add(site, times * change)]), abs=1e-5)
    share = float(data.attrs["setting_every_layer"].split()[0])
    sites = [f"{i}.resid_post@-1" for i in range(model.anatomy.n_layers)]
    edits = [mt.edit.Add(s, share * (mean(s, behind) - mean(s, first))) for s in sites]
    assert found("every layer") == pytest.approx(gain(edits), abs=1e-5)
    heads = [tuple(map(int, name[1:].split("H"))) for name in data.attrs["best_heads"].split(", ")]
    edits = [mt.edit.Set(f"{i}.attn.z[{h}]@-1", mean(f"{i}.attn.z@-1", behind)[h]) for i, h in heads]
    assert found("heads in place") == pytest.approx(gain(edits), abs=1e-5)
    write = sum(mean(f"{i}.attn.z@-1", behind)[h] @ model.layers[i].W_O[h] for i, h in heads)
    layer = int(data.attrs["setting_heads"].removeprefix("layer "))
    assert found("heads") == pytest.approx(gain([mt.edit.Add(f"{layer}.resid_post@-1", write)]), abs=1e-5)


@pytest.mark.parametrize("name", ["task_vectors", "forward_tuning"])
def test_a_file_that_is_no_task_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    model = mt.open(families.build("llama-gqa").requires_grad_(False), prove=False)
    files = {
        "broken.json": ("[[1,", "cannot read a task from .*broken.json"),
        "table.json": ('{"a": 1}', "a task is a list of pairs; got dict"),
        "ones.json": ('["a", "b"]', "a task is made of pairs of texts, or of token ids; got 'a' as number 0"),
        "few.json": ("[[[5], [6]], [[7], [8]]]", "the task has too few pairs; got 2"),
    }
    for file, (text, expected) in files.items():
        (tmp_path / file).write_text(text)
        with pytest.raises(mt.errors.DataError, match=expected) as refused:
            getattr(mt.explain, name)(model, str(tmp_path / file))
        assert "\n" not in str(refused.value)
    with pytest.raises(mt.errors.MicrotomeError, match="gone.json") as refused:
        getattr(mt.explain, name)(model, str(tmp_path / "gone.json"))
    assert "\n" not in str(refused.value)


def test_too_many_heads_are_refused() -> None:
    model = mt.open(families.build("llama-gqa").requires_grad_(False), prove=False)
    with pytest.raises(mt.errors.ArgumentError, match="too many heads to draw as many others; got 9"):
        mt.explain.task_vectors(model, PAIRS, samples=2, tests=4, heads=9)
