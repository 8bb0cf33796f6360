"""Activation patching: values of another run replace a run's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from microtome.anatomy import Site
from microtome.edit._edits import Selection, SiteEdit, canonical, check_width, digest_of, fitted, orthonormal
from microtome.edit._frame import Frame, Span
from microtome.errors import EditError, error


@runtime_checkable
class Source(Protocol):
    """Something that holds the tensors of another run, such as a `Run`."""

    def whole(self, site: Site) -> Tensor:
        """All of a site: [batch, pos, ...]."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Patch(SiteEdit):
    """Replace by the values of another run at the same site, rows, positions and units, or by their part in a subspace.

    Attributes:
        source: the other run, which must have captured the whole site, or a mapping from sites to such tensors, in
            which column p is position p. A single row is used for all rows.
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
                    do="capture the whole site",
                )
            return self.source[str(site)]
        if self.source is None:
            raise error(EditError, f"Patch on {site} has no source", do="give source= a run or a mapping")
        return self.source.whole(site)

    @property
    def _spans(self) -> Sequence[Span] | None:
        batch = getattr(self.source, "batch", None)
        return None if batch is None else batch.spans

    def taken(self, site: Site, frame: Frame) -> tuple[Tensor, int, int, int]:
        """Of a cell of a sweep: the other run's tensor, and in it the row, first column and length of its prompt.

        Raises:
            EditError: the source lacks the site, or its tokens are in other columns.
        """
        x, spans = self._of(site), self._spans
        if spans is not None:
            self._refuse_other_positions(frame, spans)
        row, first, length = frame.source_span(x.shape[0], spans)
        return x, row, first, min(length, x.shape[1] - first)

    def change(self, x: Tensor, where: Selection) -> Tensor:
        """The other run's values."""
        spans = self._spans
        if spans is not None:
            self._refuse_other_positions(where.frame, spans)
        own = where.frame.source_of(self._of(where.site), where.site.spec.dims, spans)
        source = canonical(own, where.site)
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

    def _refuse_other_positions(self, frame: Frame, spans: Sequence[Span]) -> None:
        """Refuse a source in whose rows the selected columns are other positions, or pads."""
        rows = frame.spans_of(spans)
        if rows is None:
            return  # refused for its shape
        which = range(len(rows)) if frame.rows is None else frame.rows.tolist()
        pairs = [(rows[row], frame.spans[row]) for row in which]
        positions = self.address.positions
        from_end = positions == "last" if isinstance(positions, str) else positions.from_end
        if any(a[0] != b[0] or (from_end and a[1] != b[1]) for a, b in pairs):
            raise error(
                EditError,
                f"{self.site} names other columns in the source of Patch: its tokens are in other columns",
                got=f"rows of (pads, tokens) {rows}",
                allowed=f"{list(frame.spans)}",
                do="pad both runs alike, and count positions from the start where lengths differ",
            )
        for row, last in frame.last_columns().items():
            first, length = rows[row]
            if first + length <= last:
                raise error(
                    EditError,
                    f"the source of Patch ends before the last position of {self.site}",
                    got=f"{length} tokens in the source, position {last - first} asked for",
                    do="name positions that both have, or run a prompt of the same length",
                )

    def digest(self) -> str:
        """A hash of the address and of the other run's tensors."""
        held = self.source if isinstance(self.source, Mapping) else getattr(self.source, "captured", {})
        parts = [str(k).encode() + digest_of(v) for k, v in sorted(held.items(), key=lambda kv: str(kv[0]))]
        return hashlib.sha256(
            b"\0".join([b"Patch", self.site.encode(), repr(self.rows).encode(), digest_of(self.basis), *parts])
        ).hexdigest()
