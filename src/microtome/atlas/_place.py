"""Where an atlas may be written."""

from __future__ import annotations

import json
from pathlib import Path

from microtome.atlas._format import KIND, LABELS_FILE
from microtome.errors import OutputError, error


def check_out(out: Path, force: bool = True) -> None:
    """Refuse a folder that must not be written to.

    Args:
        out: the folder.
        force: whether an earlier atlas may be replaced.

    Raises:
        OutputError: it is a file, or holds something that is not an atlas, alone or beside one; or it holds an atlas
            that may not be replaced.
    """
    if out.is_file():
        raise error(OutputError, f"{out} is a file", allowed="a folder", do="name another place")
    try:
        held = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_symlink() or not p.is_dir())
        held += sorted(p.name for p in out.iterdir() if p.is_dir()) if out.is_dir() and not held else []
    except OSError as problem:
        raise error(
            OutputError, f"cannot read the folder {out}", got=str(problem), do="check its permissions"
        ) from problem
    own = _files(out)
    foreign = [name for name in held if name not in own]
    if foreign:
        raise error(
            OutputError,
            f"the folder {out} exists and holds something that is not an atlas",
            got=", ".join(foreign[:5]),
            allowed="a new folder, an empty one, or an earlier atlas",
            do="name another folder",
        )
    if held and not force:
        do = "name another folder, or pass force=True to replace it"
        raise error(OutputError, f"the folder {out} exists and holds an earlier atlas", do=do)


def _files(folder: Path) -> set[str]:
    """The files of the atlas in a folder, as its manifest lists them; none if there is no atlas."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {*manifest["files"], LABELS_FILE} if manifest["kind"] == KIND else set()
    except (OSError, ValueError, TypeError, KeyError):
        return set()
