"""Gaussian noise as a value: the same in every batch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.edit._edits import Selection, SiteEdit
from microtome.errors import EditError, error


@dataclass(frozen=True, eq=False, repr=False)
class Noise(SiteEdit):
    """Add Gaussian noise: x + std * n, where n is drawn anew for each site, position and unit.

    The draw depends on the seed, the site, the position among the row's own tokens and the unit, and on nothing else:
    not on other rows, on padding, or on what else is selected. So a cell of a sweep sees what a run of its own
    would see, and all rows of a batch see the same noise; give rows different seeds for different noise.

    Attributes:
        std: the standard deviation of what is added.
        seed: of the draw, at least 0.
    """

    std: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address.name in ("attn.scores", "attn.pattern"):
            raise error(EditError, f"Noise cannot act on {self.address.name}", do="add noise to attn.q or attn.k")
        if not (math.isfinite(self.std) and self.std >= 0):
            raise error(
                EditError,
                f"std of Noise on {self.site} must be 0 or more",
                got=self.std,
                do="give a standard deviation",
            )
        if self.seed < 0:
            raise error(
                EditError, f"seed of Noise on {self.site} must be 0 or more", got=self.seed, do="give another seed"
            )

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The sum of x and its noise."""
        if self.std == 0:
            return x
        units = list(range(x.shape[2])) if where.units is None else where.units.tolist()
        width = math.prod(x.shape[3:])
        rows: list[Tensor] = []
        for positions in where.frame.positions(x.shape[1], x.device).tolist():
            drawn = [_drawn(self.seed, str(where.site), p, (max(units) + 1) * width) for p in positions]
            rows.append(torch.stack(drawn).unflatten(-1, (-1, width))[:, units])
        noise = torch.stack(rows).reshape(-1, *x.shape[1:])
        return x + self.std * noise.to(device=x.device, dtype=x.dtype)


@lru_cache(maxsize=4096)
def _drawn(seed: int, site: str, position: int, size: int) -> Float[Tensor, " {size}"]:
    """Standard normal numbers [size]; fewer of them are the first of more."""
    key = hashlib.sha256(f"{site}@{position}".encode()).digest()
    generator = np.random.Generator(np.random.Philox([seed, int.from_bytes(key[:8], "big")]))
    return torch.from_numpy(generator.standard_normal(size))
