"""True against false demonstrations: the layer where they part and the heads that bring false labels, as planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import families

import microtome as mt


def test_induction_is_false_induction_where_labels_are_false() -> None:
    """An induction head looks behind the earlier copy of the question: at its label, true or false; layer 1 has it."""
    it = mt.planted.induction(0)
    inputs, labels = range(10, 22), (500, 501)
    # Every input has its label and is asked again, so that copying the label behind it answers, or misleads.
    pairs = [([i], [labels[i % 2]]) for i in inputs] * 8
    data = mt.explain.false_demonstrations(it.model, pairs, shots=60, tests=16, heads=1, controls=2)
    layer, head = it.truth["induction_head"]
    assert data.attrs["heads"] == f"L{layer}H{head}"
    assert float(data["score"].sel(layer=layer, head=head)) > 5 * float(data["other_score"].sel(layer=layer, head=head))
    assert data.attrs["parts_at"] == layer
    assert float(data["gap"]) > 0.5
    assert float(data["gap_without"]) < 0.2
    assert float(data["gap_random"]) == pytest.approx(float(data["gap"]), abs=0.05)


def test_a_calibrated_label_is_not_preferred_for_itself() -> None:
    from microtome.explain._false_demonstrations import calibrated_right

    own = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([[-1.0, -9.0], [-1.2, -9.0], [-2.0, -8.5], [-2.1, -8.0]]).unsqueeze(1)
    assert calibrated_right(scores, own).flatten().tolist() == [1, 1, 1, 1], "though the first label is always likelier"


def test_bad_tasks_are_refused_in_a_line() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    pairs = [([i], [60 + i % 2]) for i in range(5, 50)]
    wrong: list[tuple[type[Exception], str, Any]] = [
        (mt.errors.DataError, "the labels are of one class", [([i], [60]) for i in range(5, 60)]),
        (mt.errors.DataError, "too few pairs; got 45; allowed: 48", pairs),
        (mt.errors.ArgumentError, "two labels begin with one token", [([i], [60, 5 + i % 2]) for i in range(60)]),
    ]
    for kind, text, task in wrong:
        with pytest.raises(kind, match=text) as refused:
            mt.explain.false_demonstrations(model, task)
        assert "\n" not in str(refused.value)
