"""What is planted for questions about an answer's way is found by them, and nothing where nothing was planted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.scripts import script

flow = script("tools/planted_cases/flow.py")


@pytest.mark.parametrize("case", flow.CASES, ids=lambda case: case.__name__)
def test_all_that_was_planted_is_found_and_nothing_else(case: Callable[[], dict[str, str]]) -> None:
    row = case()
    found, planted = map(int, row["found"].split(" of "))
    false, others = map(int, row["false"].split(" of "))
    assert found == planted > 0, row
    assert false == 0 < others, row
