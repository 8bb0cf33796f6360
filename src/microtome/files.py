"""Files that are read, if they are there; files and folders that are written whole or not at all.

What is written stands beside its place under a hidden temporary name until it is complete; then it is flushed to the
disk and renamed. A reader, and whoever looks after a crash, finds the old version or the new one.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from microtome.errors import DataError, OutputError, error

TEXTS = (".txt", ".jsonl", ".parquet", ".csv", ".tsv")
"""Endings of files that can be read as text."""
PAIRS = (".csv", ".jsonl")
"""Endings of files that can be read as pairs of prompts."""


def whole_file(path: str | os.PathLike[str], endings: tuple[str, ...] = (), how: str = "") -> Path:
    """A path, if a file stands there that ends as such files do.

    Args:
        path: of the file.
        endings: those that are allowed; any by default.
        how: it is to be read, for the error: "as text".

    Raises:
        DataError: there is no file, or one of another ending.
    """
    file = Path(path)
    if not file.is_file():
        where = "is a folder" if file.is_dir() else "does not exist"
        raise error(DataError, f'cannot read "{path}": it {where}', do="give the path of a file")
    if endings and file.suffix.lower() not in endings:
        got, allowed = f'"{file.suffix}"' if file.suffix else "no ending", ", ".join(endings)
        raise error(DataError, f'cannot read "{path}" {how}', got=got, allowed=allowed)
    return file


def text_file(path: str | os.PathLike[str]) -> Path:
    """A path, if a file stands there that can be read as text.

    Raises:
        DataError: there is none.
    """
    return whole_file(path, TEXTS, "as text")


def text_place(path: str | os.PathLike[str]) -> Path:
    """A path, if a file that can be read as text stands there, or a folder, which may hold such files.

    Raises:
        DataError: there is neither.
    """
    return Path(path) if Path(path).is_dir() else text_file(path)


@contextmanager
def atomic(
    path: str | os.PathLike[str],
    what: str = "",
    *,
    folder: bool = False,
    keep: Callable[[Path], bool] | None = None,
    do: str = "check the folder and its free space",
) -> Iterator[Path]:
    """Write a file or a folder under a temporary name, and rename it to `path` when the block ends without an error.

    If the block raises anything, `KeyboardInterrupt` and `SystemExit` included, what stood at `path` stays as it was
    and the temporary file or folder is removed. Of two writers at once, the one that ends last is kept, whole. A folder
    that replaces another is put in place by two renames: for a moment nothing stands there. A symbolic link at `path`
    is replaced, not followed: resolve the path to write to what it points at. Files get the permissions that the umask
    gives any new file, whatever the library that wrote them gives (safetensors: to the owner alone).

    Cost:  one fsync per file, and two renames.
    Check: interrupted at every step, the old version stands and nothing else is left; tests/laws/test_files.py.

    Args:
        path: where the file or folder will stand. The folder that holds a file must exist.
        what: what is written, for the error: "the atlas to".
        folder: whether a folder is written; it and its missing parents are made before the block runs.
        keep: asked about what stands at `path` when the block has ended; where it says True, that stays and the new
            version is discarded.
        do: what the error advises.

    Yields:
        The temporary path: the block writes the file to it, or files into it.

    Raises:
        OutputError: the block, the flush or the rename met an `OSError`, or safetensors could not write.
    """
    place = Path(path)
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
    made: list[Path] = []
    try:
        if folder:
            made = [parent for parent in place.parents if not parent.exists()]
            partial.mkdir(parents=True)
        yield partial
        _open_to_others(partial)
        _flush(partial)
        if partial.is_dir():
            _replace_folder(partial, place, keep)
        elif keep is None or not keep(place):
            partial.replace(place)
    except Exception as problem:
        reason = _reason(problem)
        if reason is None:
            raise
        about = f"cannot write {what} {path}" if what else f"cannot write {path}"
        raise error(OutputError, about, got=reason, do=do) from problem
    finally:
        _remove(partial)
        with suppress(OSError):  # a parent that something else has come into stays
            for parent in made:
                parent.rmdir()


def _replace_folder(partial: Path, place: Path, keep: Callable[[Path], bool] | None) -> None:
    """Put a folder in place of another, which is put back if that fails."""
    old, came = partial.with_suffix(".old"), (errno.ENOTEMPTY, errno.EEXIST)
    try:
        while keep is None or not keep(place):
            if place.is_file() and not place.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            _remove(old)  # another writer has put a newer one in place since
            with suppress(FileNotFoundError):
                place.rename(old)
            try:
                partial.rename(place)
                return
            except OSError as problem:
                if problem.errno not in came:
                    raise
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(place):
            try:
                old.rename(place)
            except OSError as problem:  # another writer's folder came in between: it is whole, and it is newer
                if problem.errno not in came:
                    raise
        raise
    finally:
        _remove(old)


def _open_to_others(path: Path) -> None:
    """Give a file, or every file of a folder, the permissions of a new file."""
    probe = path.with_suffix(".mode")  # the umask itself can be read only by changing it, for all threads
    try:
        ordinary = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            mode = stat.S_IMODE(os.fstat(ordinary).st_mode)
        finally:
            os.close(ordinary)
    finally:
        _remove(probe)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _flush(path: Path) -> None:
    """Wait until the disk holds a file, or every file of a folder: a rename may outlive a crash that data do not."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _reason(problem: Exception) -> str | None:
    """Why a file could not be written; None where the problem is another one."""
    if isinstance(problem, OutputError):  # of a file inside the folder: the user knows the folder alone
        return _reason(problem.__cause__) if isinstance(problem.__cause__, OSError) else None
    if isinstance(problem, OSError):
        return problem.strerror or str(problem)
    # safetensors writes files by itself, and so raises an error of its own. Its name is enough: this module is light.
    return str(problem) if type(problem).__name__ == "SafetensorError" else None
