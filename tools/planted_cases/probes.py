"""Concepts that are where they were put, and how many of them probes find, and find to be used.

Each case returns what was planted, how much of it was found, and how often it was found where nothing was planted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import microtome as mt
from microtome import planted

Case = dict[str, str]


def _case(what: str, found: Sequence[bool], false: Sequence[bool]) -> Case:
    """A row of the table."""
    return {
        "measure": "probe", "planted": what, "found": f"{sum(found)} of {len(found)}",
        "false": f"{sum(false)} of {len(false)}",
    }  # fmt: skip


def prompts(truth: dict[str, Any], n: int = 80) -> list[dict[str, Any]]:
    """A word of a tone, then neutral words: the last tells nothing of the tone."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        label = ("good", "bad")[i % 2]
        word = truth[label][i // 2 % len(truth[label])]
        ids = [truth["bos"], word, *rng.choice(truth["neutral"], 4).tolist()]
        rows.append({"text": ids, "label": label, "group": str(word)})
    return rows


def tone_of_a_text() -> Case:
    """A tone is decoded where it is written, and used there; before it is not, nor is a label that nothing holds."""
    found: list[bool] = []
    false: list[bool] = []
    for seed in range(2):
        made = planted.steering(seed=seed)
        truth = made.truth
        scores = mt.probes.probe(
            made.model, prompts(truth), site="0.resid_pre@-1,0-1.resid_post@-1", untrained=False, target="good",
            answer=truth["good"][0], foil=truth["bad"][0],
        )  # fmt: skip
        after, before = (scores.sel(site=f"{name}@-1") for name in ("resid_post", "resid_pre"))
        found += (after["accuracy_lo"] > scores["majority_hi"]).values.tolist()
        found += (after["adding_lo"] > 3 * abs(after["adding_random"])).values.tolist()
        false += [float(before["accuracy_lo"][0]) > float(scores["majority_hi"]), float(before["adding_lo"][0]) > 0.1]
        rng = np.random.default_rng(seed)
        other = {row["group"]: rng.choice(["a", "b"]) for row in prompts(truth)}
        rows = [row | {"label": other[row["group"]]} for row in prompts(truth)]
        none = mt.probes.probe(made.model, rows, untrained=False)
        false += (none["accuracy_lo"] > none["majority_hi"]).values.tolist()
    return _case("the tone of a text, in two models: where it can be decoded, and that it is used", found, false)


CASES: tuple[Callable[[], Case], ...] = (tone_of_a_text,)
