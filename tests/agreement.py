"""Comparing effects so that it says something: each equals what is expected, and most are far above the tolerance.

A tolerance as large as the effects it is allowed lets wrong ones pass. So whoever compares effects says how large they
are, and they are refused where too few of them stand out:

    with agreement(1e-6) as agree:
        for cell in cells:
            agree(found(cell), literal(cell), cell)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

STANDS_OUT = 10.0
"""Tolerances that an effect is large, if it stands out."""
MOST = 0.7
"""The share of all effects that must: some are 0 by the shape of the model, where nothing flows back."""


class Agreement:
    """Effects that were compared, and their sizes."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance, self.sizes = tolerance, list[float]()

    def __call__(self, found: Any, expected: Any, of: object = "") -> None:
        """Each of the found effects is the one expected, a missing one missing; each counts as one comparison."""
        self.sizes += np.abs(self._compared(found, expected, of)).ravel().tolist()

    def cell(self, found: Any, expected: Any, base: Any, of: object = "") -> None:
        """What one cell reads, many numbers, is what is expected; its effect is the largest difference to the base."""
        self.sizes.append(float(np.nanmax(np.abs(self._compared(found, expected, of) - _array(base)))))

    def _compared(self, found: Any, expected: Any, of: object) -> np.ndarray:
        x, y = _array(found), _array(expected)
        assert x.shape == y.shape, (of, x.shape, y.shape)
        assert (np.isnan(x) == np.isnan(y)).all(), of
        gap = float(np.nanmax(np.abs(x - y), initial=0.0))
        assert gap <= self.tolerance, f"{of}: {gap:.3g} apart, allowed {self.tolerance:.0e}"
        return y

    def stands_out(self, most: float) -> None:
        """Most of the effects that were compared are more than ten times the tolerance."""
        sizes = np.array([size for size in self.sizes if not np.isnan(size)])
        assert sizes.size, "no effect was compared"
        share = float((sizes > STANDS_OUT * self.tolerance).mean())
        median = float(np.median(sizes))
        told = f"{share:.0%} of {sizes.size} effects (median {median:.2g}) stand out of {self.tolerance:.0e}"
        assert share >= most, f"{told}; needed: {most:.0%}"


def _array(x: Any) -> np.ndarray:
    x = x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else x
    return np.asarray(getattr(x, "values", x), dtype=float)


@contextmanager
def agreement(tolerance: float, *, most: float = MOST) -> Iterator[Agreement]:
    """Compare effects to within a tolerance; at the end, most of them must be more than ten times as large.

    Args:
        tolerance: how far an effect may be from the expected one.
        most: the share of effects that must stand out; give a smaller one only with the reason.
    """
    agree = Agreement(tolerance)
    yield agree
    agree.stands_out(most)


def agreed(found: Any, expected: Any, tolerance: float, *, most: float = MOST) -> None:
    """The same of effects that are there all at once."""
    with agreement(tolerance, most=most) as agree:
        agree(found, expected)
