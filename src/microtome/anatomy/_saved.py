"""An anatomy as plain data, as JSON holds it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from microtome.anatomy._anatomy import Anatomy
from microtome.anatomy._discover import LayerParts, Norm, Parts
from microtome.anatomy._family import Family
from microtome.anatomy._hook_points import HookPoint, Split
from microtome.anatomy._rotary import RotarySwitch
from microtome.anatomy._sites import Site, parse

KINDS: dict[str, Any] = {
    k.__name__: k for k in (Anatomy, HookPoint, Split, Norm, Parts, LayerParts, Family, RotarySwitch)
}


def to_plain(value: Any) -> Any:
    """An anatomy, or a part of it, as lists, mappings, text and numbers."""
    if isinstance(value, Mapping):
        return [[str(site), to_plain(held)] for site, held in cast("Mapping[Site, Any]", value).items()]
    if isinstance(value, tuple):
        return [to_plain(held) for held in cast("tuple[Any, ...]", value)]
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    return value


def from_plain(value: Any) -> Any:
    """What `to_plain` made, as it was.

    Raises:
        KeyError, TypeError: it is of another form.
    """
    if isinstance(value, list):
        return tuple(from_plain(held) for held in cast("list[Any]", value))
    if not isinstance(value, dict):
        return value
    held: dict[str, Any] = {name: from_plain(part) for name, part in cast("dict[str, Any]", value).items()}
    kind = KINDS[held.pop("kind")]
    if kind is Anatomy:
        held |= {name: {_site(site): x for site, x in held[name]} for name in ("hook_points", "missing")}
        held["unproven"] = dict(held["unproven"])
    return kind(**held)


def _site(text: str) -> Site:
    address = parse(text)
    return Site(address.name, None if address.layers is None else int(str(address.layers)))
