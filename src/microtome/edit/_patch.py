"""Values of another run, put in place of a run's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from microtome.anatomy import Site
from microtome.edit._edits import Selection, SiteEdit, canonical, check_width, digest_of, fitted, orthonormal
from microtome.errors import EditError, error


@runtime_checkable
class Source(Protocol):
    """Something that holds the tensors of another run, such as a `Run`."""

    def whole(self, site: Site) -> Tensor:
        """All of a site: [batch, pos, ...]."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Patch(SiteEdit):
    """Put in place what another run had at the same site, rows, positions and units, or its part inside a subspace.

    Attributes:
        source: the other run, which must have captured the whole site, or a mapping from sites to such tensors, whose
            column p is position p. One row there serves all rows here.
        basis: [rank, d] or [d] along the site's last axis: swap only what lies in its span, x + (source - x) Q Qᵀ. It
            need not be orthonormal or independent.
    """

    source: Source | Mapping[str, Tensor] | None = None
    basis: Tensor | None = None

    def _of(self, site: Site) -> Tensor:
        x: Any = self._named(site)
        if not isinstance(x, Tensor) or x.dim() != len(site.spec.dims):
            raise error(
                EditError,
                f"the source of Patch does not fit {site}",
                got=f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__,
                allowed=f"a tensor [{', '.join(site.spec.dims)}]",
                do="give the whole site as a run captures it",
            )
        return x

    def _named(self, site: Site) -> Any:
        if isinstance(self.source, Mapping):
            if str(site) not in self.source:
                raise error(
                    EditError,
                    f"the source of Patch has no {site}",
                    got=", ".join(self.source),
                    do="capture that site whole",
                )
            return self.source[str(site)]
        if self.source is None:
            raise error(EditError, f"Patch on {site} has no source", do="give source= a run or a mapping")
        return self.source.whole(site)

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The other run's values."""
        self._same_positions(where)
        source = canonical(self._own_row(self._of(where.site), where), where.site)
        try:
            value = where.cut_source(source).to(device=x.device, dtype=x.dtype)
        except IndexError:
            raise error(
                EditError,
                f"the source of Patch lacks rows or positions of {self.site}",
                got=f"{source.shape[0]} rows of {source.shape[1]} positions",
                do="run the other prompts in a batch of the same rows and length, or name positions that both have",
            ) from None
        fitting = fitted(value, x, where)
        assert isinstance(fitting, Tensor)
        if self.basis is None:
            return fitting.expand_as(x)
        check_width("a basis", self.basis.shape[-1], x, where)
        q = orthonormal(self.basis).to(device=x.device, dtype=x.dtype)
        return x + (fitting - x) @ q @ q.T

    def _own_row(self, source: Tensor, where: Selection) -> Tensor:
        """For one prompt of a sweep its row [1, ...] of a batch, without the pads that longer prompts gave it."""
        if where.row is None or source.shape[0] == 1:
            return source
        batch, own = getattr(self.source, "batch", None), source[where.row : where.row + 1]
        # Rows of a mapping end with the prompt; those of a run say where they end.
        length = where.end if batch is None else batch.lengths[where.row]
        for axis, name in enumerate(where.site.spec.dims):
            if name in ("pos", "q_pos", "k_pos"):
                own = own.narrow(axis, 0, min(length, own.shape[axis]))
        return own

    def _same_positions(self, where: Selection) -> None:
        """Refuse a source whose tokens stand elsewhere, so that one position would be another there."""
        there, here = getattr(self.source, "batch", None), where.tokens
        if there is None or here is None:
            return
        rows = list(zip(there.pads, there.lengths, strict=True))
        if where.row is not None and len(rows) > 1:
            rows = rows[where.row : where.row + 1]
        if len(rows) not in (1, len(here)):
            return  # refused for its shape
        rows = rows * len(here) if len(rows) == 1 else rows
        positions = self.address.positions
        from_end = positions == "last" if isinstance(positions, str) else positions.from_end
        if any(a[0] != b[0] or (from_end and a[1] != b[1]) for a, b in zip(rows, here, strict=True)):
            raise error(
                EditError,
                f"{self.site} names other columns in the source of Patch: its tokens stand elsewhere",
                got=f"rows of (pads, tokens) {rows}",
                allowed=f"{list(here)}",
                do="pad both runs alike, and count positions from the start where lengths differ",
            )
        self._long_enough(rows, here, where)

    def _long_enough(self, there: list[tuple[int, int]], here: Sequence[tuple[int, int]], where: Selection) -> None:
        """Refuse a source one of whose rows ends before the last position that is asked of it: what follows is pads."""
        chosen = range(len(here)) if where.rows is None else where.rows.tolist()
        for row in chosen:
            first, length = there[row]
            last = here[row][0] + here[row][1] - 1
            if where.columns is not None:
                last = int(where.columns[row].max()) + where.offset
            if last >= first + length and not self._generated(where, last):
                raise error(
                    EditError,
                    f"the source of Patch ends before the last position of {self.site}",
                    got=f"{length} tokens there, position {last - first} asked for",
                    do="name positions that both have, or run a prompt as long",
                )

    @staticmethod
    def _generated(where: Selection, column: int) -> bool:
        """Whether a column comes after the prompt, where the source's shape alone decides."""
        return where.prompt is not None and column >= where.prompt

    def digest(self) -> str:
        """A hash of the address and of the other run's tensors."""
        held = self.source if isinstance(self.source, Mapping) else getattr(self.source, "captured", {})
        parts = [str(k).encode() + digest_of(v) for k, v in sorted(held.items(), key=lambda kv: str(kv[0]))]
        return hashlib.sha256(
            b"\0".join([b"Patch", self.site.encode(), repr(self.rows).encode(), digest_of(self.basis), *parts])
        ).hexdigest()
