"""What demonstrations put into the stream: the planted head is found, and its vector does the task without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt

PAIRS = [([i], [100 - i]) for i in range(5, 50)]


def test_the_head_that_carries_the_mood_is_found_and_its_vector_alone_sets_it() -> None:
    """Inputs are neutral words and outputs good ones: demonstrations set the mood, which one head writes."""
    it = mt.planted.steering(0, words=60)
    truth = it.truth
    it.model.W_U[it.model.W_E.argmax(1).mode().values, truth["neutral"]] = 0.5  # so that no mood means a neutral word
    assert int(it.model.run([truth["neutral"][:3]]).logits[0, -1].argmax()) in truth["neutral"]
    pairs = [([n], [g]) for n, g in zip(truth["neutral"], truth["good"], strict=True)]
    data = mt.explain.function_vector(
        it.model, pairs, shots=6, heads=1, samples=8, tests=16, controls=2, behind="nothing"
    )  # fmt: skip
    layer, head = truth["head"]
    effect = torch.from_numpy(data["effect"].values).clone()
    assert divmod(int(effect.argmax()), effect.shape[1]) == (layer, head)
    effect[layer, head] = 0.0
    assert effect.max() < 0.1 * float(data["effect"][layer, head])
    accuracies = {n: float(data[n]) for n in ("few_shot", "zero_shot", "with_vector", "with_random")}
    assert accuracies == {"few_shot": 1.0, "zero_shot": 0.0, "with_vector": 1.0, "with_random": 0.0}
    assert data.attrs["layer"] == 0
    vector = torch.from_numpy(data["vector"].values).float()
    assert torch.cosine_similarity(vector, truth["direction"], dim=0) > 0.99
    edit = mt.edit.Add("0.resid_post@-1", vector)
    assert int(it.model.run([truth["neutral"][:3]], edits=edit).logits[0, -1].argmax()) in truth["good"]


def test_an_effect_is_that_of_one_run_with_the_heads_mean_in_place() -> None:
    model = mt.open(families.build("llama-gqa").requires_grad_(False), prove=False)
    given: dict[str, Any] = {"shots": 2, "heads": 2, "samples": 2, "tests": 8, "controls": 1}
    data = mt.explain.function_vector(model, PAIRS, **given)
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0)).tolist()
    pairs, asked = [PAIRS[i] for i in order], 2 + 8 + 24

    def prompt(number: int, shuffled: bool) -> list[int]:
        draw = torch.Generator().manual_seed(number)
        rest = len(pairs) - asked
        own, other = (torch.randperm(rest, generator=draw)[:2].tolist() for _ in range(2))
        shown = [
            (pairs[asked + i][0], pairs[asked + j][1]) for i, j in zip(own, other if shuffled else own, strict=True)
        ]
        return [t for a, b in shown for t in (*a, *b)] + pairs[number][0]

    means = [model.run([prompt(1 - i, False)], "1.attn.z@-1")["1.attn.z@-1"][0, 0, 3] for i in range(2)]  # of the other
    effects = []
    for i in range(2):
        answer = pairs[i][1][0]
        runs = [model.run([prompt(i, True)], edits=e) for e in ([], [mt.edit.Set("1.attn.z[3]@-1", means[i])])]
        before, after = (run.logits[0, -1].softmax(-1)[answer] for run in runs)
        effects.append(float(after - before))
    assert float(data["effect"].sel(layer=1, head=3)) == pytest.approx(np.mean(effects), abs=1e-6)
    best = [tuple(map(int, name[1:].split("H"))) for name in data.attrs["best_heads"].split(", ")]
    assert len(best) == 2
    assert data["effect"].values.max() == pytest.approx(float(data["effect"].sel(layer=best[0][0], head=best[0][1])))


def test_bad_tasks_are_refused_in_a_line(tmp_path: Path) -> None:
    model = mt.open(families.build("llama-gqa").requires_grad_(False), prove=False)
    place = tmp_path / "task.json"
    place.write_text(json.dumps([{"input": "a"}]))
    wrong: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (mt.errors.DataError, "too few pairs; got 45; allowed: 96", PAIRS, {}),
        (mt.errors.DataError, "a task is made of pairs", str(place), {}),
        (mt.errors.DataError, 'cannot read "none.json"', "none.json", {}),
        (mt.errors.ArgumentError, r"the template must hold \{input\} and \{output\}", PAIRS, {"template": "{input}"}),
        (mt.errors.ArgumentError, "too many heads", PAIRS, {"samples": 2, "tests": 4, "heads": 9}),
    ]
    for kind, text, task, more in wrong:
        with pytest.raises(kind, match=text) as refused:
            mt.explain.function_vector(model, task, **more)
        assert "\n" not in str(refused.value)


def test_the_gain_of_another_task_is_that_of_its_demonstrations() -> None:
    model = mt.open(families.build("llama-gqa").requires_grad_(False), prove=False)
    tasks = {name: [([i + 9 * k], [(i * k) % 90 + 5]) for i in range(5, 40)] for k, name in enumerate("abc", 1)}
    data = mt.explain.cross_task(model, tasks, shots=2, tests=8)
    assert data["gain"].dims == ("group", "group_2")
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0)).tolist()
    first, second = ([tasks[name][i] for i in order] for name in ("a", "b"))
    drawn = torch.randperm(35 - 8, generator=torch.Generator().manual_seed(3))[:2].tolist()  # of the question 3
    shown = [t for i in drawn for part in first[8 + i] for t in part]
    chances = [model.run([x + second[3][0]]).logits[0, -1].log_softmax(-1)[second[3][1][0]] for x in (shown, [])]
    each = data["gain_each"].sel(group="a", group_2="b")
    assert float(each[3]) == pytest.approx(float(chances[0] - chances[1]), abs=1e-5)
    assert ((data["correlation_p"] > 0) & (data["correlation_p"] <= 1)).all()
    assert np.allclose(np.diag(data["similarity"]), 1.0)
    with pytest.raises(mt.errors.ArgumentError, match="too few tasks to compare; got 2"):
        mt.explain.cross_task(model, dict(list(tasks.items())[:2]))
