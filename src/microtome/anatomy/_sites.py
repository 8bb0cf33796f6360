"""The site grammar: one address for every activation inside a model.

    address    ::=  [ layers "." ] name [ "[" units "]" ] [ "@" positions ]
    layers     ::=  selection
    units      ::=  selection
    positions  ::=  selection | "last" | "prompt" | "generated"
    selection  ::=  "*" | item { "," item }
    item       ::=  integer | integer "-" integer          (both ends included)

``12.mlp.post[431]@-1`` is neuron 431 of layer 12 at the last position; ``*.attn.z[3]`` is head 3 of every layer.
Negative integers count from the end. `str(parse(text))` is the canonical spelling, and parses to the same address.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from microtome.errors import SiteError, error, nearest
from microtome.shown import Listing, shown

Rule = Literal["last", "prompt", "generated"]
RULES: tuple[Rule, ...] = ("last", "prompt", "generated")


@dataclass(frozen=True)
class SiteSpec:
    """What a site name means: its axes, and whether it exists once a layer or once a model."""

    name: str
    dims: tuple[str, ...]
    scope: Literal["model", "layer"]
    meaning: str

    @property
    def unit(self) -> str:
        """The axis that `[units]` selects from."""
        if self.dims[1] == "head":
            return "head"
        return self.dims[2] if len(self.dims) > 2 else "batch"

    @property
    def pos(self) -> str:
        """The axis that `@positions` selects from."""
        return "q_pos" if "q_pos" in self.dims else "pos"


def _spec(name: str, dims: str, meaning: str) -> SiteSpec:
    scope = "model" if name in ("embed", "final", "final.scale", "logits") else "layer"
    return SiteSpec(name, ("batch", *dims.split()), scope, meaning)


SITES: Listing[SiteSpec] = Listing(
    {
        spec.name: spec
        for spec in (
            _spec("embed", "pos d_model", "what enters the first block"),
            _spec("resid_pre", "pos d_model", "residual stream before the layer"),
            _spec("resid_mid", "pos d_model", "residual stream between the two branches"),
            _spec("resid_post", "pos d_model", "residual stream after the layer"),
            _spec("attn.scale", "pos", "what the attention branch's norm divides by"),
            _spec("attn.in", "pos d_model", "what attention reads, after its norm"),
            _spec("attn.q", "pos head d_head", "queries as used"),
            _spec("attn.k", "pos kv_head d_head", "keys as used"),
            _spec("attn.v", "pos kv_head d_head", "values"),
            _spec(
                "attn.scores",
                "head q_pos k_pos",
                "attention before the softmax; what a mask forbids stays forbidden whatever is edited",
            ),
            _spec(
                "attn.pattern",
                "head q_pos k_pos",
                "attention after the softmax; an edited pattern is neither masked nor normalised again",
            ),
            _spec("attn.z", "pos head d_head", "per-head mix of values, what enters W_O"),
            _spec("attn.result", "pos head d_model", "each head's write, W_O applied"),
            _spec("attn_out", "pos d_model", "what attention adds to the residual stream"),
            _spec("mixer.in", "pos d_model", "what a mixer that is no attention reads, after its norm"),
            _spec("mixer_out", "pos d_model", "what a mixer that is no attention adds to the residual stream"),
            _spec("mlp.scale", "pos", "what the MLP branch's norm divides by"),
            _spec("mlp.in", "pos d_model", "what the MLP reads, after its norm"),
            _spec("mlp.gate", "pos neuron", "gate before the non-linearity"),
            _spec("mlp.up", "pos neuron", "the up branch of a gated MLP"),
            _spec("mlp.pre", "pos neuron", "pre-activations of an ungated MLP"),
            _spec("mlp.post", "pos neuron", "neuron activations, what enters W_out"),
            _spec("mlp.router", "pos expert", "weight given to each expert, 0 where it is not used"),
            _spec("mlp.experts.post", "pos expert neuron", "neurons of each expert, 0 where it is not used"),
            _spec("mlp.experts", "pos rank d_model", "weighted output of each expert slot"),
            _spec("mlp_out", "pos d_model", "what the MLP adds to the residual stream"),
            _spec("final.scale", "pos", "what the final norm divides by"),
            _spec(
                "final",
                "pos d_model",
                "what the unembedding reads, or a head with a transform of its own",
            ),
            _spec("logits", "pos vocab", "logits"),
        )
    }
)


@shown
@dataclass(frozen=True)
class Indices:
    """A choice of integers: everything, or inclusive ranges in the order they were written."""

    ranges: tuple[tuple[int, int], ...] | None = None

    def __str__(self) -> str:
        if self.ranges is None:
            return "*"
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in self.ranges)

    @property
    def is_all(self) -> bool:
        """Whether everything is chosen."""
        return self.ranges is None

    @property
    def is_one(self) -> bool:
        """Whether it was written as one integer."""
        return self.ranges is not None and len(self.ranges) == 1 and self.ranges[0][0] == self.ranges[0][1]

    @property
    def from_end(self) -> bool:
        """Whether any integer counts from the end."""
        return self.ranges is not None and any(a < 0 or b < 0 for a, b in self.ranges)

    def resolve(self, size: int) -> list[int] | None:
        """The chosen indices of an axis of length `size`, or None if one lies outside or a range runs backwards."""
        if self.ranges is None:
            return list(range(size))
        chosen: list[int] = []
        for low, high in self.ranges:
            a, b = (low + size if low < 0 else low), (high + size if high < 0 else high)
            if not (0 <= a <= b < size):
                return None
            chosen.extend(range(a, b + 1))
        return list(dict.fromkeys(chosen))


ALL = Indices()


@shown
@dataclass(frozen=True)
class Site:
    """One activation, fully named: a site name and, where it belongs to one, a layer."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.layer}.{self.name}"

    @property
    def spec(self) -> SiteSpec:
        """Axes and meaning of this site."""
        return SITES[self.name]


