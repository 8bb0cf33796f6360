"""How far heads look, as loops over queries and keys."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


def plain(pattern: np.ndarray, tokens: Tensor) -> dict[str, float]:
    """The columns of one head [row, q, k] by loops over queries and keys."""
    told: dict[str, list[float]] = {}

    def say(name: str, x: float) -> None:
        told.setdefault(name, []).append(x)

    for row, words in enumerate(tokens.tolist()):
        for q in range(1, len(words)):
            a = pattern[row, q]
            keys = range(q + 1)
            even = 1 / (q + 1)
            say("previous_attention", a[q - 1])
            say("previous_uniform", even)
            for w in (1, 4, 16, 64):
                say(f"within_{w}", sum(a[k] for k in keys if q - k <= w))
                say(f"within_{w}_uniform", even * sum(q - k <= w for k in keys))
            say("distance", sum(a[k] * (q - k) for k in keys))
            say("distance_uniform", q / 2)
            say("k90", few := _fewest(a[: q + 1]))
            say("k90_uniform", math.ceil(0.9 * (q + 1)))
            say("k90_rest", _fewest(a[1 : q + 1]))
            say("mode_single", few == 1)
            say("mode_global", few > 1 and few > (q + 1) / 2)
            say("mode_subset", 1 < few <= (q + 1) / 2)
            for n in (2, 3, 4):
                right = [k for k in range(n - 1, q) if words[k - n + 1 : k] == words[q - n + 2 : q + 1]]
                if right and q >= n - 2:
                    say(f"ngram{n}_attention", sum(a[k] for k in right))
                    near = [[a[k + d] for d in (-3, -2, 2, 3) if 0 < k + d < q] for k in right]
                    say(f"ngram{n}_elsewhere", sum(np.mean(some) for some in near if some))
    return {name: float(np.mean(x)) for name, x in told.items()}


def _fewest(a: np.ndarray) -> int:
    held = np.cumsum(np.sort(a)[::-1])
    return 1 + int((held < 0.9 * held[-1] - 1e-6).sum())
