"""Attention masks as others pass them become the real tokens of every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from microtome.edit import Span, forbidden
from microtome.errors import EditError, error


def spans_of(mask: Any, rows: int, before: int, end: int, width: int | None = None) -> tuple[Span, ...]:
    """The first column and the number of the real tokens of every row, by the mask of a forward.

    Args:
        mask: [row, column], 1 at real tokens; [row, 1 or head, query, key] True or 0 where attention is allowed; a
            mapping to such masks by kind of layer; None for no pads.
        rows: of the forward.
        before: columns that a cache holds.
        end: columns after the forward.
        width: how many columns of it to look at; all by default.

    Raises:
        EditError: pads and tokens cannot be told apart, or stand between each other.
    """
    width = end if width is None else width
    if isinstance(mask, Mapping):
        kinds = cast("Mapping[str, Any]", mask)
        mask = kinds.get("full_attention", next(iter(kinds.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return ((0, width),) * rows
    if mask.dim() == 4:
        real = None if before else _real(mask, width)
        if real is None:
            raise _unclear()
    elif mask.shape[1] < end:
        return ((0, width),) * rows
    else:
        real = mask[:, :width] != 0
    real = real.expand(rows, -1).int()
    first, length = real.argmax(1), real.sum(1)
    if bool((real[:, 1:] > real[:, :-1]).sum(1).gt((first > 0).int()).any()):
        raise _unclear()
    return tuple(zip(first.tolist(), length.tolist(), strict=True))


def _real(mask: Tensor, width: int) -> Tensor | None:
    """[row, width] True at columns that a mask [row, head, query, key] treats as tokens; None where it is unclear.

    A query that sees what comes after it is a pad whose empty row was opened, unless all queries see the same. What no
    real query may see is a pad.
    """
    allowed = ~forbidden(mask) if mask.dtype.is_floating_point else mask != 0
    allowed = allowed.any(1)[:, :width, :width]
    if bool((allowed == allowed[:, :1]).all()):
        return allowed[:, 0]
    ahead = torch.ones_like(allowed[0]).triu(1)
    real = allowed.diagonal(dim1=1, dim2=2) & ~(allowed & ahead).any(2)
    seen = (allowed & real.unsqueeze(2)).any(1)
    # Every token of one text but its first sees the one before it; packed texts, and pads that see themselves, do not.
    follows = real[:, 1:] & (real.cumsum(1)[:, :-1] > 0)
    joined = allowed.diagonal(-1, dim1=1, dim2=2) | ~follows
    return real if bool((seen == real).all() and joined.all()) else None


def _unclear() -> Exception:
    return error(
        EditError,
        "the attention_mask of an edited forward leaves unclear which tokens are pads, and so what position is which",
        allowed="a mask [row, column] with pads before or after the tokens, or a causal [row, 1, query, key]",
        do="pass such a mask, or run the rows separately",
    )
