"""ACDC finds the circuit of every compiled program, and that circuit alone is the program."""

from __future__ import annotations

import pytest
import torch

import microtome as mt
from microtome import circuits, planted
from microtome.circuits._planted import engines_of

NAMES = list(planted.PROGRAMS)
QUICK = ("previous_token", "detect_ab", "last_token")
INPUTS = 24
"""Some programs answer the same to almost everything: they take many inputs to show all of their edges."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_acdc_finds_the_circuit(name: str) -> None:
    it = planted.program(name)
    with mt.settings(seed=3):
        data = circuits.acdc_recovery(it, pairs=INPUTS, taus=(1e-4,))
    assert float(data["f1"].max()) == 1.0


def test_the_planted_circuit_alone_is_the_program_and_no_other_of_its_size_is() -> None:
    it = planted.program("previous_token")
    with mt.settings(seed=3):
        engines, true, _ = engines_of(it, 8)
    for engine in engines:
        none = engine.measure(torch.zeros_like(true))
        assert float(engine.measure(true).max()) < 1e-4
        assert float(none.max()) > 0.1
        for u, v in true.nonzero().tolist():  # each edge is needed, by one of the corruptions
            less = true.clone()
            less[u, v] = False
            assert max(float(e.measure(less).max()) for e in engines) > 1e-2
        edges = engine.edges.nonzero()
        some = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[: int(true.sum())]]
        random = torch.zeros_like(true)
        random[some[:, 0], some[:, 1]] = True
        assert float(engine.measure(random).mean()) > 0.5 * float(none.mean())
