"""Frozen passes as an edit: non-linear parts held constant for gradients, while values stay what they are."""

from __future__ import annotations

from dataclasses import dataclass

from microtome.edit._edits import Edit
from microtome.errors import EditError, error


@dataclass(frozen=True, eq=False, repr=False)
class Freeze(Edit):
    """Hold non-linear parts constant for gradients; values stay the same to the bit.

    Attributes:
        norms: the divisor of every norm that runs: those of queries and keys, inside mixers and MLPs, and with a gate
            too. One that has no known form is refused where it runs.
        patterns: attention patterns.
        activations: "gate" (or True) the gate of a gated MLP as a whole; "ratio" the ratio of activation to
            pre-activation, as is always done in a plain MLP; False nothing.
        mlps: whole MLP outputs.
        half_products: of a product of gate and up branch only half the gradient goes back, as both factors carry it.

    With norms, patterns and activations frozen, a model without biases is linear in its embeddings; with the ratio and
    halved products what comes back is the same in sum, and the gate has its share.
    """

    norms: bool = True
    patterns: bool = True
    activations: bool | str = True
    mlps: bool = False
    half_products: bool = False

    def __post_init__(self) -> None:
        if self.activations not in (True, False, "gate", "ratio"):
            raise error(
                EditError,
                "Freeze cannot freeze activations this way",
                got=repr(self.activations),
                allowed='"gate", "ratio", True (the gate) or False',
                do="name one of these",
            )
        if self.half_products and self.activations in (True, "gate"):
            raise error(
                EditError,
                "Freeze cannot halve products while the whole gate is frozen",
                got="the up branch alone carries the gradient, so that half of it would be lost",
                do='use activations="ratio" with half_products=True',
            )
