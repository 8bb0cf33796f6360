"""Subspaces in the default model: swaps are exact there, and a learned one does what a random one does not."""

from __future__ import annotations

import pytest

import microtome as mt
from microtome import subspaces
from microtome.subspaces import Swaps
from microtome.subspaces._exchange import Exchange
from microtome.subspaces._score import projection

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


def test_a_learned_direction_swaps_pronouns_and_a_random_one_does_not(model: mt.Model) -> None:
    task = mt.tasks.build("gendered_pronoun", model, 24).known_by(model)
    half = len(task) // 2 * 2
    every = Swaps.of_pairs(task)
    train, test = every[:half], every[half:]
    site = "20.resid_post"
    judged = Exchange(model, site, test.swaps)
    learned, chance = (
        float(judged.hits(projection(subspaces.find(model, train, site, 1, method=m, steps=40, rows=8).basis)).mean())
        for m in ("das", "random")
    )
    assert learned > 0.7 > 0.3 > chance
