"""`microtome cache`: what Microtome keeps on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from microtome.cli._examples import shown
from microtome.cli._model import Json, out, print_json
from microtome.errors import OutputError, error


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    shows, clears = shown("microtome cache show"), shown("microtome cache clear --yes")
    cache = typer.Typer(help="Show what Microtome keeps on this machine, or clear it.", epilog=shows)
    cache.callback(invoke_without_command=True)(bare)
    cache.command("show", epilog=shows)(show)
    cache.command("clear", epilog=clears)(clear)
    app.add_typer(cache, name="cache")


def _entries(folder: Path) -> dict[str, int]:
    """Models that Microtome made in its cache and unfinished passes, with their sizes; nothing else that lies there."""
    from microtome.anatomy import DEFAULT_NAME, MARK, PARTS

    models = folder / "models"
    # Earlier versions left no mark in the folder of the default model, and a crash may leave it under a hidden name.
    own = (DEFAULT_NAME, f".{DEFAULT_NAME}.")
    held = list(models.iterdir()) if models.is_dir() else []
    made = [m for m in held if m.name == own[0] or m.name.startswith(own[1]) or (m / MARK).is_file()]
    made += [folder / PARTS] if (folder / PARTS).is_dir() else []
    return {
        m.relative_to(folder).as_posix(): sum(f.stat().st_size for f in m.rglob("*") if f.is_file())
        for m in sorted(made)
        if not m.is_symlink()
    }


def bare(context: typer.Context, as_json: Json = False) -> None:
    """Show what Microtome keeps on this machine, or clear it."""
    if context.invoked_subcommand is None:
        show(as_json)


def show(as_json: Json = False) -> None:
    """List what is kept, with sizes."""
    from microtome.anatomy import cache_dir

    folder = cache_dir()
    entries = _entries(folder)
    if as_json:
        print_json({"folder": str(folder), "entries": entries})
        return
    out.print(str(folder), markup=False, soft_wrap=True)
    for name, size in entries.items():
        out.print(f"{size / 2**20:10.1f} MiB  {name}", markup=False, soft_wrap=True)
    out.print(f"{sum(entries.values()) / 2**20:10.1f} MiB  together" if entries else "empty")


def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Delete all of it; the default model is made again when it is next opened."""
    from microtome.anatomy import cache_dir

    folder = cache_dir()
    entries = _entries(folder)
    if not entries:
        out.print(f"nothing to clear in {folder}", markup=False, soft_wrap=True)
        return
    size = sum(entries.values()) / 2**20
    one = "1 folder" if len(entries) == 1 else f"{len(entries)} folders"
    if not yes and not typer.confirm(f"Delete {one} ({size:,.0f} MiB) in {folder}?", err=True):
        return
    for name in entries:
        try:
            shutil.rmtree(folder / name)
        except OSError as problem:
            raise error(
                OutputError, f"cannot delete {folder / name}", got=str(problem), do="check its permissions"
            ) from problem
    out.print(f"cleared {size:,.0f} MiB")
