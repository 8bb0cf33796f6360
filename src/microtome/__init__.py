"""Microtome: see inside transformer language models, change them, and say how sure you are.

>>> import microtome as mt
>>> model = mt.open()
>>> run = model.run("The capital of France is", capture="*.mlp.post", edits=[mt.Zero("12.attn.z[3]@-1")])
>>> run["12.mlp.post"], run.logits

This is the whole public interface. Names load on first use, so that importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microtome import atlas as atlas
    from microtome import errors as errors
    from microtome import explain as explain
    from microtome import measure as measure
    from microtome import planted as planted
    from microtome import stream as stream
    from microtome import tasks as tasks
    from microtome.atlas import write_atlas as write_atlas
    from microtome.explain import activation_patching as activation_patching
    from microtome.explain import attention_knockout as attention_knockout
    from microtome.explain import attribute as attribute
    from microtome.explain import causal_trace as causal_trace
    from microtome.explain import circuit_recovery as circuit_recovery
    from microtome.explain import component_effects as component_effects
    from microtome.explain import contributions as contributions
    from microtome.explain import edge_effects as edge_effects
    from microtome.explain import graph as graph
    from microtome.explain import logit_lens as logit_lens
    from microtome.explain import node_effects as node_effects
    from microtome.explain import patch_pairs as patch_pairs
    from microtome.explain import verify as verify
    from microtome.model import Address as Address
    from microtome.model import Anatomy as Anatomy
    from microtome.model import Site as Site
    from microtome.model import parse as parse
    from microtome.run import Add as Add
    from microtome.run import Check as Check
    from microtome.run import Clamp as Clamp
    from microtome.run import Divergence as Divergence
    from microtome.run import Edge as Edge
    from microtome.run import Edit as Edit
    from microtome.run import Freeze as Freeze
    from microtome.run import KnockOut as KnockOut
    from microtome.run import LogitDifference as LogitDifference
    from microtome.run import LogProbability as LogProbability
    from microtome.run import Map as Map
    from microtome.run import Mean as Mean
    from microtome.run import Metric as Metric
    from microtome.run import Model as Model
    from microtome.run import Noise as Noise
    from microtome.run import Plan as Plan
    from microtome.run import Probability as Probability
    from microtome.run import Project as Project
    from microtome.run import Rank as Rank
    from microtome.run import Reading as Reading
    from microtome.run import Repeat as Repeat
    from microtome.run import Rotate as Rotate
    from microtome.run import Run as Run
    from microtome.run import Scale as Scale
    from microtome.run import ScaleBlock as ScaleBlock
    from microtome.run import Set as Set
    from microtome.run import SiteEdit as SiteEdit
    from microtome.run import Skip as Skip
    from microtome.run import SpanLoss as SpanLoss
    from microtome.run import SwapFrom as SwapFrom
    from microtome.run import Sweep as Sweep
    from microtome.run import SweepPlan as SweepPlan
    from microtome.run import Zero as Zero
    from microtome.run import load_edits as load_edits
    from microtome.run import map as map
    from microtome.run import open as open
    from microtome.run import prove as prove
    from microtome.run import save_edits as save_edits

_HOME = {
    "microtome.model": ("Address", "Anatomy", "Site", "parse"),
    "microtome.run": (
        "Add", "Check", "Clamp", "Divergence", "Edge", "Edit", "Freeze", "KnockOut", "load_edits", "LogitDifference",
        "LogProbability", "Map", "map", "Mean", "Metric", "Model", "Noise", "open", "Plan", "Probability", "Project",
        "prove", "Rank", "Reading", "Repeat", "Rotate", "Run", "save_edits", "Scale", "ScaleBlock", "Set",
        "SiteEdit", "Skip", "SpanLoss", "SwapFrom", "Sweep", "SweepPlan", "Zero",
    ),
    "microtome.explain": (
        "activation_patching", "attention_knockout", "attribute", "causal_trace", "circuit_recovery",
        "component_effects", "contributions", "edge_effects", "graph", "logit_lens", "node_effects", "patch_pairs",
        "verify",
    ),
    "microtome.atlas": ("write_atlas",),
}  # fmt: skip
_ROOMS = ("atlas", "errors", "explain", "measure", "planted", "stream", "tasks")
_WHERE = {name: home for home, names in _HOME.items() for name in names}

__all__ = sorted([*_WHERE, *_ROOMS])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"microtome.{name}")
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("microtome")
    raise AttributeError(f"module 'microtome' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
