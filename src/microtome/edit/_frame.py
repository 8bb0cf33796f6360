"""The frame of a forward: the rows and columns of a tensor that positions, rules and rows of another run name.

A column is the index of a token along the axis of a whole padded batch, generated tokens included. A position counts
the real tokens of one row: position p of a row whose tokens begin at column f is column f + p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from microtome.anatomy import Indices, Rule
from microtome.errors import EditError, MicrotomeError, SiteError, error
from microtome.shown import shown

Span = tuple[int, int]
"""The first column and the number of the real tokens of a row."""


@shown
@dataclass(frozen=True, eq=False)
class Frame:
    """Rows and columns of a forward, or of the part of it that an edit selects.

    Attributes:
        spans: the real tokens of every row, as (first column, number).
        width: the number of columns of the prompt.
        generated: the number of columns after the prompt, all real; below 0 while only a part of the prompt has been
            read; None outside a generation.
        begin: the first column of the current tensor, which lacks those that a cache holds.
        beams: consecutive rows that continue one prompt.
        split: whether the prompt is read in several forwards, or several new tokens in this one.
        source_row: in a sweep, or a generation of one prompt after the other, whose batch is one prompt, the row of
            that prompt in another run's batch.
        prompts: in a generation of one prompt after the other, how many there are; None elsewhere.
        rows: [n] the selected rows, or None for all.
        columns: [batch, n] the selected columns of every row, or None for all of the current tensor.
    """

    spans: tuple[Span, ...]
    width: int
    generated: int | None = None
    begin: int = 0
    beams: int = 1
    split: bool = False
    source_row: int | None = None
    prompts: int | None = None
    rows: Int[Tensor, " row"] | None = None
    columns: Int[Tensor, "_ n"] | None = None
    _known: dict[object, list[Frame]] = field(default_factory=dict, init=False, repr=False)

    @property
    def end(self) -> int:
        """The number of columns so far, those of earlier forwards included."""
        return self.width + (self.generated or 0)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and columns from `begin` on."""
        return len(self.spans), self.end - self.begin

    @property
    def padded(self) -> bool:
        """Whether any column of the prompt is a pad."""
        return any(span != (0, self.width) for span in self.spans)

    @cached_property
    def first(self) -> int:
        """The first selected column."""
        return self.begin if self.columns is None else int(self.columns.min())

    # ------------------------------------------------------------------------------------------- names to columns

    def resolve(
        self, chosen: Indices, what: str = "positions @{}", kind: type[MicrotomeError] = SiteError
    ) -> list[list[int]]:
        """The columns `[row][n]` of positions of the prompt, by selected row.

        Raises:
            SiteError: a position lies beyond a row; or an error of another `kind`.
        """
        found: list[list[int]] = []
        for row in range(len(self.spans)) if self.rows is None else self.rows.tolist():
            first, length = self.spans[row]
            positions = chosen.resolve(length)
            if positions is None:
                raise error(
                    kind,
                    f"no {what.format(chosen)} in {self._named(row)}",
                    allowed=f"0 to {length - 1}, or -{length} to -1",
                    do="choose positions inside the prompt",
                )
            found.append([first + p for p in positions])
        return found

    def _named(self, row: int) -> str:
        return f"row {row}" if self.source_row is None else f"prompt {self.source_row}"

    def columns_of(self, positions: Indices | Rule, device: torch.device | None = None) -> Tensor | None:
        """The columns [batch, n] of positions, or of a rule; None for all that there are.

        Only selected rows must have the positions; what stands in the others is theirs too, and is not used.

        Raises:
            SiteError: a position lies beyond a row, rows have different numbers of them, or the rule needs a
                generation.
        """
        rows = len(self.spans)
        after = torch.arange(self.width, max(self.width, self.end), device=device).expand(rows, -1)
        if positions == "generated":
            if self.generated is None:
                raise error(
                    SiteError, '"@generated" selects nothing in a run', do="use it with generate, or name positions"
                )
            return after
        if positions == "prompt":
            return None if self.generated is None else torch.arange(self.width, device=device).expand(rows, -1)
        if positions == "last":
            last = torch.tensor([[first + n - 1] for first, n in self.spans], device=device)
            return torch.cat([last, after], dim=1) if self.generated else last
        assert isinstance(positions, Indices)
        if positions.is_all:
            return None
        found = self.resolve(positions)
        if len({len(row) for row in found}) > 1:
            raise error(
                SiteError,
                f"@{positions} selects different numbers of positions in different rows",
                got=str([len(row) for row in found]),
                do="count from one end, or run rows of one length",
            )
        columns = torch.tensor(found, device=device)
        if self.rows is None:
            return columns
        return columns[:1].repeat(rows, 1).index_copy(0, self.rows.to(columns.device), columns)

    def select(
        self, positions: Indices | Rule, rows: tuple[int, ...] | None, width: int, device: torch.device
    ) -> list[Frame]:
        """This frame cut to rows and positions, for a tensor of `width` columns; empty where it holds none of them.

        One frame serves all rows, unless the tensor lacks the named columns of some rows and not of others.

        Raises:
            SiteError: see `columns_of`.
            EditError: there are no such rows.
        """
        key = positions, rows, width, device
        if key not in self._known:
            self._known[key] = self._selected(positions, rows, width, device)
        return self._known[key]

    def _selected(
        self, positions: Indices | Rule, rows: tuple[int, ...] | None, width: int, device: torch.device
    ) -> list[Frame]:
        if rows is not None and self.prompts is not None:
            _refuse_rows(rows, self.prompts)
            if self.source_row not in rows:
                return []
            rows = None
        chosen = None if rows is None else self._rows(rows).to(device)
        own = replace(self.at(width), rows=chosen)
        columns = own.columns_of(positions, device)
        cut = replace(own, columns=columns)
        if columns is None:
            return [cut]
        if not columns.shape[1]:
            return []
        stop = min(cut.begin + width, cut.end)
        if cut.begin == 0 and stop == cut.end >= cut.width:
            return [cut]
        present = (columns >= cut.begin) & (columns < stop)
        kinds, of_row = present.unique(dim=0, return_inverse=True)
        if len(kinds) == 1:
            columns = columns[:, kinds[0]]
            return [replace(cut, columns=columns)] if columns.shape[1] else []
        every = torch.arange(len(columns), device=device) if chosen is None else chosen
        parts = [
            (every[of_row[every] == k], columns[:, kind].clamp(cut.begin, stop - 1)) for k, kind in enumerate(kinds)
        ]
        return [replace(cut, rows=of, columns=at) for of, at in parts if len(of) and at.shape[1]]

    def _rows(self, rows: tuple[int, ...]) -> Tensor:
        """The rows of the forward that continue rows of the prompt."""
        _refuse_rows(rows, len(self.spans) // self.beams)
        return (torch.tensor(rows).unsqueeze(1) * self.beams + torch.arange(self.beams)).flatten()

    def lacks_rows(self, rows: tuple[int, ...] | None) -> bool:
        """Whether some of the rows that an edit names, or of all, are in other forwards."""
        return self.prompts is not None and (self.prompts if rows is None else len(set(rows))) > 1

    def at(self, width: int) -> Frame:
        """This frame for a tensor whose last `width` columns are there; a static cache may hold more than there are."""
        begin = max(self.end - width, 0)
        return self if begin == self.begin else replace(self, begin=begin)

    # ----------------------------------------------------------------------------------------------- tensors by frame

    @property
    def whole(self) -> bool:
        """Whether all of the current tensor is selected."""
        return self.rows is None and self.columns is None

    def take(self, x: Shaped[Tensor, "batch pos *of"]) -> Shaped[Tensor, "row n *of"]:
        """The selected part [row, n, ...] of the current tensor [batch, pos, ...]; a batch of one serves all rows."""
        if self.columns is not None:
            columns = _there(self.columns if x.shape[0] != 1 else self.columns[:1], x)
            x = x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), columns - self.begin]
        return x if self.rows is None or x.shape[0] == 1 else x[self.rows]

    def take_source(self, x: Shaped[Tensor, "batch pos *of"]) -> Shaped[Tensor, "row n *of"]:
        """The corresponding part of another run's whole tensor [batch, pos, ...]."""
        return self.take(x[:, self.begin : self.end if self.split else None])

    def index(self, x: Shaped[Tensor, "batch pos *of"]) -> tuple[Int[Tensor, "row 1"], Int[Tensor, "row n"]]:
        """Rows [n, 1] and columns [n, m] by which the selected part of the current tensor is indexed."""
        rows = torch.arange(x.shape[0], device=x.device) if self.rows is None else self.rows
        columns = _there(self._columns(x.shape[1], x.device), x)
        return rows.unsqueeze(1), columns.expand(x.shape[0], -1)[rows] - self.begin

    def positions(self, n: int, device: torch.device) -> Int[Tensor, "row _"]:
        """[row, n] The positions of the selected columns within each row's own tokens."""
        first, _ = self._ends(device)
        columns = self._columns(n, device).expand(len(self.spans), -1) - first
        return columns if self.rows is None else columns[self.rows]

    def real(self, n: int, device: torch.device) -> Bool[Tensor, "row _"]:
        """[row, n] True where a selected column is a real token."""
        first, length = self._ends(device)
        columns = self._columns(n, device)
        real = (columns >= first) & (columns < first + length) | (columns >= self.width)
        return real if self.rows is None else real[self.rows]

    def mask(self, chosen: list[list[int]], width: int, device: torch.device) -> Bool[Tensor, "row {width}"]:
        """[row, width] True at columns, given by selected row, of a tensor of `width` columns."""
        begin = self.at(width).begin
        mask = torch.zeros(len(chosen), width, dtype=torch.bool, device=device)
        for row, columns in enumerate(chosen):
            mask[row, [c - begin for c in columns if begin <= c < begin + width]] = True
        return mask

    def _columns(self, n: int, device: torch.device) -> Tensor:
        if self.columns is None:
            return torch.arange(self.begin, self.begin + n, device=device)[None]
        return self.columns.to(device)

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        spans = torch.tensor(self.spans, device=device)
        return spans[:, :1], spans[:, 1:]

    # --------------------------------------------------------------------------------------------------- other runs

    def source_of(self, x: Tensor, dims: Sequence[str], spans: Sequence[Span] | None) -> Tensor:
        """With a `source_row`, this prompt's row [1, ...] of another run's tensor, without pads; else that tensor.

        Args:
            x: the other run's tensor, with axes `dims`.
            dims: its axes.
            spans: the real tokens of its rows; None if unknown: every row then begins with its prompt.
        """
        if self.source_row is None or (spans is None and x.shape[0] == 1):
            return x
        row, first, length = self.source_span(x.shape[0], spans)
        own = x[row : row + 1]
        for axis, name in enumerate(dims):
            if name in ("pos", "q_pos", "k_pos"):
                own = own.narrow(axis, first, min(length, own.shape[axis] - first))
        return own

    def source_span(self, rows: int, spans: Sequence[Span] | None) -> tuple[int, int, int]:
        """The row of this prompt, see `source_row`, in another run of so many rows, its first column and its tokens.

        Raises:
            EditError: it has neither one row nor one for each prompt.
        """
        if self.prompts is not None and rows not in (1, self.prompts):
            raise error(
                EditError,
                "the source of Patch has other rows than there are prompts",
                got=f"{rows} rows",
                allowed=f"1 or {self.prompts}",
                do="run the other prompts in a batch of the same rows",
            )
        row = (self.source_row or 0) if rows > 1 else 0
        first, length = (0, self.width) if spans is None else spans[row]
        return row, first, length

    def spans_of(self, spans: Sequence[Span]) -> list[Span] | None:
        """The real tokens of another run's rows, one for each row here; None where it has another number of rows."""
        if self.source_row is not None:
            return [(0, self.source_span(len(spans), spans)[2])] * len(self.spans)
        if len(spans) not in (1, len(self.spans)):
            return None
        return list(spans) * (len(self.spans) // len(spans))

    def last_columns(self) -> dict[int, int]:
        """The last selected column of every selected row; without columns its last real one."""
        rows = range(len(self.spans)) if self.rows is None else self.rows.tolist()
        if self.columns is not None:
            last = self.columns.amax(1).tolist()
            return {row: last[row] for row in rows}
        return {row: sum(self.spans[row]) - 1 for row in rows}


def _refuse_rows(rows: tuple[int, ...], n: int) -> None:
    if not all(0 <= row < n for row in rows):
        raise error(EditError, f"no rows {rows} in this batch", allowed=f"0 to {n - 1}", do="choose rows of it")


def _there(index: Int[Tensor, "_ n"], x: Tensor) -> Int[Tensor, "_ n"]:
    """An index where a tensor is, without waiting for the device: memory that is not pinned is copied at once."""
    return index.to(x.device, non_blocking=True)
