"""Files and folders are written whole or not at all, whatever happens and whenever it happens."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from microtome import files
from microtome.errors import DataError, OutputError, error
from microtome.files import atomic

FULL = OSError(errno.ENOSPC, "No space left on device")
ENDS = [FULL, SafetensorError("No space left on device"), KeyboardInterrupt(), SystemExit(143), DataError("no text")]


def held(folder: Path) -> dict[str, str | None]:
    """Everything below a folder: the text of files, None for folders."""
    found = folder.rglob("*")
    return {p.relative_to(folder).as_posix(): None if p.is_dir() else p.read_text() for p in found}


def write(partial: Path, text: str, folder: bool) -> None:
    if folder:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text(text)
    (partial / "b" if folder else partial).write_text(text)


def fail(partial: Path, folder: bool, problem: BaseException) -> None:
    write(partial, "half", folder)
    raise problem


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def folder(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[False, True], ids=["new", "replaces"])
def old(request: pytest.FixtureRequest, tmp_path: Path, folder: bool) -> dict[str, str | None]:
    """What stands at the place before: nothing, or an earlier version."""
    if request.param:
        if folder:
            (tmp_path / "it").mkdir()
        write(tmp_path / "it", "old", folder)
    return held(tmp_path)


def raised(problem: BaseException) -> tuple[type[BaseException], str | None]:
    """What the caller sees of a problem."""
    if isinstance(problem, OSError | SafetensorError):
        return OutputError, r"^cannot write pages to .*it; got No space left on device\. To do: pray\.$"
    return type(problem), None


def test_what_ends_well_stands_alone(tmp_path: Path, folder: bool, old: dict[str, str | None]) -> None:
    with atomic(tmp_path / "it", folder=folder) as partial:
        assert partial.name.startswith(".it.")
        write(partial, "new", folder)
        assert {k: v for k, v in held(tmp_path).items() if not k.startswith(".it.")} == old
    inner = {"it": None, "it/inner": None, "it/inner/a": "new", "it/b": "new"}
    assert held(tmp_path) == (inner if folder else {"it": "new"})


def test_the_disk_holds_every_file_before_anything_is_renamed(
    tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def fsync(file: int) -> None:
        assert not (tmp_path / "it").exists()
        sizes.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic(tmp_path / "it", folder=folder) as partial:
        write(partial, "new", folder)
    assert sizes == [3] * (2 if folder else 1)


@pytest.mark.parametrize("problem", ENDS, ids=lambda p: type(p).__name__)
def test_what_ends_in_the_block_leaves_the_old(
    tmp_path: Path, folder: bool, old: dict[str, str | None], problem: BaseException
) -> None:
    kind, text = raised(problem)
    with pytest.raises(kind, match=text), atomic(tmp_path / "it", "pages to", folder=folder, do="pray") as partial:
        fail(partial, folder, problem)
    assert held(tmp_path) == old


@pytest.mark.parametrize("problem", ENDS[:4], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("of", "name", "at"),
    [(os, "fsync", 0), (Path, "rename", 0), (Path, "rename", 1), (Path, "replace", 0)],
    ids=["flush", "first rename", "second rename", "replace"],
)
def test_what_ends_while_it_is_put_in_place_leaves_the_old(
    tmp_path: Path, folder: bool, old: dict[str, str | None], monkeypatch: pytest.MonkeyPatch,
    of: object, name: str, at: int, problem: BaseException,
) -> None:  # fmt: skip
    own: Callable[..., object] = getattr(of, name)
    calls: list[tuple[object, ...]] = []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == at + 1:
            raise problem
        return own(*args)

    monkeypatch.setattr(of, name, failing)
    kind, text = raised(problem)
    seen: BaseException | None = None
    try:
        with atomic(tmp_path / "it", "pages to", folder=folder, do="pray") as partial:
            write(partial, "new", folder)
    except kind as caught:
        seen = caught
    if len(calls) > at:
        assert seen is not None
        assert text is None or re.search(text, str(seen))
        assert held(tmp_path) == old
    else:  # a step that this case does not take
        assert seen is None
        assert held(tmp_path)["it/b" if folder else "it"] == "new"


def test_a_failure_right_after_the_old_was_moved_aside_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "it").mkdir()
    write(tmp_path / "it", "old", True)
    before, own = held(tmp_path), Path.rename

    def stopped(self: Path, target: Path) -> Path:
        moved = own(self, target)
        if target.suffix == ".old":
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "it", folder=True) as partial:
        write(partial, "new", True)
    assert held(tmp_path) == before


def test_missing_parents_are_made_for_a_folder_and_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a" / "b" / "it", folder=True):
        raise KeyboardInterrupt
    assert not held(tmp_path)
    with atomic(tmp_path / "a" / "b" / "it", folder=True) as partial:
        write(partial, "new", True)
    assert held(tmp_path)["a/b/it/b"] == "new"
    with pytest.raises(OutputError, match="No such file or directory"), atomic(tmp_path / "no" / "it") as partial:
        write(partial, "new", False)


def test_a_file_and_a_folder_do_not_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="Not a directory"), atomic(tmp_path / "file", folder=True):
        pass
    with pytest.raises(OutputError, match="Not a directory"), atomic(tmp_path / "file" / "in", folder=True):
        pass
    with pytest.raises(OutputError, match="s a directory"), atomic(tmp_path / "folder") as partial:
        write(partial, "new", False)
    assert held(tmp_path) == {"file": "mine", "folder": None}


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "x").write_text("mine")
    (tmp_path / "it").symlink_to(tmp_path / "target" / ("" if folder else "x"))
    with atomic(tmp_path / "it", folder=folder) as partial:
        write(partial, "new", folder)
    assert not (tmp_path / "it").is_symlink()
    assert (tmp_path / "target" / "x").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it", "target"]


def test_an_error_of_a_file_inside_is_told_of_the_folder(tmp_path: Path) -> None:
    place = tmp_path / "it"
    with pytest.raises(OutputError, match=r"cannot write .*/it; got No space left"), atomic(place, folder=True):
        raise error(OutputError, "the pages cannot be written to .it.part") from FULL
    with pytest.raises(OutputError, match=r"^other\.$"), atomic(place, folder=True):
        raise error(OutputError, "other")


def test_what_is_as_good_is_kept(tmp_path: Path, folder: bool, old: dict[str, str | None]) -> None:
    asked: list[Path] = []

    def keep(place: Path) -> bool:
        asked.append(place)
        return place.exists()

    with atomic(tmp_path / "it", folder=folder, keep=keep) as partial:
        write(partial, "new", folder)
        assert not asked
    assert asked == [tmp_path / "it"]
    assert held(tmp_path).get("it/b" if folder else "it") == ("old" if old else "new")
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_two_writers_at_once_leave_one_whole_result(tmp_path: Path, folder: bool) -> None:
    """Eight threads, each of which writes its own name everywhere, again and again."""
    meet = threading.Barrier(8)
    problems: list[BaseException] = []

    def writer(name: str) -> None:
        try:
            for _ in range(12):
                with atomic(tmp_path / "it", folder=folder) as partial:
                    write(partial, name, folder)
                    meet.wait()
        except BaseException as problem:
            problems.append(problem)
            meet.abort()
            raise

    threads = [threading.Thread(target=writer, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    texts = [text for text in held(tmp_path).values() if text is not None]
    assert len(texts) == (2 if folder else 1)
    assert len(set(texts)) == 1


def test_a_folder_that_came_between_the_renames_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, came = Path.rename, []

    def late(self: Path, target: Path) -> Path:
        if self.suffix == ".part" and not came:
            came.append(self)
            (tmp_path / "it").mkdir()
            write(tmp_path / "it", "other", True)
        return own(self, target)

    monkeypatch.setattr(files.Path, "rename", late)
    with atomic(tmp_path / "it", folder=True) as partial:
        write(partial, "new", True)
    assert held(tmp_path)["it/b"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_a_rival_that_has_moved_the_new_folder_away_does_not_meet_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, place = Path.rename, tmp_path / "it"
    place.mkdir()
    write(place, "old", True)

    def moved(self: Path, target: Path) -> Path:
        found = own(self, target)
        if self.suffix == ".part":
            own(place, tmp_path / "of the rival")
        return found

    monkeypatch.setattr(files.Path, "rename", moved)
    with atomic(place, folder=True) as partial:
        write(partial, "new", True)
    assert [p.name for p in tmp_path.iterdir()] == ["of the rival"]
    assert held(tmp_path)["of the rival/b"] == "new"


def test_a_folder_that_came_before_the_old_one_was_put_back_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, place = Path.rename, tmp_path / "it"
    place.mkdir()
    write(place, "old", True)

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise FULL
        if self.suffix == ".old":
            place.mkdir()
            write(place, "of the rival", True)
        return own(self, target)

    monkeypatch.setattr(files.Path, "rename", failing)
    with pytest.raises(OutputError, match="No space left"), atomic(place, folder=True) as partial:
        write(partial, "new", True)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert held(tmp_path)["it/b"] == "of the rival"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path, folder: bool, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with atomic(tmp_path / "it", folder=folder) as partial:
            for file in (partial / "inner" / "a", partial / "b") if folder else (partial,):
                file.parent.mkdir(exist_ok=True)
                file.write_text("as safetensors leaves it")
                file.chmod(0o600)
    finally:
        os.umask(before)
    written = [path for path in [tmp_path / "it", *tmp_path.rglob("*")] if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode}
    assert len(held(tmp_path)) == (4 if folder else 1)
