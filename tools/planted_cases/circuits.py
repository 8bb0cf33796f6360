"""Circuits that are known because they were compiled, and whether ACDC finds them.

Each case returns what was planted, how much of it was found, and how often it was found where nothing was planted.
"""

from __future__ import annotations

import microtome as mt
from microtome import circuits, planted

Case = dict[str, str]
INPUTS = 24
"""Some programs answer the same to almost everything: they take many inputs to show all of their edges."""
QUICK = ("previous_token", "detect_ab", "last_token", "first_occurrence", "rank")
TAU = 1e-4


def recovered(name: str) -> tuple[int, int, int, int]:
    """Planted edges of a program that ACDC finds, how many there are, and the same of the edges that are not."""
    it = planted.program(name)
    with mt.settings(seed=3):
        data = circuits.acdc_recovery(it, pairs=INPUTS, taus=(TAU,))
    planted_edges, kept = int(data["true"].sum()), int(data["edges"][0])
    hits = round(float(data["recall"][0]) * planted_edges)
    return hits, planted_edges, kept - hits, len(planted.edges(it.model)) - planted_edges


def acdc_of(names: tuple[str, ...]) -> Case:
    """The edges of programs, all together."""
    hits, true, wrong, false = (sum(x) for x in zip(*map(recovered, names), strict=True))
    return {
        "measure": "circuits.acdc", "planted": f"edges of {len(names)} compiled programs, at tau {TAU:g}",
        "found": f"{hits} of {true}", "false": f"{wrong} of {false}",
    }  # fmt: skip


def acdc_on_quick_programs() -> Case:
    """The edges of five small programs."""
    return acdc_of(QUICK)


def acdc_on_all_programs() -> Case:
    """The edges of all compiled programs; takes minutes."""
    return acdc_of(tuple(planted.PROGRAMS))


CASES = (acdc_on_quick_programs, acdc_on_all_programs)
