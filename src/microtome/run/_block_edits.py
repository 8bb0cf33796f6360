"""Edits of whole blocks: what is left out, run again, or scaled."""

from __future__ import annotations

from dataclasses import dataclass

from microtome.run._edits import Edit


@dataclass(frozen=True, eq=False, repr=False)
class Skip(Edit):
    """Leave out whole blocks: what enters layer l leaves it unchanged. Costs nothing where it skips."""

    layers: str | int


@dataclass(frozen=True, eq=False, repr=False)
class Repeat(Edit):
    """Run blocks several times in a row, each on its own output."""

    layers: str | int
    times: int = 2


@dataclass(frozen=True, eq=False, repr=False)
class ScaleBlock(Edit):
    """Scale what blocks add: resid_post = resid_pre + factor * (resid_post - resid_pre)."""

    layers: str | int
    factor: float = 1.0
