"""Attribution on planted models: what gradients miss, and the tokens that a circuit reads."""

from __future__ import annotations

import pytest
from tests.scripts import script

attribution = script("tools/planted_cases/attribution.py")


def test_a_saturated_head_is_seen_by_the_correction_and_not_by_the_gradient() -> None:
    case = attribution.saturated_keys()
    assert (case["found"], case["false"]) == ("6 of 6", "0 of 6")


@pytest.mark.slow
@pytest.mark.parametrize("case", attribution.CASES[1:], ids=lambda case: case.__name__)
def test_tokens_that_a_circuit_reads(case: object) -> None:
    found = case()  # type: ignore[operator]
    assert int(found["found"].split()[0]) >= 5
    assert int(found["false"].split()[0]) <= 1
