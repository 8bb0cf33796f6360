"""Events of neurons by token, n-gram and place, and their rhythm, against the same counts made plainly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements import neuron_facets
from microtome.measurements._frequency_tags import tagged
from microtome.measurements._neuron_events import BUCKETS, _triggers, bucket, cover, information
from microtome.method import Bound, Pass, Text, declared
from microtome.stream import Counter as Groups
from microtome.stream import TokenBatch

ROWS, WIDTH = 8, 24


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(5, 40, (ROWS, WIDTH), generator=rng())


def test_the_hashes_spread_evenly_and_each_in_its_own_way() -> None:
    ids = torch.arange(50_000)
    every = [bucket(ids, table) for table in range(3)]
    for found in every:
        assert bool(((found >= 0) & (found < BUCKETS)).all())
        share = found.bincount(minlength=BUCKETS).double() / len(ids) * BUCKETS
        assert 0.8 < float(share.min()) <= float(share.max()) < 1.2
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((every[one] == every[other]).double().mean()) == pytest.approx(1 / BUCKETS, rel=0.2)


def test_counts_of_many_groups_are_exact() -> None:
    fires, group = torch.rand(40_000, 3, generator=rng()) < 0.4, torch.randint(64, (40_000,), generator=rng(1))
    held = Groups([str(i) for i in range(64)], 3)
    held.update(fires, group)
    expected = torch.zeros(64, 3, dtype=torch.int64).index_add(0, group, fires.long())
    assert torch.equal(held.result().count, expected)
    assert torch.equal(held.result().total, group.bincount(minlength=64))


def test_a_cover_is_the_fewest_that_hold_95_per_cent() -> None:
    counts = torch.tensor([[95, 1, 10, 0], [5, 1, 80, 0], [0, 1, 10, 0]])
    found = cover(counts)
    assert found[:3].tolist() == [1, 3, 3]
    assert found[3].isnan()


@pytest.mark.parametrize("seed", range(3))
def test_the_information_is_that_of_scikit_learn(seed: int) -> None:
    place, fires = torch.randint(6, (300,), generator=rng(seed)), torch.rand(300, generator=rng(seed + 9)) < 0.3
    fires |= place == seed
    events = torch.stack([(fires & (place == p)).sum() for p in range(6)]).unsqueeze(1)
    found = float(information(events, place.bincount(minlength=6))[0])
    assert found == pytest.approx(mutual_info_score(place.numpy(), fires.numpy()) / np.log(2), abs=1e-9)


def test_a_neuron_that_tells_the_place_gives_all_its_bits() -> None:
    events = torch.tensor([[100, 0, 25], [0, 0, 25], [0, 0, 25], [0, 0, 25]])
    found = information(events, torch.full((4,), 100))
    expected = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert found.tolist() == pytest.approx([expected, 0.0, 0.0], abs=1e-12)


def test_the_counts_are_those_of_plain_loops(model: mt.Model, tokens: Tensor) -> None:
    data = mt.measure(model, "neuron_events", text=tokens, few=4)
    fires = model.run(tokens, capture="*.mlp.gate")["*.mlp.gate"] > 0
    np.testing.assert_array_equal(data["events"], fires.sum((1, 2)))
    np.testing.assert_allclose(data["firing_share"], fires.double().mean((1, 2)))
    post = model.run(tokens, capture="*.mlp.post")["*.mlp.post"]
    strong = mt.measure(model, "neuron_events", text=tokens, above=0.05)["events"]
    np.testing.assert_array_equal(strong, (post.abs() > 0.05).sum((1, 2)))
    for layer, neuron in ((0, 3), (1, 20), (2, 55)):
        flags = fires[layer, :, :, neuron]
        for name, k in (("token", 1), ("bigram", 2), ("trigram", 3)):
            grams: Counter[tuple[int, ...]] = Counter()
            for row in range(ROWS):
                for pos in range(k - 1, WIDTH):
                    if flags[row, pos]:
                        grams[tuple(tokens[row, pos - k + 1 : pos + 1].tolist())] += 1
            total, held, n = sum(grams.values()), 0, 0
            for count in sorted(grams.values(), reverse=True):
                n, held = (n + 1, held + count) if held < 0.95 * total else (n, held)
            own = float(data[f"{name}_cover"][layer, neuron])
            assert own <= n, name
            assert own >= 0.5 * min(n, BUCKETS), name  # what shares a bucket counts once
        of_place = (torch.arange(WIDTH) // 4).expand(ROWS, WIDTH)[:, 1:].flatten()
        bits = mutual_info_score(of_place, flags[:, 1:].flatten()) / np.log(2)
        assert float(data["position_bits"][layer, neuron]) == pytest.approx(bits, abs=1e-9)
    assert float(data["position_bits_chance"].max()) == pytest.approx(5 / (2 * ROWS * (WIDTH - 1) * np.log(2)))


def test_triggers_are_the_tokens_with_most_events() -> None:
    ids, fires = torch.randint(30, (400,), generator=rng(1)), torch.rand(400, 3, generator=rng(2)) < 0.1
    fires[:, 1] = (ids == 7) | (ids == 9)
    fires[:, 2] = False
    tables = [torch.stack([(fires & (bucket(ids, t) == b)[:, None]).sum(0) for b in range(BUCKETS)]) for t in range(3)]
    found, at = _triggers(tables, ids.bincount(minlength=30), fires.sum(0), 4)
    assert set(found[1].tolist()) == {7, 9, -1}
    assert int(at[1].sum()) == int(fires[:, 1].sum())
    assert found[2].tolist() == [-1] * 4
    plain = ids[fires[:, 0]].bincount(minlength=30)
    assert at[0].tolist() == plain.sort(descending=True).values[:4].tolist()


def test_parts_of_a_text_merge_to_the_whole(model: mt.Model, tokens: Tensor) -> None:
    def part(rows: range) -> Pass:
        one = declared("neuron_events")
        made = Pass(model, [Bound(one, one.statistic({}), one.layers(model))], Text())  # type: ignore[attr-defined]
        for row in rows:
            made.update(TokenBatch.of(tokens[row : row + 1], torch.tensor([row * WIDTH])))
        return made

    whole = part(range(ROWS)).results()["neuron_events"]
    merged = part(range(5, ROWS)).merge(part(range(5))).results()["neuron_events"]
    assert whole.equals(merged)


# ------------------------------------------------------------------------------------------------------------- rhythm


def test_a_wave_of_the_period_has_all_of_its_power_there() -> None:
    n, period = 41, 4
    time = torch.arange(n).double()
    wave = torch.stack([
        3 + torch.cos(2 * torch.pi * time / period + 0.7), (time % period == 1).double(),
        torch.cos(2 * torch.pi * time * 3 / 40), torch.ones(n).double(),
    ], dim=-1).unsqueeze(0)  # fmt: skip
    found = tagged(wave, period)
    np.testing.assert_allclose(found["tag_power"], [[1, 0.5, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(found["tag2_power"], [[0, 0.5, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(found["tag_power_beside"], [[0, 0, 0, 0]], atol=1e-12)


def test_noise_has_no_more_power_at_the_tags_than_beside_them() -> None:
    noise = torch.randn(200, 64, 5, generator=rng()).double()
    found = {name: float(x.mean()) for name, x in tagged(noise, 4).items()}
    assert found["tag_power"] == pytest.approx(found["tag_power_beside"], rel=0.1)
    assert found["tag2_power_beside"] == pytest.approx(found["tag_power_beside"], rel=0.1)


def test_a_row_of_less_than_two_periods_is_refused(model: mt.Model, tokens: Tensor) -> None:
    with pytest.raises(mt.errors.DataError, match="too short for a period of 16; got 23 tokens; allowed: 32 or more"):
        mt.measure(model, "frequency_tags", text=tokens, period=16)


# ------------------------------------------------------------------------------------------------------------- facets


@pytest.mark.parametrize("neurons", [[(0, 56)], [(9, 0)], []])
def test_facets_of_neurons_that_are_not_there_are_refused(
    model: mt.Model, tokens: Tensor, neurons: list[tuple[int, int]]
) -> None:
    with pytest.raises(mt.errors.ArgumentError, match="no such neuron|no neuron is named"):
        neuron_facets(model, neurons, tokens)


def test_a_neuron_with_few_contexts_is_undecided(model: mt.Model, tokens: Tensor) -> None:
    data = neuron_facets(model, [(0, 1), (1, 2)], tokens[:3], top=10)
    assert np.isnan(data["facets"]).all()
    assert (data["contexts"] <= 3).all()
