"""Faces of rooms that load a name when it is first used.

The `__init__` of such a room imports its names under `if TYPE_CHECKING:`, for whoever reads types; at run time they are
found in the same lines:

    if TYPE_CHECKING:
        from microtome.anatomy._sites import parse as parse
    else:
        __getattr__, __dir__ = names_of(__name__)

So a command can read addresses and declarations, and refuse what is wrong in them, before it has loaded `torch`.

Check: what an early refusal loads is asserted by name; tests/cli/test_early.py.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def names_of(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names stand in the imports of its own source."""
    own = sys.modules[package]
    loader: Any = own.__spec__.loader if own.__spec__ is not None else None
    homes: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(loader.get_source(package))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith(f"{package}."):
            homes |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        value = getattr(import_module(module), attribute)
        setattr(own, name, value)
        return value

    return get, lambda: sorted({*vars(own), *homes})
