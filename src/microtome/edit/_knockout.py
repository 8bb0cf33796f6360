"""Knock-out: attention cut from some queries to some keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import RULES, Indices, Rule, parse_indices
from microtome.edit._edits import Selection, SiteEdit, forbidden
from microtome.errors import EditError, error


@dataclass(frozen=True, eq=False, repr=False)
class KnockOut(SiteEdit):
    """Cut attention from some queries to some keys: those scores become minus infinity before the softmax.

    The site is ``<layers>.attn.scores[<heads>]@<queries>``; a query with no key left attends to nothing.

    Attributes:
        keys: the positions that can no longer be attended to, as a selection ("0-3", "*"), counted like those of an
            address: over the real tokens of each row, in a generation those of the prompt; or a rule of an address:
            "@prompt", "@generated", "@last".
    """

    keys: str = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address.name != "attn.scores":
            raise error(
                EditError,
                "KnockOut acts on attention scores",
                got=f'"{self.site}"',
                do='write "<layers>.attn.scores[<heads>]@<queries>"',
            )
        self._chosen()

    def _chosen(self) -> Indices | Rule:
        keys: Any = self.keys
        for rule in RULES:
            if keys == f"@{rule}":
                return rule
        return parse_indices(keys, "keys")

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """Scores [batch, q_pos, head, k_pos] with the keys masked."""
        cut = self._cut(x, where)
        allowed = ~forbidden(x) & ~cut
        new = x.masked_fill(cut, float("-inf"))
        return new.masked_fill(~allowed.any(-1, keepdim=True), float("-inf"))

    def _cut(self, x: Tensor, where: Selection) -> Tensor:
        """[batch or 1, 1, 1, k_pos] True at the keys to cut."""
        keys, width, frame = self._chosen(), x.shape[-1], where.frame
        if isinstance(keys, Indices) and not keys.is_all:
            columns = frame.resolve(keys, f"keys {{}} at {where.site}", EditError)
            return frame.mask(columns, width, x.device)[:, None, None]
        named = frame.columns_of(keys)
        if named is None:
            return torch.ones(1, 1, 1, width, dtype=torch.bool, device=x.device)
        named = named if frame.rows is None else named[frame.rows.to(named.device)]
        return frame.mask(named.tolist(), width, x.device)[:, None, None]
