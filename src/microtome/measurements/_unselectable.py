"""Keys that no query can prefer, because they lie inside the hull of the others.

Formula:  key i of a row can be selected if some q has q . k_i > q . k_j for all j != i. Three queries are tried first:
          k_i minus the mean key, the same whitened, and k_i itself; of the keys that none of them selects, the linear
          program max d, q . (k_i - k_j) >= d for all j, |q| <= 1 in every dimension, decides: not if d is 0.
          unselectable = mean share of the keys of a row that no query can select; the keys are those that are used,
          after rotation;  selected_along = mean share of the keys that the query q = k_i selects.
          Controls: the same for keys of equal norm in the same directions, all of which can be selected unless two are
          equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linprog
from torch import Tensor

from microtome.method import Column, Seen, Source, Text, measure

LEAST = 1e-9
"""A margin, relative to the largest difference of two keys, below which a key is not selected."""
Rows = npt.NDArray[np.float64]


@measure(
    "unselectable",
    of="head",
    on=Text(sequences=8, width=96),
    sites="attn.k",
    needs=("attn.pattern",),
    title="keys that no query can select",
    question="Which share of the keys of each head lies inside the hull of the others, so that no query can prefer it?",
    columns=(
        Column(
            "unselectable", "share", "share of the keys of a row that no query of the head can score highest",
            "unselectable_equal", (0, 1),
        ),
        Column("unselectable_equal", "share", "the same for keys scaled to equal norms", range=(0, 1)),
        Column(
            "selected_along", "share", "share of the keys of a row that a query along the key scores highest",
            "selected_along_equal", (0, 1),
        ),
        Column("selected_along_equal", "share", "the same for keys scaled to equal norms", range=(0, 1)),
    ),
    source=Source(
        "Brody, Alon and Yahav", "On the Expressivity Role of LayerNorm in Transformers' Attention", 2023, "2305.02582",
        "unselectable keys", departs="keys as used, after projection and rotation, of a whole row",
    ),
    cost="a linear program of d_head variables for each key that no simple query selects",
    check="tests/laws/test_selectivity.py",
    atlas="full",
)  # fmt: skip
def unselectable(seen: Seen) -> dict[str, Float[Tensor, "example head"]]:
    """The share of each head's keys that no query can score above all others of their row."""
    keys = seen["attn.k"].double().transpose(1, 2)  # [example, kv_head, pos, d_head]
    group = seen.model.anatomy.n_heads // keys.shape[1]
    equal = keys / keys.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(keys.dtype).tiny)
    found: dict[str, Tensor] = {}
    for end, x in (("", keys), ("_equal", equal)):
        shares = [[float((~selectable(head)).double().mean()) for head in row] for row in x]
        found[f"unselectable{end}"] = torch.tensor(shares, dtype=torch.float64).repeat_interleave(group, dim=1)
        along = x @ x.transpose(-1, -2)
        best = along.argmax(-1) == torch.arange(along.shape[-1], device=along.device)
        found[f"selected_along{end}"] = best.double().mean(-1).cpu().repeat_interleave(group, dim=1)
    return found


def selectable(keys: Float[Tensor, "key d_head"]) -> Bool[Tensor, " key"]:
    """Which keys some query scores strictly above all the others. Equal keys exclude each other.

    >>> selectable(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
    tensor([ True,  True, False])
    """
    rows: Rows = keys.detach().double().cpu().numpy()
    size = np.ptp(rows, axis=0).max()
    if len(rows) < 2:
        return torch.ones(len(rows), dtype=torch.bool)
    if size == 0:
        return torch.zeros(len(rows), dtype=torch.bool)
    rows = (rows - rows.mean(0)) / size
    found = _preferred(rows, rows)
    found |= _preferred(rows, rows @ np.linalg.pinv(rows.T @ rows, hermitian=True))
    found |= _preferred(rows, keys.detach().double().cpu().numpy() / size)
    for i in np.flatnonzero(~found):
        found[i] = margin(rows, int(i)) > LEAST
    return torch.from_numpy(found)


def _preferred(rows: Rows, queries: Rows) -> npt.NDArray[np.bool_]:
    """Which rows their own query scores above all others, by more than rounding; queries are scaled to 1."""
    largest = np.abs(queries).max(1, keepdims=True)
    scores = (queries / np.where(largest > 0, largest, 1)) @ rows.T
    own = scores.diagonal().copy()
    np.fill_diagonal(scores, -np.inf)
    return own > scores.max(1) + LEAST


def margin(rows: Rows, i: int) -> float:
    """The largest d with q . (k_i - k_j) >= d for all other j, over queries of at most 1 in every dimension.

    Raises:
        RuntimeError: the solver failed, which it cannot but for numbers that are not finite.
    """
    gaps = np.delete(rows, i, axis=0) - rows[i]  # q . gap + d <= 0
    count, width = gaps.shape
    bounds = [(-1.0, 1.0)] * width + [(None, None)]
    found: Any = linprog(
        np.append(np.zeros(width), -1.0), A_ub=np.hstack([gaps, np.ones((count, 1))]), b_ub=np.zeros(count),
        bounds=bounds, method="highs",
    )  # fmt: skip
    if not found.success:
        raise RuntimeError(f"the linear program of a key ended without an answer: {found.message}")
    return float(-found.fun)
