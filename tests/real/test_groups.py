"""Groups of texts in the default model: whose tokens its layers give their probability to."""

from __future__ import annotations

import pytest

import microtome as mt
from microtome.stream import standard_library_code, standard_library_text

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_code_is_told_from_prose_in_the_last_layer_and_hardly_said_in_the_tenth() -> None:
    text = {"prose": standard_library_text(), "code": standard_library_code()}
    data = mt.measure(mt.open(prove=False), "lens_groups", text=text, tokens=2_400)
    assert (data["lens_share"][:, -1] > 3 * data["lens_share_elsewhere"][:, -1]).all()
    code = data["lens_share"].sel(group="code").values
    assert code[10] < 0.05 < 0.15 < code[-1]
    assert (data["text_share"] > 5 * data["text_share_elsewhere"]).all()
