"""Measures that compare groups: the frame keeps the groups of a text apart, and each score against its closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import average_precision_score
from tests import families
from torch import Tensor

import microtome as mt
from microtome.edit import Scale
from microtome.measurements import token_loss
from microtome.measurements._group_neurons import (
    EDGES,
    average_precision,
    entropy_over_groups,
    select,
)
from microtome.method import Bound, Column, Kept, Pass, Seen, Source, Statistic, declared, forget, measure, sketch
from microtome.method import Text as TextLook
from microtome.model import Model
from microtome.stream import Histogram, Moments, TokenBatch

# ------------------------------------------------------------------------------------------------------------ the frame


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def ids(rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def groups(**rows: int) -> dict[str, Tensor]:
    return {name: ids(n, seed=number) for number, (name, n) in enumerate(rows.items())}


@pytest.fixture
def spread() -> Iterator[str]:
    @measure(
        "spread", of="layer", sites="resid_post", question="How much do groups differ?", atlas=False,
        columns=(
            Column("spread", "norm", "largest minus smallest mean over groups", "none: a toy", interval=False),
            Column("own", "norm", "mean of the group", "all", dims=("group", "layer"), interval=False),
            Column("all", "norm", "mean over groups", interval=False),
        ),
        source=Source("Nobody", "A Toy for Tests", 2026), cost="nothing", check="tests/laws/test_group_neurons.py",
    )  # fmt: skip
    class Spread(Statistic):
        """How far groups are apart."""

        def start(self, model: Model, layer: int | None) -> Kept:
            return {"norm": Moments(1)}

        def update(self, kept: Kept, seen: Seen) -> None:
            kept["norm"].update(seen["resid_post"].norm(dim=-1, keepdim=True), seen.mask)

        def across(self, kept: Mapping[str, Sequence[Kept]]) -> Mapping[str, Tensor]:
            own = torch.stack([torch.cat([k["norm"].result().mean for k in layers]) for layers in kept.values()])
            return {"spread": own.amax(0) - own.amin(0), "own": own, "all": own.mean(0)}

    yield "spread"
    forget("spread")


def test_a_measure_that_compares_sees_all_groups_and_others_beside_it_do_not(spread: str, model: mt.Model) -> None:
    text = groups(one=3, two=5)
    data = mt.measure(model, spread, "firing", text=text)
    plain = [
        model.run(rows, capture="*.resid_post")["*.resid_post"].double().norm(dim=-1).mean((1, 2))
        for rows in text.values()
    ]
    assert data["own"].dims == ("group", "layer")
    assert data["group"].values.tolist() == ["one", "two"]
    np.testing.assert_allclose(data["own"], torch.stack(plain), rtol=1e-5)
    np.testing.assert_allclose(data["spread"], (plain[0] - plain[1]).abs(), rtol=1e-4)
    np.testing.assert_allclose(data["own_diff"], data["own"] - data["all"], atol=1e-9)
    assert data["firing_rate"].dims == ("layer", "neuron")
    alone = mt.measure(model, "firing", text=text)
    assert data["firing_rate"].equals(alone["firing_rate"])
    assert mt.measure(model, spread, "firing", text=text, groups=["two"])["firing_rate"].sizes["group"] == 1


def test_one_group_is_refused_in_one_line(spread: str, model: mt.Model) -> None:
    with pytest.raises(mt.errors.ArgumentError, match='"spread" compares groups, and this text has one') as refused:
        mt.measure(model, spread, text=ids())
    assert "\n" not in str(refused.value)
    assert "give several texts, each a group" in str(refused.value)
    assert "text={" in mt.methods()[spread].call


def test_the_parts_of_a_comparison_merge_to_the_whole(spread: str, model: mt.Model) -> None:
    def part(some: Sequence[TokenBatch]) -> Pass:
        names = (spread, "group_neurons")
        bound = [Bound(one, one.statistic({}), one.layers(model)) for one in map(declared, names)]  # type: ignore[attr-defined]
        made = Pass(model, bound, TextLook(), compared=("a", "b", "c"))
        for batch in some:
            made.update(batch)
        return made

    every = [TokenBatch.of(ids(2, seed=i), torch.tensor([24 * i, 24 * i + 12])) for i in range(6)]
    every = [TokenBatch(b.tokens, b.start, b.document, b.position, b.group + i % 3) for i, b in enumerate(every)]
    whole, merged = part(every), part(every[:2]).merge(part(every[2:]))
    for name, data in whole.results().items():
        for column, x in data.data_vars.items():
            np.testing.assert_allclose(x, merged.results()[name][column], rtol=1e-10, equal_nan=True, err_msg=column)
    other = Pass(model, whole.bound, TextLook(), compared=("a", "b"))
    with pytest.raises(mt.errors.DataError, match="cannot merge passes"):
        other.merge(whole)


# -------------------------------------------------------------------------------------------------------- group neurons


def test_lape_lies_between_nothing_and_the_logarithm_of_the_groups() -> None:
    rates = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)).double()
    rates[:, 0], rates[:, 1], rates[:, 2] = 0.3, torch.eye(5)[2] * 0.7, 0.0
    found = entropy_over_groups(rates)
    assert found[0] == pytest.approx(math.log(5))
    assert found[1] == 0
    assert found[2].isnan()
    assert bool(((found[3:] > 0) & (found[3:] < math.log(5))).all())
    p = (rates / rates.sum(0))[:, 3:].numpy()
    np.testing.assert_allclose(found[3:], -(p * np.log(p)).sum(0), rtol=1e-12)
    with_a_gap = torch.cat([rates, torch.full((1, 40), torch.nan)])
    assert torch.equal(entropy_over_groups(with_a_gap).nan_to_num(9), found.nan_to_num(9))


def test_a_neuron_is_chosen_for_the_groups_that_it_fires_in() -> None:
    rates = torch.full((3, 100), 0.1).double() + torch.rand(3, 100, generator=torch.Generator().manual_seed(0)) * 0.01
    rates[:, 7] = torch.tensor([0.9, 0.0, 0.0])
    rates[:, 8] = torch.tensor([0.0, 0.8, 0.8])
    rates[:, 9] = torch.tensor([0.0, 0.0, 0.108])  # of one group, but firing no more than many do
    chosen = select(rates, entropy_over_groups(rates), 0.02)
    assert chosen.nonzero().tolist() == [[0, 7], [1, 8], [2, 8]]


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=60), rng.random(60) < 0.3
    held = [Histogram(1, EDGES) for _ in range(2)]
    for score, label in zip(scores, labels, strict=True):
        held[int(label)].update(torch.tensor([[score]]))
    counts = [torch.cat([h.below[:, None], h.count, h.above[:, None]], 1) for h in (one.result() for one in held)]
    binned = np.digitize(scores, EDGES.numpy())
    found = float(average_precision(counts[1].double(), counts[0].double())[0])
    assert found == pytest.approx(average_precision_score(labels, binned))
    assert found == pytest.approx(average_precision_score(labels, scores), abs=0.08)


def of_groups(model: mt.Model, text: Mapping[str, Tensor], **options: object) -> xr.Dataset:
    return mt.measure(model, "group_neurons", text=text, **options)


def test_groups_in_another_order_give_the_same_in_that_order(model: mt.Model) -> None:
    text = groups(a=4, b=5, c=6)
    data, turned = of_groups(model, text), of_groups(model, dict(reversed(text.items())))
    for name, x in data.data_vars.items():
        other = turned[name].sel(group=data["group"]) if "group" in x.dims else turned[name]
        np.testing.assert_allclose(x, other, rtol=1e-9, equal_nan=True, err_msg=str(name))


def test_each_column_is_that_of_its_group_alone(model: mt.Model) -> None:
    text = groups(a=4, b=5)
    data = of_groups(model, text)
    for g, rows in enumerate(text.values()):
        run = model.run(rows, capture=["*.mlp.gate", "*.mlp.post"])
        np.testing.assert_allclose(data["group_firing"][g], (run["*.mlp.gate"] > 0).double().mean((1, 2)))
        norms = torch.stack([layer.W_out.detach().double().norm(dim=-1) for layer in model.layers])
        effect = run["*.mlp.post"].abs().double().mean((1, 2)) * norms
        np.testing.assert_allclose(data["group_effect"][g], effect, rtol=1e-5)
        np.testing.assert_allclose(data["group_firing_elsewhere"][1 - g], data["group_firing"][g])
    np.testing.assert_allclose(data["group_ap_chance"], [4 / 9, 5 / 9])


def test_a_group_of_too_few_tokens_is_undecided(model: mt.Model) -> None:
    text = groups(a=4, b=5, c=1)
    data, without = of_groups(model, text), of_groups(model, {k: text[k] for k in "ab"})
    for name in ("group_firing", "group_effect", "group_ap", "group_selected", "group_ap_chance"):
        assert np.isnan(data[name].sel(group="c")).all(), name
        assert np.isfinite(data[name].sel(group="a")).all(), name
    assert np.array_equal(data["lape"], without["lape"], equal_nan=True)
    assert np.isfinite(of_groups(model, text, least=12)["group_firing"]).all()


def test_the_gradient_is_the_slope_of_the_loss_along_a_neuron(model: mt.Model) -> None:
    text = groups(a=2, b=3)
    data = mt.measure(model, "group_gradient", text=text)
    for g, rows in enumerate(text.values()):
        for layer, neuron in ((0, 4), (2, 30)):
            less, more = (
                token_loss(model.run(rows, edits=Scale(f"{layer}.mlp.post[{neuron}]", s)).logits, rows).double().mean()
                for s in (0.95, 1.05)
            )
            expected = float(less - more) / 0.1
            assert float(data["group_gradient"][g, layer, neuron]) == pytest.approx(expected, rel=0.05, abs=2e-6)
            assert float(data["group_gradient_elsewhere"][1 - g, layer, neuron]) == pytest.approx(
                float(data["group_gradient"][g, layer, neuron])
            )


def test_a_sketch_says_the_same_call() -> None:
    for name in ("group_neurons", "group_gradient", "firing"):
        assert sketch(name).method.call == mt.methods()[name].call
