"""Neurons that were planted are found by the measures of neurons, and nothing is where nothing was planted."""

from __future__ import annotations

from typing import Any

import pytest
from tests.scripts import script

neurons = script("tools/planted_cases/neurons.py")


@pytest.mark.parametrize("case", neurons.CASES, ids=lambda case: case.__name__)
def test_all_that_was_planted_is_found_and_nothing_else(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "SEEDS", (0,))  # the table has more
    made = case()
    found, of = made["found"].split(" of ")
    assert found == of
    assert made["false"].startswith("0 of ")
    assert int(made["false"].removeprefix("0 of ")) > 1
