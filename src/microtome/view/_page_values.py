"""Numbers of a page: rounded, and null where nothing was measured."""

from __future__ import annotations

import math

import numpy as np

DIGITS = 5
"""Significant digits of a value."""


def rounded(value: float) -> float | None:
    """A number for JSON."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def rounded_row(of: np.ndarray) -> list[float | None]:
    """A row of them."""
    return [rounded(value) for value in of.tolist()]


def rounded_rows(of: np.ndarray) -> list[list[float | None]]:
    """Rows of them."""
    return [rounded_row(row) for row in of]
