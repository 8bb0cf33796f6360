"""Attribution where the truth is planted: a saturated head that gradients do not see, and tokens that nothing reads.

Each case returns what was planted, how much of it was found, and how often it was found where nothing was planted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import microtome as mt
from microtome import planted

Case = dict[str, str]
ROWS = 6


def _rows(vocab: int) -> list[Tensor]:
    """Nine random tokens and the fifth again: its successor, at position 5, is what follows."""
    rng = torch.Generator().manual_seed(4)
    found: list[Tensor] = []
    for _ in range(ROWS):
        row = torch.randperm(vocab - 1, generator=rng)[:9] + 1
        found.append(torch.cat([row, row[4:5]]))
    return found


def saturated_keys() -> Case:
    """The keys of an induction head that looks at one token alone: exact, by AtP, and by AtP*.

    Found: the size by AtP* is more than half of the exact one; false: that by AtP is.
    """
    it = planted.induction()
    layer, head = it.truth["induction_head"]
    found, false = 0, 0
    for row in _rows(it.model.anatomy.d_vocab):
        other = row.clone()
        other[4] = row[0]  # what was repeated stands there no more, so that nothing matches
        given: dict[str, Any] = {"answer": int(row[5]), "foil": int(row[7]), "direction": "noise", "verify": 0}
        sizes = {}
        for method in ("atp", "atp*"):
            data = mt.explain.attribute(it.model, row, other, method=method, sites=["attn.k[head]"], **given)
            sizes[method] = abs(float(data["attn.k[head]"][layer, head]))
        given = {"answer": given["answer"], "foil": given["foil"], "direction": "noise", "share": False}
        exact = mt.explain.patch(it.model, row, other, sites=["attn.k[head]"], **given)
        truth = abs(float(exact["attn.k[head]"][layer, head]))
        found += sizes["atp*"] > truth / 2
        false += sizes["atp"] > truth / 2
    return {
        "measure": "attribute, atp*", "planted": "keys of a head that attends to one token alone",
        "found": f"{found} of {ROWS}", "false": f"{false} of {ROWS}",
    }  # fmt: skip


def _top(measure: str, scores: Callable[[mt.Model, Tensor, int], Any]) -> Case:
    """Whether the token that is copied has the largest score but for the last one, and whether a null token has."""
    it = planted.induction()
    found, false = 0, 0
    for row in _rows(it.model.anatomy.d_vocab):
        sizes = abs(scores(it.model, row, int(row[5])).values[:-1])
        best = int(sizes.argmax())
        found += best in (4, 5)  # the token before and the one that is copied
        false += best not in (4, 5)
    return {
        "measure": measure, "planted": "the two tokens that an induction circuit reads, among ten",
        "found": f"{found} of {ROWS}", "false": f"{false} of {ROWS}",
    }  # fmt: skip


def read_by_legrad() -> Case:
    """LeGrad."""
    return _top("legrad", lambda model, row, answer: mt.explain.legrad(model, row, answer=answer)["relevance"])


def read_by_integrated_gradients() -> Case:
    """Integrated gradients from the mean embedding."""
    return _top(
        "integrated_gradients",
        lambda model, row, answer: mt.explain.integrated_gradients(model, row, answer=answer)["score"],
    )


def read_by_sharing() -> Case:
    """Sharing ratios."""
    return _top("sharing", lambda model, row, answer: mt.explain.sharing(model, row, answer=answer)["share"])


CASES = (saturated_keys, read_by_legrad, read_by_integrated_gradients, read_by_sharing)
