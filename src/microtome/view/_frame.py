"""A table of rows, such as the answer to a query, in a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from microtome.view._text import plain_table, printable, unsigned, visible

LONGEST = 60
"""Characters of a cell; what comes after is cut."""


def frame_table(frame: Any, rows: int) -> Table:
    """The first rows of a pandas data frame: numbers to the right, texts and lists cut.

    Args:
        frame: the data frame.
        rows: how many rows to show.
    """
    table = plain_table()
    numeric = [kind.kind in "fiu" for kind in frame.dtypes]
    for name, number in zip(frame.columns, numeric, strict=True):
        table.add_column(printable(str(name)), justify="right" if number else "left", no_wrap=number)
    for row in frame.head(rows).itertuples(index=False):
        table.add_row(*map(_cell, row))
    return table


def _cell(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, float):
        return "–" if value != value else unsigned(value)
    if value is None:
        return "–"
    text = visible(value) if isinstance(value, str) else printable(str(value).replace("\n", " "))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
