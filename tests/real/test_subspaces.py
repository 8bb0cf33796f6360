"""Subspaces in the default model: what is swapped at a name decides the pronoun, and a random direction does not."""

from __future__ import annotations

import pytest

import microtome as mt
from microtome.subspaces import Swaps, find
from microtome.subspaces._exchange import Exchange
from microtome.subspaces._score import projection

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_a_name_swapped_swaps_the_pronoun_and_a_random_direction_of_it_does_not() -> None:
    model = mt.open()
    swaps = Swaps.of_pairs(mt.tasks.build("gendered_pronoun", model, 10), "subject")
    ready = Exchange(model, "10.resid_post", swaps.swaps)
    assert sum(ready.known) / len(ready) > 0.9
    assert float(ready.hits(lambda x: x).mean()) > 0.6
    chance = find(model, swaps, "10.resid_post", 1, method="random")
    assert float(ready.hits(projection(chance.basis)).mean()) < 0.1
