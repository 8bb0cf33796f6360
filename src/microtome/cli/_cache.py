"""`microtome cache`: what Microtome keeps on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from microtome.cli._model import Json, out, print_json


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    cache = typer.Typer(help="Show or clear what Microtome keeps on this machine.", no_args_is_help=True)
    cache.command("show")(show)
    cache.command("clear")(clear)
    app.add_typer(cache, name="cache")


def _entries(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    things = [thing for kind in folder.iterdir() if kind.is_dir() for thing in kind.iterdir()]
    return {
        str(thing.relative_to(folder)): sum(f.stat().st_size for f in thing.rglob("*") if f.is_file())
        for thing in things
    }


def show(as_json: Json = False) -> None:
    """List what is kept, with sizes."""
    from microtome.model import cache_dir

    folder = cache_dir()
    entries = _entries(folder)
    if as_json:
        print_json({"folder": str(folder), "entries": entries})
        return
    out.print(str(folder), markup=False)
    for name, size in sorted(entries.items()):
        out.print(f"{size / 2**20:10.1f} MiB  {name}", markup=False)
    out.print(f"{sum(entries.values()) / 2**20:10.1f} MiB  together" if entries else "empty")


def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Delete all of it; the default model is made again when it is next opened."""
    from microtome.model import cache_dir

    folder = cache_dir()
    entries = _entries(folder)
    if not entries:
        out.print(f"nothing to clear in {folder}", markup=False)
        return
    size = sum(entries.values()) / 2**20
    if not yes and not typer.confirm(f"Delete {len(entries)} entries ({size:.0f} MiB) in {folder}?"):
        return
    for name in entries:
        shutil.rmtree(folder / name)
    out.print(f"cleared {size:.0f} MiB")
