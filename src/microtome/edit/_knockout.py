"""Knock-out: attention cut from some queries to some keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.anatomy import parse_indices
from microtome.edit._edits import Selection, SiteEdit, forbidden
from microtome.errors import EditError, error


@dataclass(frozen=True, eq=False, repr=False)
class KnockOut(SiteEdit):
    """Cut attention from some queries to some keys: those scores become minus infinity before the softmax.

    The site is ``<layers>.attn.scores[<heads>]@<queries>``; a query with no key left attends to nothing.

    Attributes:
        keys: the positions that can no longer be attended to, as a selection ("0-3", "*"), counted like those of an
            address: over the real tokens of each row, in a generation those of the prompt.
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
        parse_indices(self.keys, "keys")

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """Scores [batch, q_pos, head, k_pos] with the keys masked."""
        keep = self._keep(x, where)
        allowed = ~forbidden(x) & keep
        new = x.masked_fill(~keep, float("-inf"))
        return new.masked_fill(~allowed.any(-1, keepdim=True), float("-inf"))

    def _keep(self, x: Tensor, where: Selection) -> Tensor:
        """[batch or 1, 1, 1, k_pos] False at the keys to cut."""
        selection, width = parse_indices(self.keys, "keys"), x.shape[-1]
        if selection.is_all:
            return torch.zeros(1, 1, 1, width, dtype=torch.bool, device=x.device)
        tokens = where.tokens or ((0, width),)
        tokens = tokens if where.rows is None else [tokens[int(row)] for row in where.rows]
        before = max(where.end - width, 0)  # columns that a cache has dropped
        keep = torch.ones(len(tokens), 1, 1, width, dtype=torch.bool, device=x.device)
        for row, (first, length) in enumerate(tokens):
            chosen = selection.resolve(length)
            if chosen is None:
                raise error(
                    EditError,
                    f"no keys {self.keys} in row {row} at {where.site}",
                    allowed=f"0 to {length - 1}, or -{length} to -1",
                    do="choose positions inside the prompt",
                )
            keep[row, ..., [first + c - before for c in chosen if first + c >= before]] = False
        return keep