@shown
@dataclass(frozen=True)
class Address:
    """A parsed address: a site name with the layers, units and positions that it selects."""

    name: str
    layers: Indices | None = None
    units: Indices = ALL
    positions: Indices | Rule = ALL

    def __str__(self) -> str:
        text = self.name if self.layers is None else f"{self.layers}.{self.name}"
        if not self.units.is_all:
            text += f"[{self.units}]"
        if isinstance(self.positions, str) or not self.positions.is_all:
            text += f"@{self.positions}"
        return text

    @property
    def spec(self) -> SiteSpec:
        """Axes and meaning of the site that is named."""
        return SITES[self.name]

    @property
    def whole(self) -> bool:
        """Whether all units and all positions are selected."""
        return self.units.is_all and not isinstance(self.positions, str) and self.positions.is_all

    def at(self, layer: int | None) -> Address:
        """The same units and positions in one layer."""
        return replace(self, layers=None if layer is None else Indices(((layer, layer),)))


_SELECTIONS = 'an integer, a range "3-7", a list "1,4,9" or "*"'
_ITEM = re.compile(r"(-?\d+)(?:-(-?\d+))?$")
_ADDRESS = re.compile(
    r"(?:(?P<layers>\*|-?\d[\d,-]*)\.)?(?P<name>[A-Za-z_][A-Za-z_.]*?)(?:\[(?P<units>[^\]]*)\])?(?:@(?P<positions>.+))?$"
)


def _indices(text: str, what: str, whole: str) -> Indices:
    if text.strip() == "*":
        return ALL
    ranges: list[tuple[int, int]] = []
    for item in text.split(","):
        match = _ITEM.match(item.strip())
        if not match:
            raise error(
                SiteError,
                f'cannot read {what} in "{whole}"',
                got=f'"{text}"',
                allowed=_SELECTIONS,
                do=f"write {what} as one of these",
            )
        low = int(match[1])
        high = low if match[2] is None else int(match[2])
        if (low < 0) == (high < 0) and high < low:
            raise error(SiteError, f'the range "{item}" in "{whole}" runs backwards', do=f'write "{high}-{low}"')
        ranges.append((low, high))
    return Indices(tuple(ranges))


