"""Edits of whole blocks: skipped, repeated, or scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microtome.anatomy import integer, parse_indices
from microtome.edit._edits import Edit
from microtome.edit._validate import validate


@dataclass(frozen=True, eq=False, repr=False)
class BlockEdit(Edit):
    """The base of edits of whole blocks.

    Attributes:
        layers: a layer, or a selection such as "3-7".
    """

    layers: str | int

    def __post_init__(self) -> None:
        layers: Any = self.layers
        parse_indices(layers, "layers")
        if isinstance(layers, list):
            object.__setattr__(self, "layers", [integer(layer) for layer in layers])
        validate(self)


@dataclass(frozen=True, eq=False, repr=False)
class Skip(BlockEdit):
    """Skip whole blocks: the output of layer l is its input. A skipped block is not computed."""


@dataclass(frozen=True, eq=False, repr=False)
class Repeat(BlockEdit):
    """Run blocks several times in a row, each on its own output."""

    times: int = 2


@dataclass(frozen=True, eq=False, repr=False)
class ScaleBlock(BlockEdit):
    """Scale what blocks add: resid_post = resid_pre + factor * (resid_post - resid_pre)."""

    factor: float = 1.0
