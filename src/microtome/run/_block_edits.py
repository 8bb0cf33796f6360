"""Edits of whole blocks, and of gradients: what is left out, run again, scaled, or held constant."""

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


@dataclass(frozen=True, eq=False, repr=False)
class Freeze(Edit):
    """Hold non-linear parts constant for gradients; values stay the same to the bit.

    Attributes:
        norms: the divisor of every norm.
        patterns: attention patterns.
        activations: the gate of a gated MLP; in a plain MLP the ratio of activation to pre-activation.
        mlps: whole MLP outputs.

    With norms, patterns and activations frozen, a model without biases is linear in its embeddings.
    """

    norms: bool = True
    patterns: bool = True
    activations: bool = True
    mlps: bool = False
