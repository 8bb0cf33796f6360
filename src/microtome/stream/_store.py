"""Where a harvest lies: a folder, or a place on any file system that fsspec knows.

Every file appears whole or not at all.

On disk a file is made beside its place under a hidden name, flushed and renamed. Elsewhere it is made in a temporary
folder here and sent as a whole; object stores show an object when all of it has arrived, and on other systems it is
sent under a hidden name and renamed.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from microtome.errors import DataError, MicrotomeError, OutputError, error
from microtome.files import atomic

T = TypeVar("T")
WHOLE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory")
"""Protocols whose objects appear when all of them has arrived."""
HIDDEN = ".part"
"""The ending of files that are not whole yet."""
_LEFT = re.compile(r"\.(shard|tokens|manifest)[-.\w]*\.[0-9a-f]{8}\.\w+$")


class Store(ABC):
    """Files by name.

    Attributes:
        place: where they are, as it was given.
        reach: the same, as other processes find it.
        options: of the file system.
    """

    place: str
    reach: str
    options: Mapping[str, Any] | None = None

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The bytes of each file that is there, hidden ones left out."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file."""

    @abstractmethod
    def beside(self, name: str) -> Path:
        """A path on this machine at which a file can be made, before `put`."""

    @abstractmethod
    def put(self, made: Path, name: str) -> None:
        """Put a file that was made at `beside` in its place; it is gone from there then."""

    @abstractmethod
    def here(self, name: str) -> Path:
        """The path of a file on this machine, to be mapped into memory."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; none is left of it."""

    def forget(self, name: str) -> None:
        """Delete the copy that `here` has made of a file, if it has made one."""
        return

    def sweep(self) -> None:
        """Delete what a writer that was killed has left half-written."""
        return


