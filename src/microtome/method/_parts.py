"""The parts of a pass that a cluster has done, on disk until all of it is: a driver that is started again goes on.

A part is taken up again only by the same work: the same model, measures, arguments, groups, seed and tokens, the same
source of Microtome and of the packages of the measures, and the same PyTorch and transformers.

Cost:  what a part keeps is written once, at most 256 MiB of it: larger parts are done again. A hash of the tokens.
Check: tests/laws/test_cluster.py, tests/unit/test_parts.py.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from microtome.anatomy import PARTS, cache_dir
from microtome.errors import DataError, OutputError
from microtome.method._statistic import Kept
from microtome.stream import TokenBatch, load_accumulators, save_accumulators

Found = list[dict[tuple[int | None, int | None], Kept]]
"""By measure, what it keeps by group and layer."""
PLAIN = (int, float, str, bool, type(None))
LARGEST = 2**28
"""Bytes of a part that is kept, so that the 32 of a pass take 8 GiB at most."""


class Parts:
    """The parts of one pass, by number.

    Args:
        work: all that the parts depend on but their tokens.
        modules: of the measures, one by one.
    """

    def __init__(self, work: Sequence[object], modules: Sequence[str]) -> None:
        self._measures = len(modules)
        versions = [f"{name} {version(name)}" for name in ("torch", "transformers")]
        sha = hashlib.sha256(repr((work, versions)).encode())
        for name in sorted({"microtome", *modules}):
            sha.update(_source(name))
        self.folder = cache_dir() / PARTS / sha.hexdigest()[:32]
        self._plain = _is_plain(work)

    def read(self, number: int, batches: Sequence[TokenBatch]) -> Found | None:
        """What a part keeps, if it is done and undamaged."""
        try:
            held = load_accumulators(self._file(number, batches))
        except DataError:  # it is done again
            return None
        found: Found = [{} for _ in range(self._measures)]
        for name, accumulator in held.items():
            place, group, layer, key = name.split("/", 3)
            found[int(place)].setdefault((_number(group), _number(layer)), {})[key] = accumulator
        return found

    def write(self, number: int, batches: Sequence[TokenBatch], found: Found) -> None:
        """Keep a part. Where nothing can be written the work goes on, and is not taken up again."""
        if not self._plain:
            return
        held = {
            f"{place}/{group}/{layer}/{key}": accumulator
            for place, one in enumerate(found)
            for (group, layer), kept in one.items()
            for key, accumulator in kept.items()
        }
        if sum(x.nbytes for one in held.values() for x in one.state().values()) > LARGEST:
            return
        with suppress(OutputError, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_accumulators(held, self._file(number, batches))

    def clear(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int, batches: Sequence[TokenBatch]) -> Path:
        sha = hashlib.sha256()
        for batch in batches:
            for x in (batch.tokens, batch.start, batch.document, batch.position, batch.group):
                sha.update(f"{tuple(x.shape)}{batch.lead}".encode())
                sha.update(x.cpu().contiguous().numpy().data)
        return self.folder / f"{number}-{sha.hexdigest()[:32]}.safetensors"


def _number(text: str) -> int | None:
    return None if text == "None" else int(text)


def _is_plain(value: object) -> bool:
    """Whether `repr` tells a value from every other one."""
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return all(_is_plain(one) for pair in value.items() for one in pair)  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, PLAIN)


def _source(name: str) -> bytes:
    """A hash of the source of the package that a module is of, as it stands now; of a module of no package, of it."""
    for one in (name.partition(".")[0], name):
        file = getattr(sys.modules.get(one), "__file__", None)
        if file is not None:
            place, sha = Path(file), hashlib.sha256()
            for path in sorted(place.parent.rglob("*.py")) if place.name == "__init__.py" else [place]:
                sha.update(path.read_bytes())
            return sha.digest()
    return b""