def integer(value: Any) -> int:
    """A whole number of any library as Python's own.

    Raises:
        TypeError: it is none: a truth value, text, or what would have to be rounded.
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError("a truth value")
    return operator.index(value)


def parse_indices(text: str | int | list[int], what: str = "a selection") -> Indices:
    """Read a selection: an int, a list of ints, or text such as ``"3-7"``, ``"1,4,9"`` or ``"*"``.

    Raises:
        SiteError: it is none of these.
    """
    if isinstance(text, str):
        return _indices(text, what, text)
    try:
        chosen = [integer(i) for i in (text if isinstance(text, list) else [text])]
    except TypeError:
        chosen = []
    if not chosen:
        do = f"write {what} as one of these"
        raise error(SiteError, f"cannot read {what}", got=repr(text), allowed=_SELECTIONS, do=do)
    return Indices(tuple((i, i) for i in chosen))


def _positions(text: str, whole: str) -> Indices | Rule:
    for rule in RULES:
        if rule == text:
            return rule
    return _indices(text, "positions", whole)


def parse(text: str | Address) -> Address:
    """Read an address.

    >>> str(parse("12.mlp.post[431]@-1"))
    '12.mlp.post[431]@-1'

    Raises:
        SiteError: the text does not follow the grammar, or names no site; the nearest names are given.
    """
    if isinstance(text, Address):
        return text
    given: Any = text
    return _parsed(text) if isinstance(given, str) else _parse(given)


def _parse(text: Any) -> Address:
    match = _ADDRESS.match(text.strip()) if isinstance(text, str) else None
    if not match:
        raise error(
            SiteError,
            f'cannot read the address "{text}"',
            allowed="<layers>.<name>[<units>]@<positions>, for example 12.mlp.post[431]@-1",
            do="write it in that form",
        )
    name = match["name"]
    if name not in SITES:
        raise SiteError(
            f'no site is called "{name}" in "{text}".{nearest(name, list(SITES))} Sites: {", ".join(SITES)}.'
        )
    spec = SITES[name]
    if spec.scope == "layer" and match["layers"] is None:
        raise error(SiteError, f'"{text}" names no layer', do=f'write "*.{name}" for all layers or "0.{name}" for one')
    if spec.scope == "model" and match["layers"] is not None:
        raise error(SiteError, f'"{name}" belongs to the model, not to a layer', got=f'"{text}"', do=f'write "{name}"')
    layers = None if match["layers"] is None else _indices(match["layers"], "layers", text)
    units = ALL if match["units"] is None else _indices(match["units"], "units", text)
    positions: Indices | Rule = ALL
    if match["positions"] is not None:
        positions = _positions(match["positions"].strip(), text)
    return Address(name, layers, units, positions)


_parsed = lru_cache(maxsize=2**14)(_parse)  # a sweep reads thousands of addresses, each several times


def parse_list(text: str | Address | Iterable[str | Address]) -> list[Address]:
    """Read addresses: in one text with commas between them, or in a list.

    >>> [str(address) for address in parse_list("1,4.mlp.post[0,2], embed")]
    ['1,4.mlp.post[0,2]', 'embed']

    Raises:
        SiteError: one of them is none.
    """
    if isinstance(text, Address):
        return [text]
    if not isinstance(text, str):
        return [address for one in text for address in parse_list(one)]
    parts, inside = [""], 0
    for letter in text:
        inside += (letter == "[") - (letter == "]")
        # A comma before the name of a site is one between its layers.
        if letter == "," and inside <= 0 and any(map(str.isalpha, parts[-1])):
            parts.append("")
        else:
            parts[-1] += letter
    return [parse(part.strip()) for part in parts]
