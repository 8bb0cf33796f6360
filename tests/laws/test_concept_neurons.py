"""Neurons near a concept against plain runs, what a model compared with itself has, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families, twins
from torch import Tensor
from torch.nn.functional import cosine_similarity

import microtome as mt
from microtome.measurements import concept_neurons
from microtome.measurements._concept_neurons import _chance  # pyright: ignore[reportPrivateUsage]


def ids(rows: int, seed: int) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, 12), generator=torch.Generator().manual_seed(seed))


TEXT = {"a": ids(8, 0), "b": ids(9, 1)}


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def test_it_is_what_plain_runs_show(model: mt.Model) -> None:
    tuned = mt.open(twins.build("llama-gqa/gains"), prove=False)
    data = concept_neurons(model, ("a", "b"), TEXT, after=tuned, top=6)
    runs = {g: model.run(rows, capture=["*.mlp.post", "*.mlp.gate", "2.resid_post"]) for g, rows in TEXT.items()}
    means = [run["2.resid_post"][:, 1:].detach().double().mean((0, 1)) for run in runs.values()]
    v = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    out = torch.stack([model.layers[i].W_out.detach().double() for i in range(3)])
    cosine = cosine_similarity(out, v, dim=-1)
    best = cosine.flatten().topk(6)
    places = list(zip(data["layer"].values.tolist(), data["neuron"].values.tolist(), strict=True))
    assert places == [divmod(int(n), 56) for n in best.indices]
    np.testing.assert_allclose(data["cosine"], best.values, atol=1e-6)
    for end, m in (("", model), ("_after", tuned)):
        for group, rows in TEXT.items():
            run = m.run(rows, capture=["*.mlp.post", "*.mlp.gate"])
            post = torch.stack([run[f"{i}.mlp.post"][:, 1:, n] for i, n in places], dim=-1).detach().double()
            gate = torch.stack([run[f"{i}.mlp.gate"][:, 1:, n] for i, n in places], dim=-1)
            writes = torch.stack([m.layers[i].W_out[n].detach().double() @ v for i, n in places])
            own = data.sel(group=group)
            np.testing.assert_allclose(own[f"activation{end}"], post.mean((0, 1)), atol=1e-6)
            np.testing.assert_allclose(own[f"firing{end}"], (gate > 0).double().mean((0, 1)), atol=1e-9)
            assert float(own[f"written{end}"]) == pytest.approx(float((post @ writes).mean()), abs=1e-6)
    np.testing.assert_allclose(data["written_change"], data["written_after"] - data["written"], atol=1e-9)
    for name in ("written", "written_after", "written_change", "written_random"):
        assert (data[f"{name}_lo"] <= data[name]).all()
        assert (data[name] <= data[f"{name}_hi"]).all()
    assert (data["cosine_random"] <= float(data["cosine"].min())).all()  # they are others
    assert (data["cos_in"] < 0.999).any()  # gains are folded in


def test_a_group_without_later_tokens_has_no_value(model: mt.Model) -> None:
    data = concept_neurons(model, torch.ones(families.D_MODEL), TEXT | {"c": ids(1, 2)[:, :1]}, after=model, top=4)
    for name in ("activation", "firing", "written", "written_random", "written_change"):
        assert data[name].sel(group="c").isnull().all(), name
        assert data[name].sel(group=["a", "b"]).notnull().all(), name


def test_a_model_beside_itself_has_not_changed(model: mt.Model) -> None:
    data = concept_neurons(model, torch.ones(families.D_MODEL), ids(8, 3), after=model, top=4)
    for name in ("cos_in", "cos_gate", "cos_out", "cos_in_random"):
        np.testing.assert_allclose(data[name], 1, atol=1e-9)
    assert float(abs(data["written_change"]).max()) == 0
    np.testing.assert_array_equal(data["activation"], data["activation_after"])
    np.testing.assert_allclose(data["cosine"], data["cosine_after"], atol=1e-12)
    alone = concept_neurons(model, torch.ones(families.D_MODEL), ids(8, 3), top=4)
    assert not [name for name in alone if str(name).endswith(("_after", "_change")) or str(name).startswith("cos_")]


def test_chance_is_what_random_directions_reach() -> None:
    draws = torch.randn(4000, 50, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest = cosine_similarity(draws, torch.eye(24, dtype=torch.float64)[0], dim=-1).amax(1)
    assert float((largest > _chance(50, 24)).double().mean()) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("concept", "more", "told"),
    [
        (torch.ones(7), {}, "concept is no direction of the stream; got shape [7]"),
        (torch.zeros(families.D_MODEL), {}, "concept is no direction of the stream; got zeros"),
        (("a", "x"), {}, "concept must name two groups of the text; got a and x"),
        (("a", "a"), {}, "concept must name two groups of the text; got a and a"),
        (("a", "b"), {"top": 29}, "top must be a number of neurons; got 29"),
    ],
)
def test_what_is_no_concept_is_refused_in_one_line(model: mt.Model, concept: Any, more: Any, told: str) -> None:
    with pytest.raises(mt.errors.ArgumentError) as refused:
        concept_neurons(model, concept, TEXT, **more)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_model_is_no_tuned_copy(model: mt.Model) -> None:
    other = mt.open(families.build("gpt2"), prove=False)
    with pytest.raises(mt.errors.ArgumentError, match="after is no tuned copy of the model") as refused:
        concept_neurons(model, ("a", "b"), TEXT, after=mt.planted.neurons().model)
    assert "\n" not in str(refused.value)
    data = concept_neurons(other, ("a", "b"), TEXT, after=other, top=3)  # without gates
    assert "cos_gate" not in data
