"""On the default model: a tone is told in the middle layers at a token that says nothing of it, and is used there."""

from __future__ import annotations

import numpy as np
import pytest

import microtome as mt

pytestmark = [pytest.mark.real, pytest.mark.slow]
TONES = {
    "good": ["great", "wonderful", "excellent", "lovely", "brilliant", "delightful", "superb", "fantastic"],
    "bad": ["terrible", "awful", "dreadful", "horrible", "boring", "dull", "poor", "disappointing"],
}
ROWS = [
    {"text": f"The {noun} was {word}. I felt very", "label": label, "group": word}
    for label, words in TONES.items()
    for word in words
    for noun in ("movie", "meal", "concert", "book")
]


def test_a_tone_is_told_and_used() -> None:
    model = mt.open(prove=False)
    found = mt.probes.fit(
        model, ROWS, site="0.resid_pre@-1,15.resid_post@-1,24.resid_post@-1", untrained=False, target="good",
        answer=" good", foil=" bad",
    )  # fmt: skip
    scores = found.scores
    after = scores.sel(site="resid_post@-1", layer=[15, 24])
    assert (after["accuracy"] > 0.9).all()
    assert (after["accuracy_lo"] > scores["majority_hi"]).all()
    assert float(scores["accuracy"].sel(site="resid_pre@-1", layer=0)) <= 0.6, "the last token is the same in all"
    assert (after["adding_lo"] > 3 * np.abs(after["adding_random"])).all()
    assert (after["ablating_lo"] > 0).all()
