"""The map of a model: found by the names of its parts, or where that fails, by what one forward passes between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from microtome.anatomy import LAYOUTS, Anatomy, anatomy_of, probe
from microtome.errors import MicrotomeError
from microtome.model._identities import IdentityCheck
from microtome.model._proof import prove, unproven_stream
from microtome.run import LoadedModel
from microtome.run.hook import trace


def best_map(model: LoadedModel) -> tuple[list[IdentityCheck], Anatomy, Anatomy]:
    """Prove the map of a model, and where something fails or is missing, that by what a forward shows, if it is better.

    Returns:
        The checks of the better map, it as it was found, and it without what failed.
    """
    found = model.anatomy
    best = (*prove(model), found)
    if _worth(*best[:2]):
        for other in _others(model, found):
            try:
                model.remap(other)
                tried = (*prove(model), other)
            except MicrotomeError:
                continue
            finally:
                model.remap(found)
            if _lack(*tried[:2]) < _lack(*best[:2]):
                best = tried
    checks, proven, chosen = best
    return checks, chosen, proven


def _others(model: LoadedModel, found: Anatomy) -> Iterator[Anatomy]:
    """Other maps of a model: as a forward shows its parts, and with each layout of a fused projection."""
    try:
        traced = traced_anatomy(model.hf, found.name)
    except MicrotomeError:
        return
    yield traced
    if any(layer.qkv is not None for layer in traced.parts.layers):
        for layout in LAYOUTS:
            family = replace(traced.parts.family, fused_qkv=layout)
            yield replace(traced, parts=replace(traced.parts, family=family))


def traced_anatomy(hf: Any, name: str) -> Anatomy:
    """The map of a model as one forward shows its parts."""
    return anatomy_of(hf, name, trace(hf, probe(hf)))


def _worth(checks: Sequence[IdentityCheck], proven: Anatomy) -> bool:
    """Whether another map might show more."""
    unknown = any("no known form" in why or "no norm" in why for why in proven.missing.values())
    besides = any("a constant is added" in why for why in proven.unproven.values())
    return unknown or besides or any(check.status == "fails" for check in checks)


def _lack(checks: Sequence[IdentityCheck], proven: Anatomy) -> tuple[int, int, int, int]:
    """What a map lacks: a stream, then sites, then weights, then reasons for what is missing."""
    unknown = sum("known form" in why for why in proven.missing.values())
    return int(unproven_stream(checks) is not None), -len(proven.hook_points), len(proven.unproven), unknown
