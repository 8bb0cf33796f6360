"""How far the means of two sets of examples are from each other, of the same examples or of others.

Formula:  d = mean x - mean y; ends d -+ t(f) s, s^2 = v_x + v_y, v = variance / n of each set,
          f = s^4 / (v_x^2 / (n_x - 1) + v_y^2 / (n_y - 1)) (Welch); of the same examples, the interval of the mean of
          their differences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import DataError, error
from microtome.stream import mean_interval

LEAST = 8
"""Examples of each set below which there is no interval."""


def difference_of_means(
    first: Float[Tensor, " example *of"], second: Float[Tensor, " other *of"], *, paired: bool
) -> tuple[Float[Tensor, "*of"], Float[Tensor, "*of"], Float[Tensor, "*of"]]:
    """The difference of two means, with the ends of its interval, NaN where there are too few examples.

    Raises:
        DataError: they are paired, and not as many.
    """
    if paired:
        if len(first) != len(second):
            raise error(DataError, "scores that are paired must be of the same pairs", got=f"{len(first)} and "
                        f"{len(second)} pairs", do="score the same pairs, or leave out paired=")  # fmt: skip
        return mean_interval(first - second)
    from scipy.special import stdtrit

    less = first.mean(0) - second.mean(0)
    if min(len(first), len(second)) < LEAST:
        nothing = torch.full_like(less, torch.nan)
        return less, nothing, nothing.clone()
    parts = [x.var(0) / len(x) for x in (first, second)]
    size = (parts[0] + parts[1]).sqrt()
    freedom = size.pow(4) / sum(v.square() / (len(x) - 1) for v, x in zip(parts, (first, second), strict=True))
    t = torch.as_tensor(stdtrit(freedom.nan_to_num(1.0).clamp(min=1.0).numpy(), 0.975)).to(less)
    return less, less - t * size, less + t * size
