"""`python -m microtome.method` writes the rows of docs/methods.md: all methods, from their declarations."""

from __future__ import annotations

import sys

from microtome.method._document import page
from microtome.method._registry import methods


def text() -> str:
    """The page of all methods of the package, plug-ins left out."""
    own = [m for m in methods().values() if m.home.startswith("microtome.")]
    return page((m, f"microtome measure {m.name}" if m.kind == "measure" else _command(m.command)) for m in own)


def _command(name: str) -> str:
    return f"microtome {name}" if name else ""


if __name__ == "__main__":
    sys.stdout.write(text())
