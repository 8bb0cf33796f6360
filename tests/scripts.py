"""Scripts of the repository as modules: tools and benchmarks are no packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def script(path: str) -> Any:
    """The module of a script, by its path in the repository; scripts of tools find each other by name."""
    name = Path(path).stem if path.startswith("tools/") else f"script_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # where dataclasses look for their annotations
    spec.loader.exec_module(made)
    return made
