"""MkDocs hook: pages that are made at every build, and are not in the repository.

One page of reference per room, of every public name in it, and the gallery as a notebook.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

import microtome as mt

GALLERY = "gallery.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
TOP = "microtome"


def rooms() -> list[str]:
    """The rooms of the package, each with a page of its own, and the top first."""
    return [TOP, *(name for name in mt.__all__ if inspect.ismodule(getattr(mt, name))), "method"]


def public(room: str) -> list[str]:
    """The names of our own that a room shows, without its rooms."""
    module = _module(room)
    named = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return sorted(name for name, value in named.items() if _ours(value))


def _module(room: str) -> ModuleType:
    from importlib import import_module

    return mt if room == TOP else import_module(f"microtome.{room}")


def _ours(value: Any) -> bool:
    return (inspect.isclass(value) or callable(value)) and getattr(value, "__module__", "").startswith("microtome")


def reference(room: str) -> str:
    """The Markdown of a room's page, of which mkdocstrings fills each `:::` with a docstring."""
    path = TOP if room == TOP else f"microtome.{room}"
    title = "mt" if room == TOP else f"mt.{room}"
    about = inspect.getdoc(_module(room)) or ""
    about = about.split(">>>")[0].strip()
    paths = [f"{path}.{name}" for name in public(room)] + (_measures() if room == "measurements" else [])
    return "\n\n".join([f"# {title}", about, *(f"::: {path}" for path in paths)]) + "\n"


def _measures() -> list[str]:
    """Where the measures of the package are: they are called by name, so that no room shows them."""
    functions = [method.function for method in mt.methods("measure").values()]
    return [f"{f.__module__}.{f.__name__}" for f in functions if f.__module__.startswith("microtome.")]


def notebook(page: str) -> dict[str, Any]:
    """A page as a notebook: its Python blocks are cells of code, what is between them is text."""
    cells = [cell for cell in _cells(page) if "".join(cell["source"]).strip()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cells(page: str) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(BLOCK.split(page)):
        lines = text.strip().splitlines(keepends=True)
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": lines}
        if number % 2:  # what the pattern captured stands between what it did not
            yield cell | {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            yield cell | {"cell_type": "markdown"}


def on_config(config: Any) -> Any:
    """Name the pages of reference in the navigation."""
    config["nav"].append({"Reference": [{"mt" if r == TOP else f"mt.{r}": f"api/{r}.md"} for r in rooms()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=reference(room)))
    page = (Path(config["docs_dir"]) / GALLERY).read_text(encoding="utf-8")
    content = json.dumps(notebook(page), indent=1)
    files.append(File.generated(config, str(Path(GALLERY).with_suffix(".ipynb")), content=content))
    return files
