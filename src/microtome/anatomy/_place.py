"""Where a model is: what its name alone and a look at the disk can tell, before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from microtome.anatomy._checkpoint import base_of_adapter, refuse_adapter
from microtome.errors import ModelNotFound, error
from microtome.shown import shown

DEFAULT_NAME = "SmolLM2-135M-Instruct"
MARK = "made-by-microtome.json"
PARTS = "parts"
"""The folder of the cache where passes stand that a cluster has not finished."""
"""A file in every folder that Microtome makes in its cache, so that it never deletes another's."""


@shown
@dataclass(frozen=True)
class Place:
    """Where a model is.

    Attributes:
        source: its folder, or its id on the hub.
        short: what it is called.
        gguf: its file in that folder, where it is a GGUF file.
    """

    source: str
    short: str
    gguf: str | None = None


def cache_dir() -> Path:
    """Where Microtome keeps what it made: $MICROTOME_CACHE, or the user's cache directory."""
    return Path(os.environ.get("MICROTOME_CACHE") or platformdirs.user_cache_dir("microtome", appauthor=False))


def place_of(name: str | Path, revision: str | None = None) -> Place:
    """Where the model of a name is: a folder, a GGUF file, or else a model of the hub, which is not asked here.

    Raises:
        ModelNotFound: the name is empty, or of a file or folder that is not there or holds no model; or it is on this
            machine, and a revision is asked for.
    """
    source = str(name)
    path = Path(source)
    place = Place(source, path.name)
    if not source:
        do = "leave it out for the default model, or name one"
        raise error(ModelNotFound, "the name of the model is empty", do=do)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise error(ModelNotFound, f"no GGUF file {source}", do="check the path")
        place = Place(str(path.parent), path.stem, path.name)
    elif path.is_dir():
        refuse_adapter(path)
        if not (path / "config.json").is_file() and base_of_adapter(path) is None:
            what = f"the folder {source} holds no model: it has no config.json"
            raise error(ModelNotFound, what, do="name the folder that save_pretrained wrote")
    elif path.is_file():
        raise error(ModelNotFound, f"{source} is a file", allowed="a folder, or a .gguf file", do="name its folder")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise error(ModelNotFound, f"no model folder {source}", do="check the path, or name a model of the hub")
    if revision is not None and Path(place.source).is_dir():
        do = "leave the revision out, or name a model of the hub"
        raise error(ModelNotFound, f"{place.source} is on this machine and has no revisions", got=revision, do=do)
    return place
