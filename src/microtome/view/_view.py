"""A result to look at: the same value shows itself in a terminal, in a notebook and as a page."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console

from microtome.errors import ArgumentError, error
from microtome.files import atomic
from microtome.view._page import write_page
from microtome.view._render import html, terminal
from microtome.view._saved import csv_text, svg_text

if TYPE_CHECKING:
    import xarray as xr


class View:
    """What a terminal, a notebook and a page show of a result: `print(mt.view(result))`, or the last line of a cell.

    Args:
        data: a result of any method, any `xarray.Dataset`, or one `xarray.DataArray` of it.
        top: how many of the strongest cells, neurons or parts to list.

    Raises:
        ArgumentError: it is none of these.

    Cost:  what is drawn; nothing is measured again.
    Check: tests/unit/test_view.py.
    """

    def __init__(self, data: xr.Dataset | xr.DataArray, *, top: int = 5) -> None:
        import xarray as xr

        given = cast("object", data)
        if isinstance(given, xr.DataArray):
            given = given.to_dataset(name=given.name or "values")
        if not isinstance(given, xr.Dataset):
            do = "give what a method returned; of a run, run.dataset()"
            raise error(
                ArgumentError, "this cannot be viewed", got=type(data).__name__, allowed="a result or a dataset", do=do
            )
        self.data, self.top = given, top

    def __repr__(self) -> str:
        width = shutil.get_terminal_size().columns
        text = io.StringIO()
        Console(file=text, width=width, color_system=None, highlight=False).print(
            terminal(self.data, width, top=self.top)
        )
        return text.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        return html(self.data, top=self.top)

    def save(self, path: str | Path) -> Path:
        """Write it as one page that opens from disk; as SVG its figures alone, as CSV its numbers.

        Args:
            path: the file to write, by its ending ``.svg``, ``.csv`` or a page; what stands there is replaced.

        Raises:
            DataError: nothing of it can be drawn, or its variables are not one table.
            OutputError: the file cannot be written.
        """
        place = Path(path)
        texts = {".svg": svg_text, ".csv": csv_text}
        if (text := texts.get(place.suffix.lower())) is None:
            return write_page(place, self.data)
        written = text(self.data)
        with atomic(place.resolve()) as partial:
            partial.write_text(written, encoding="utf-8", newline="")
        return place
