"""Scores of neurons are differences of lens readings in plain runs; the screen keeps those of the largest change."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt

PROMPTS = [[7, 20, 33, 41, 52], [9, 21, 34, 42, 53], [8, 22, 35, 43, 54, 60]]
HEAD = "1.attn.z[2]"


def model(name: str = "llama-gqa") -> mt.Model:
    return mt.open(families.build(name), prove=False)


@torch.no_grad()
def literal(it: mt.Model, prompt: list[int], layer: int, neuron: int, answer: int, edits: list[mt.edit.Edit]) -> float:
    """The score of one neuron from a run that captures what it reads and writes."""
    parallel = f"{layer}.resid_mid" not in it.run([prompt], capture="*.resid_pre")
    where = "resid_pre" if "resid_mid" not in {s.name for s in it.anatomy.hook_points} else "resid_mid"
    assert parallel or where == "resid_mid"
    run = it.run([prompt], [f"{layer}.{where}@-1", f"{layer}.mlp.post@-1"], edits)
    x = run[f"{layer}.{where}@-1"][0, 0].double()
    weights = it.layers[layer]
    post = run[f"{layer}.mlp.post@-1"][0, 0]
    write = post[neuron] * weights.W_out[neuron]
    if weights.mlp_post_norm is not None:
        norm = weights.mlp_post_norm
        write = write * norm.gain / norm.scale(post @ weights.W_out)
    write = write * it.anatomy.hook_points[mt.anatomy.Site("mlp_out", layer)].scale
    log_p = [it.unembed(y.float()).double().log_softmax(-1)[answer] for y in (x, x + write.double())]
    return float(log_p[1] - log_p[0])


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "granite", "gpt_neox-parallel"])
def test_scores_are_those_of_plain_runs(name: str) -> None:
    it = model(name)
    data = mt.explain.compare_neurons(it, PROMPTS, without=HEAD, answer=11, top=3, controls=1)
    off = [mt.edit.Zero(f"{HEAD}@-1")]
    assert np.isnan(data["score"][0]).all()  # layers before the head depend on nothing of it
    for layer, neuron, prompt in ((1, 0, 1), (2, 7, 1), (2, 30, 2)):
        for column, edits in (("score", []), ("score_without", off)):
            expected = literal(it, PROMPTS[prompt], layer, neuron, 11, edits)
            assert float(data[f"{column}_each"][prompt - 1, layer, neuron]) == pytest.approx(expected, abs=2e-5)
    change = (data["score_each"] - data["score_without_each"]).mean("example").values
    assert np.allclose(data["change"], change, atol=1e-12, equal_nan=True)


def test_the_screen_keeps_the_best_and_the_chain_is_ablated() -> None:
    it = model()
    every = mt.explain.compare_neurons(it, PROMPTS, without=HEAD, answer=11, top=3, controls=2, screen=56)
    some = mt.explain.compare_neurons(it, PROMPTS, without=HEAD, answer=11, top=3, controls=2, screen=12)
    assert every["component"].values.tolist() == some["component"].values.tolist()
    assert int(np.isfinite(some["change"]).sum()) == 24
    layers = [int(str(name)[0]) for name in every["component"].values]
    assert layers == sorted(layers)
    chosen = mt.explain.compare_neurons(it, PROMPTS[:1], without=HEAD, answer=11, top=3, controls=2, screen=56)
    best = np.sort(chosen["change"].values[1:].flatten())[::-1][:3]
    assert sorted(chosen["ranked"].values)[::-1] == pytest.approx(list(best), abs=1e-12)
    assert chosen["component"].values.tolist() == every["component"].values.tolist()  # the first prompt chooses alone
    assert "no p-value" in chosen.attrs["chosen_on"]
    assert np.isnan(chosen["loss_p"]) if "loss_p" in chosen else True
    assert every.attrs["chosen_on"] == 1
    edits = [mt.edit.Zero(f"{name}@-1") for name in every["component"].values]
    for i, prompt in enumerate(PROMPTS[1:]):  # the others measure
        a, b, alone = (it.run([prompt], edits=e).logits[0, -1].log_softmax(-1)[11] for e in ((), edits, edits[1]))
        assert float(every["loss_each"][i]) == pytest.approx(float(a - b), abs=1e-5)
        assert float(every["alone_each"][i, 1]) == pytest.approx(float(a - alone), abs=1e-5)


def test_a_tuned_copy_is_compared_as_it_is() -> None:
    hf = families.build("llama-gqa")
    it, tuned = (mt.open(copy.deepcopy(hf), prove=False) for _ in range(2))
    with torch.no_grad():
        tuned.layers[2].W_out[5] *= 0.0
    data = mt.explain.compare_neurons(it, PROMPTS, tuned=tuned, answer=11, top=2, controls=1, screen=56)
    change = data["change"].values
    assert np.nanmax(abs(np.delete(change[2], 5))) < 1e-6
    assert np.nanmax(abs(change[:2])) < 1e-6
    score = np.mean([literal(it, prompt, 2, 5, 11, []) for prompt in PROMPTS[1:]])
    assert change[2, 5] == pytest.approx(score, abs=1e-5)


def test_the_loss_on_plain_text_is_that_of_the_neurons_off_everywhere() -> None:
    it = model()
    data = mt.explain.compare_neurons(it, PROMPTS, without=HEAD, answer=11, top=2, controls=1, text=PROMPTS[2])
    edits, losses = [mt.edit.Zero(str(name)) for name in data["component"].values], []
    for e in ((), edits):
        log_p = it.run([PROMPTS[2]], edits=e).logits[0, :-1].log_softmax(-1)
        losses.append(-log_p.gather(1, torch.tensor(PROMPTS[2][1:])[:, None]).mean())
    assert float(data["text_loss"]) == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "problem", "match"),
    [
        ({}, mt.errors.ArgumentError, "give the heads to switch off, or a tuned model; got neither"),
        ({"without": "1.mlp_out"}, mt.errors.SiteError, '"1.mlp_out" is not a head'),
        ({"without": HEAD, "answer": None}, mt.errors.PromptError, "there is nothing to read"),
        ({"without": "9.attn.z[0]"}, mt.errors.SiteError, "no layers 9"),
    ],
)
def test_what_cannot_be_compared_is_refused(given: dict[str, object], problem: type[Exception], match: str) -> None:
    with pytest.raises(problem, match=match):
        mt.explain.compare_neurons(model(), PROMPTS, **({"answer": 11} | given))  # type: ignore[arg-type]


def test_only_a_copy_is_a_tuned_model() -> None:
    with pytest.raises(
        mt.errors.DataError, match="the tuned model is no copy of this one; got model_type gpt2; allowed: llama"
    ):
        mt.explain.compare_neurons(model(), PROMPTS, tuned=model("gpt2"), answer=11, top=1, controls=1)
