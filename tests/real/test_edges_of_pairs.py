"""Mean edge scores on the default model: the best are edges that matter."""

from __future__ import annotations

import numpy as np
import pytest

import microtome as mt

pytestmark = pytest.mark.real


def test_the_best_edges_of_a_task_matter() -> None:
    model = mt.open()
    task = mt.tasks.build("indirect_object", model, n=4)
    scores = mt.explain.attribute(model, task, method="eap-ig", steps=3, direction="noise", verify=0)
    assert int(scores["score"].notnull().sum()) == 123_211
    assert scores.attrs["pairs"] == 4
    exact = abs(mt.explain.verify(model, scores, top=20, others=20)["score_exact"].values)
    size = abs(scores["score"].values)
    best = np.isfinite(exact) & (size >= np.sort(size[np.isfinite(size)])[-20])
    others = np.isfinite(exact) & ~best
    assert exact[best].mean() > 20 * exact[others].mean()  # the control: random edges
