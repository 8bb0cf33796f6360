"""What a head's width allows: fits of attention patterns by queries and keys of few dimensions.

Formula:  P [T, T] a target pattern, rows that sum to 1; Q, K [T, d] free; fitted by minimising
          error(d) = mean over rows of KL(P[q] || softmax(Q K^T / sqrt(d))[q]), in nats.
          log P + c 1^T has rank T at most, so that d >= T is enough for any positive P (Q = sqrt(d) log P, K = 1); with
          less, score matrices of rank d leave an error.  even = the error of uniform attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, error


def pattern_fits(
    tokens: int = 12, widths: Sequence[int] = (1, 2, 4, 8, 12), *, draws: int = 3, sharp: float = 3.0, steps: int = 300
) -> xr.Dataset:
    """The error that is left when heads of several widths are fitted to random patterns: it vanishes at d_head = T.

    Formula:  see this file's head; P = softmax(sharp * normal noise).
    Source:   Bhojanapalli et al., "Low-Rank Bottleneck in Multi-head Attention Models", 2020 (2002.07028), theorem 1.
              Departs: fits of free queries and keys by L-BFGS.
    Cost:     a fit of 2 T d numbers for each width and draw.
    Check:    the error falls with the width and is 0 at T; a pattern of rank r is fitted by width r + 1;
              tests/laws/test_selectivity.py.

    Args:
        tokens: T.
        widths: of the heads.
        draws: random patterns.
        sharp: standard deviation of the patterns' scores.
        steps: iterations of each fit.

    Returns:
        A dataset of `error` [d_head, draw] and `even` [draw], nats.

    Raises:
        ArgumentError: a number is not positive, or there are fewer than 2 tokens.
    """
    if tokens < 2 or draws < 1 or steps < 1 or not widths or min(widths) < 1 or not sharp > 0:
        got = f"tokens={tokens}, widths={tuple(widths)}, draws={draws}, sharp={sharp}, steps={steps}"
        raise error(ArgumentError, "fits need tokens, widths, draws and steps", got=got, do="leave them out")
    rng = torch.Generator().manual_seed(current().seed)
    targets = [
        (sharp * torch.randn(tokens, tokens, generator=rng, dtype=torch.float64)).softmax(1) for _ in range(draws)
    ]
    told = [[fit_error(target, width, steps, rng) for target in targets] for width in widths]
    even = [log(tokens) - float(torch.special.entr(p).sum(1).mean()) for p in targets]  # 0 where p is
    variables: dict[str, Any] = {
        "error": (("d_head", "draw"), told, {"unit": "nats"}), "even": ("draw", even, {"unit": "nats"}),
    }  # fmt: skip
    return xr.Dataset(variables, coords={"d_head": list(widths)}, attrs={"tokens": tokens, "seed": current().seed})


def fit_error(target: Float[Tensor, "q_pos k_pos"], width: int, steps: int, rng: torch.Generator) -> float:
    """The error of the best queries and keys of a width that L-BFGS finds for a pattern."""
    count = len(target)
    start = [torch.randn(count, width, generator=rng, dtype=torch.float64) for _ in range(2)]
    q, k = (x.requires_grad_() for x in start)
    known = torch.special.entr(target).sum(1).mean()
    optimiser = torch.optim.LBFGS(
        [q, k], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        said = (q @ k.T / width**0.5).log_softmax(1)
        return -(target * said).sum(1).mean() - known

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = loss()
        found.backward()  # pyright: ignore[reportUnknownMemberType]
        return found

    with torch.enable_grad():
        optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    return float(loss().detach())
