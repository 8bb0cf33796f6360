"""Microtome: see inside transformer language models, change them, and say how sure you are.

>>> import microtome as mt
>>> model = mt.open()
>>> run = model.run("The capital of France is", capture="*.mlp.post", edits=mt.edit.Zero("12.attn.z[3]@-1"))
>>> run["12.mlp.post"], run.logits

The names below are the whole face; everything else is in a room, such as `mt.edit` and `mt.explain`. Names and rooms
load on first use, so that importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microtome import anatomy as anatomy
    from microtome import atlas as atlas
    from microtome import change as change
    from microtome import circuits as circuits
    from microtome import claims as claims
    from microtome import edit as edit
    from microtome import errors as errors
    from microtome import explain as explain
    from microtome import measurements as measurements
    from microtome import metric as metric
    from microtome import planted as planted
    from microtome import probes as probes
    from microtome import stream as stream
    from microtome import subspaces as subspaces
    from microtome import sweep as sweep
    from microtome import tasks as tasks
    from microtome import training as training
    from microtome import view as view
    from microtome.change import assess as assess
    from microtome.context import Settings as Settings
    from microtome.context import settings as settings
    from microtome.method import compare as compare
    from microtome.method import methods as methods
    from microtome.method.runner import measure as measure
    from microtome.method.runner import measures as measures
    from microtome.model import Model as Model
    from microtome.model import open as open
    from microtome.run import Run as Run
    from microtome.tasks import Task as Task
    from microtome.training import fit as fit

_ROOMS = (
    "anatomy", "atlas", "change", "circuits", "claims", "edit", "errors", "explain", "measurements", "metric",
    "planted", "probes", "stream", "subspaces", "sweep", "tasks", "training", "view",
)  # fmt: skip
_HOME = {
    "Model": "model:Model", "Run": "run:Run", "Settings": "context:Settings", "Task": "tasks:Task",
    "assess": "change:assess", "compare": "method:compare", "fit": "training:fit",
    "measure": "method.runner:measure", "measures": "method.runner:measures",
    "methods": "method:methods", "open": "model:open", "settings": "context:settings",
}  # fmt: skip

__all__ = sorted([*_HOME, *_ROOMS])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"microtome.{name}")
    if name in _HOME:
        room, _, attribute = _HOME[name].partition(":")
        value = getattr(import_module(f"microtome.{room}"), attribute)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("microtome")
    raise AttributeError(f"module 'microtome' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
