"""How results leave a command: drawn for a person, as JSON for a script, as a page or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microtome.cli._model import out, print_json
from microtome.errors import OutputError, SiteError, error

if TYPE_CHECKING:
    import xarray as xr

    from microtome.anatomy import Indices
    from microtome.edit import Edit

Page = Annotated[Path | None, typer.Option("--output", "-o", help="Also write a page: a file ending in .html.")]
EditsFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="File of edits to write: a file ending in .safetensors.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
CELLS, PARTS = 5, 15
"""How many of the strongest cells, or of the parts of a sum, are listed by default."""

Top = Annotated[
    int | None,
    typer.Option(
        min=0, help=f"How many of the strongest to list; by default {CELLS} cells or neurons, or {PARTS} parts."
    ),
]


def check_output(output: Path | None, force: bool, endings: tuple[str, ...], *, required: str = "") -> None:
    """Refuse a file that could not be written, before anything is loaded or measured: one rule for all commands.

    Args:
        output: the file, if one was named.
        force: whether it may replace a file of its kind that stands there.
        endings: those that are allowed; a `.zarr` is a folder.
        required: what to do where none was named, if one must be.

    Raises:
        OutputError: it has another ending or no folder to be in, or something stands there.
    """
    allowed = " or ".join(endings)
    if output is None:
        if required:
            raise error(OutputError, "no file to write to", allowed=allowed, do=required)
        return
    if output.suffix not in endings:
        got = output.suffix or "no ending"
        raise error(OutputError, f"cannot write {output.name}", got=got, allowed=allowed, do="choose this ending")
    if output.exists() and not _replaceable(output):
        raise error(OutputError, f"{output} exists, and is not a {output.suffix} to replace", do="name another file")
    if output.exists() and not force:
        raise error(OutputError, f"{output} exists", do=REPLACE)
    if not output.parent.is_dir():
        raise error(OutputError, f"no folder {output.parent}", do="make it first")


REPLACE = "name another place with -o, or pass --force to replace it"


def _replaceable(output: Path) -> bool:
    """Whether what stands at a place is of the kind that would replace it."""
    if output.suffix == ".zarr":
        return any((output / name).is_file() for name in ("zarr.json", ".zgroup"))
    return output.is_file()


def shown(
    data: xr.Dataset,
    output: Path | None,
    *,
    as_json: bool,
    top: int | None = None,
    every: int = 1,
    positions: Indices | None = None,
) -> None:
    """Write the page if one was asked for, then draw the result for a person, or give all values to a script."""
    from microtome.view import terminal, write_page

    data = _selected(data, every, positions)
    if output is not None:
        write_page(output, data)
    if as_json:
        print_json(values(data) | ({} if output is None else {"page": str(output)}))
        return
    listed = top if top is not None else PARTS if "parts" in data.attrs else CELLS
    out.print(terminal(data, out.width, top=listed))
    if output is not None:
        out.print(f"page written to {output}", markup=False, soft_wrap=True)


def _selected(data: xr.Dataset, every: int, positions: Indices | None) -> xr.Dataset:
    """The layers and positions that are to be shown."""
    if every > 1 and "layer" in data.dims:
        data = data.isel(layer=sorted(range(data.sizes["layer"] - 1, -1, -every)))
    if positions is None or "pos" not in data.dims:
        return data
    size = data.sizes["pos"]
    chosen = positions.resolve(size)
    if chosen is None:
        allowed = f"0 to {size - 1}, or -{size} to -1"
        raise error(SiteError, f"no positions {positions} in this prompt", allowed=allowed, do="choose among these")
    return (data if "pos" in data.coords else data.assign_coords(pos=range(size))).isel(pos=chosen)


def values(data: xr.Dataset) -> dict[str, Any]:
    """A result as plain values: its variables with axes and unit, its coordinates with axes, and its provenance."""
    variables = {
        str(name): {"dims": list(x.dims), "unit": x.attrs.get("unit"), "values": _listed(x.values)}
        for name, x in data.data_vars.items()
    }
    coords = {str(name): {"dims": list(x.dims), "values": _listed(x.values)} for name, x in data.coords.items()}
    return {"variables": variables, "coords": coords, "provenance": data.attrs}


def _listed(x: Any) -> Any:
    import numpy as np

    return np.asarray(x).tolist()


def write_edits(output: Path, edits: list[Edit], *, as_json: bool) -> None:
    """Write edits to a file, and say what they are."""
    from microtome.edit import save_edits

    save_edits(output, edits)
    if as_json:
        print_json({"file": str(output), "edits": [repr(edit) for edit in edits]})
        return
    for edit in edits[:10]:
        out.print(repr(edit), markup=False, soft_wrap=True)
    if len(edits) > 10:
        out.print(f"and {len(edits) - 10} more", markup=False)
    out.print(f"written to {output}: microtome run PROMPT --edits {output}", markup=False, soft_wrap=True)