class Folder(Store):
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.reach = path, str(path), str(path.absolute())

    def sizes(self) -> dict[str, int]:
        """The bytes of each file that is there."""
        try:
            inside = list(self.path.iterdir()) if self.path.is_dir() else []
            return {p.name: p.stat().st_size for p in inside if not p.name.startswith(".")}
        except OSError as problem:
            raise error(DataError, f"cannot read the folder {self.path}", got=problem.strerror) from problem

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        try:
            return (self.path / name).read_bytes()
        except OSError as problem:
            raise error(DataError, f"cannot read {self.path / name}", got=problem.strerror) from problem

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        self._make()
        with atomic(self.path / name, "the harvest to") as partial:
            partial.write_bytes(data)

    def beside(self, name: str) -> Path:
        """A hidden path in the folder."""
        self._make()
        return self.path / f".{name}.{secrets.token_hex(4)}{HIDDEN}"

    def put(self, made: Path, name: str) -> None:
        """Flush and rename it."""
        with atomic(self.path / name, "the harvest to") as partial:
            made.replace(partial)

    def here(self, name: str) -> Path:
        """Its path."""
        return self.path / name

    def remove(self, name: str) -> None:
        """Delete a file."""
        (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete hidden files of these names."""
        for left in self.path.glob(".*") if self.path.is_dir() else ():
            if left.is_file() and _LEFT.match(left.name):
                left.unlink(missing_ok=True)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            got, do = problem.strerror, "name another folder"
            raise error(OutputError, f"cannot make the folder {self.path}", got=got, do=do) from problem


class Remote(Store):
    """A place on a file system of fsspec. What is read is copied here once, and deleted with the store."""

    def __init__(
        self, files: Any, root: str, place: str, protocol: str, options: Mapping[str, Any] | None = None
    ) -> None:
        self.options = options
        self.files, self.root, self.place, self.reach = files, root.rstrip("/"), place, place
        self.whole = protocol in WHOLE
        self._near: Path | None = None

    def sizes(self) -> dict[str, int]:
        """The bytes of each file that is there."""

        def look() -> dict[str, int]:
            self.files.invalidate_cache()
            try:
                found = self.files.ls(self.root, detail=True)
            except FileNotFoundError:
                return {}
            names = {str(f["name"]).rpartition("/")[2]: int(f["size"] or 0) for f in found if f["type"] == "file"}
            return {name: size for name, size in names.items() if name and not name.startswith(".")}

        return self._asked(DataError, "cannot read", "", look)

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return self._asked(DataError, "cannot read", name, lambda: self.files.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        made = self.beside(name)
        made.write_bytes(data)
        self.put(made, name)

    def beside(self, name: str) -> Path:
        """A path in a temporary folder."""
        return self._folder() / f"{name}.{secrets.token_hex(4)}{HIDDEN}"

    def put(self, made: Path, name: str) -> None:
        """Send it as a whole."""

        def send() -> None:
            path = self._path(name)
            aside = path if self.whole else self._path(f".{name}.{secrets.token_hex(4)}{HIDDEN}")
            if not self.whole:  # an object store has no folders, and would make a bucket that nobody asked for
                self.files.makedirs(self.root, exist_ok=True)
            self.files.put_file(str(made), aside)
            self.files.invalidate_cache()
            sent, size = int(self.files.info(aside)["size"]), made.stat().st_size
            if sent != size:
                raise OSError(f"{sent} of {size} bytes have arrived")
            if aside != path:
                self.files.mv(aside, path)

        try:
            self._asked(OutputError, "cannot write the harvest to", name, send)
        finally:
            made.unlink(missing_ok=True)

    def here(self, name: str) -> Path:
        """A copy of it."""
        copy = self._folder() / name
        if not copy.exists():
            part = self.beside(name)
            self._asked(DataError, "cannot read", name, lambda: self.files.get_file(self._path(name), str(part)))
            part.replace(copy)
        return copy

    def forget(self, name: str) -> None:
        """Delete the copy of a file."""
        (self._folder() / name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file."""
        self._asked(OutputError, "cannot delete", name, lambda: self.files.rm_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _folder(self) -> Path:
        if self._near is None:
            self._near = Path(tempfile.mkdtemp(prefix="microtome-harvest-"))
            weakref.finalize(self, shutil.rmtree, self._near, ignore_errors=True)
        return self._near

    def _asked(self, kind: type[MicrotomeError], what: str, name: str, ask: Callable[[], T]) -> T:
        """What a file system answers, or one line of why it does not."""
        try:
            return ask()
        except Exception as problem:  # each system raises errors of its own libraries
            got = " ".join(str(problem).split()) or type(problem).__name__
            where = f"{self.place.rstrip('/')}/{name}" if name else self.place
            raise error(kind, f"{what} {where}", got=got, do="check the place and its credentials") from problem


def store_of(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """The store at a path, or at a URL such as "s3://bucket/harvest".

    Args:
        place: where.
        options: of the file system, as `fsspec.filesystem` takes them.

    Raises:
        OutputError: nothing here knows such a file system.
    """
    text = os.fspath(place)
    protocol, there, path = text.partition("://")
    if not there or protocol in ("file", "local"):
        return Folder(Path(path if there else text))
    try:
        core: Any = importlib.import_module("fsspec.core")
        files, root = core.url_to_fs(text, **(options or {}))
    except (ImportError, ValueError) as problem:
        do = 'pip install "microtome[s3]" for s3://; for others, what fsspec asks for'
        got = " ".join(str(problem).split())
        raise error(OutputError, f"no file system here for {text}", got=got, do=do) from problem
    return Remote(files, root, text, protocol, options)


@contextmanager
def making(store: Store, name: str) -> Iterator[Path]:
    """A path beside the place of a file; put there when the block ends well, else deleted."""
    made = store.beside(name)
    try:
        yield made
        store.put(made, name)
    except OSError as problem:
        do = "free some space and run it again: what is whole is kept"
        got = problem.strerror or str(problem)
        raise error(OutputError, f"cannot write the harvest to {store.place}", got=got, do=do) from problem
    finally:
        made.unlink(missing_ok=True)
