"""The text that options name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microtome.errors import ArgumentError, error
from microtome.files import text_place


def text_of(
    files: Sequence[Path] | None, field: str = "text", group: str | None = None
) -> Path | dict[str, Path] | None:
    """The text in some files; of several, each is a group by its name."""
    check_columns(files, field, group)
    for file in files or ():
        text_place(file)
    if not files or len(files) == 1:
        return files[0] if files else None
    names = [file.stem for file in files]
    return {file.stem if names.count(file.stem) == 1 else str(file): file for file in files}


def check_columns(text: object, field: str, group: str | None) -> None:
    """Refuse columns where no text is given that has them.

    Raises:
        ArgumentError: there is a column, and no text.
    """
    given = {"--field": field != "text", "--group-by": group is not None}
    if not text and (named := [name for name, value in given.items() if value]):
        what = (
            f"{' and '.join(named)} name{'s a column' if len(named) == 1 else ' columns'} of a table, and none is given"
        )
        raise error(ArgumentError, what, do=f"name the table with --text, or leave {' and '.join(named)} out")


def tables_of(text: Path | dict[str, Path] | None, field: str, group: str | None) -> Any:
    """The text, with the column that is named where it is not the usual one; groups by column go over all files."""
    if text is None or (field == "text" and group is None):
        return text
    from microtome.stream import corpus_of, joined

    files = {"": text} if isinstance(text, Path) else text
    read = {name: corpus_of(file, field=field, group=group) for name, file in files.items()}
    if isinstance(text, Path) or group is None:
        return read if not isinstance(text, Path) else read[""]
    return joined(", ".join(read), read.values())
