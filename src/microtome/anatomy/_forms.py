"""The form of a block, learned from one forward: through what its branches read the stream, and how they add to it.

A branch reads the stream at some point, through a norm or directly, and what it writes, itself or behind a norm, is
added times a number, at once or in turn. Which of these it is, is tried on the values (`multiples`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from torch import Tensor, nn

from microtome.anatomy._discover import Form, LayerParts, Norm, Parts, norm_of
from microtome.anatomy._flow import Call, Flow, Seen, chain, factors_of, multiples, writer

EXACT = 1e-5
"""How well logits must be a multiple of the unembedding's output: a wide soft cap is nearly one."""
MOST = 5
"""Places at which what a branch writes is looked for."""


def learned(model: Any, parts: Parts, flow: Flow) -> tuple[Parts, float | None, float | None]:
    """The parts of a model with the forms that one forward shows, and by what its logits are scaled and capped."""
    found = [BlockForm(model, layer, flow).learned() for layer in parts.layers]
    forms = [form for layer, form in found if form is not None and layer.attn and (layer.mlp or layer.down)]
    form = max(set(forms), key=forms.count) if forms else "sequential"
    last, head, whole = flow.first(parts.layers[-1].block), flow.first(parts.unembedding), flow.first("")
    norm: Norm | None = None
    if head is not None and head.read is not None and last is not None and last.wrote is not None:
        before = writer(flow.calls, head.read)
        lanes = last.wrote.value.shape != head.read.value.shape  # which are mixed to one before the norm
        if before is not None and before.read is not None and (lanes or _same(before.read, last.wrote)):
            norm = _tried(model, before.path, int(before.read.value.shape[-1]))
        if lanes and norm is None and before is not None and not _called_norm(model, before):
            parts = replace(parts, mixed=("final.scale",))
    scale, cap = _of_logits(model, head, whole)
    return replace(parts, layers=tuple(layer for layer, _ in found), form=form, final_norm=norm), scale, cap


def _called_norm(model: nn.Module, call: Call) -> bool:
    """Whether a module is a norm by its name, of whatever form."""
    return "norm" in type(model.get_submodule(call.path)).__name__.lower()


def _of_logits(model: Any, head: Call | None, whole: Call | None) -> tuple[float | None, float | None]:
    """By what the output of the unembedding is multiplied, or softly capped; None where it is neither."""
    if head is None or head.wrote is None or whole is None or whole.wrote is None:
        return None, None
    raw, logits = head.wrote.value, whole.wrote.value
    by = multiples(logits, raw, fits=EXACT)
    if by is not None:
        return by[0], None
    entries = model.config.get_text_config().to_dict().items()
    caps = (float(x) for name, x in entries if "cap" in name and isinstance(x, float | int) and x > 0)
    return None, next((c for c in caps if multiples(logits, (raw / c).tanh() * c, fits=EXACT) == [1.0]), None)


def _tried(model: nn.Module, path: str, width: int) -> Norm | None:
    """A module as a norm; None where it is none."""
    module = model.get_submodule(path)
    if next(module.children(), None) is not None:
        return None
    try:
        return norm_of(module, path, width)
    except Exception:  # noqa: BLE001 (whatever a module makes of a tensor that it does not expect)
        return None


@dataclass
class Branch:
    """One branch of a block: what it reads, the point of the stream that it reads through a norm, what it may add."""

    name: str
    path: str
    reads: Seen
    norm: Call | None
    point: Seen
    writes: list[Call]


class BlockForm:
    """The form of one block in one forward."""

    def __init__(self, model: nn.Module, layer: LayerParts, flow: Flow) -> None:
        self.model, self.layer, self.flow = model, layer, flow
        self.inside = flow.inside(layer.block)
        whole = flow.first(layer.block)
        self.pre = None if whole is None else whole.read
        self.post = None if whole is None else whole.wrote
        found = (
            self._branch("attn", layer.attn, layer.o),
            self._branch("mixer", layer.mixer, layer.mixer),
            self._branch("mlp", layer.mlp or layer.gate or layer.up, layer.down or layer.mlp),
        )
        self.branches = [branch for branch in found if branch is not None]

    def _call(self, path: str | None) -> Call | None:
        return next((call for call in self.inside if call.path == path), None)

    def _branch(self, name: str, reader: str | None, last: str | None) -> Branch | None:
        reading, writing = self._call(reader), self._call(last)
        if reading is None or writing is None or reading.read is None or self.pre is None:
            return None
        norm = self._norm_before(reading)
        point = reading.read if norm is None or norm.read is None else norm.read
        above = [c for c in self.inside if writing.path.startswith(c.path + ".")]
        writes = [*chain(self.inside, writing), *above]
        writes = [c for c in writes if c.wrote is not None and c.wrote.value.shape == self.pre.value.shape]
        return Branch(name, reading.path, reading.read, norm, point, writes[:MOST])

    def _norm_before(self, reading: Call) -> Call | None:
        """The norm that wrote what a module reads, or a multiple of it."""
        assert reading.read is not None
        before = writer(self.inside, reading.read)
        if before is not None:
            known = _called_norm(self.model, before) or self.norm(before.path) is not None
            return before if before.read is not None and known else None
        for call in reversed(self.inside[: self.inside.index(reading)]):
            if call.read is None or call.wrote is None or self.norm(call.path) is None:
                continue
            if multiples(reading.read.value, call.wrote.value) is not None:
                return call
        return None

    def norm(self, path: str) -> Norm | None:
        """A module as a norm; None where it is none."""
        return _tried(self.model, path, 0 if self.pre is None else int(self.pre.value.shape[-1]))

    def learned(self) -> tuple[LayerParts, Form | None]:
        """The parts of the block with its norms and what its branches add, and its form; as they were where unclear."""
        if self.pre is None or self.post is None or not self.branches:
            return self.layer, None
        behind = self._post_norm()
        if behind is not None:
            return replace(self.layer, **behind), "post_norm"
        new: dict[str, Any] = self._of_lanes()
        for branch in self.branches:
            if branch.name != "mixer":
                new[f"{branch.name}_norm"] = None if branch.norm is None else self.norm(branch.norm.path)
        points = self._points()
        form: Form = "parallel" if len(points) == 2 and len(self.branches) > 1 else "sequential"
        for start, end in pairwise(points):
            some = [branch for branch in self.branches if _same(branch.point, start)]
            for branch, path, by in self._added(start, end, some) or ():
                new |= {f"{branch.name}_writes": path, f"{branch.name}_by": by}
                if branch.name != "mixer":
                    new[f"{branch.name}_post_norm"] = self._behind(branch, path)
        return replace(self.layer, **new), form

    def _of_lanes(self) -> dict[str, Any]:
        """Which module reads the lanes of a stream between the branches, and which branches read a mixture of lanes."""
        assert self.pre is not None
        wide, first = self.pre.value.shape, self.branches[0]
        if wide == first.reads.value.shape:
            return {}
        found = (b for b in self.branches if b.norm is None and writer(self.inside, b.reads) is not None)
        mixed = tuple(f"{branch.name}.scale" for branch in found)
        children = [call.path for call in self.flow.children(self.layer.block)]
        starts = [
            next(n for n, path in enumerate(children) if f"{b.path}.".startswith(f"{path}.")) for b in self.branches
        ]
        between = (n for n in self.flow.made(self.layer.block) if min(starts) < n <= max(starts))
        return {"mid": next((children[n] for n in between), None), "mixed": mixed}

    def _points(self) -> list[Seen]:
        """The points of the stream at which branches read it, from what enters the block to what leaves it."""
        assert self.pre is not None
        assert self.post is not None
        points = [self.pre]
        for branch in self.branches:
            if not any(_same(branch.point, point) for point in points):
                points.append(branch.point)
        return [*points, self.post]

    def _added(self, start: Seen, end: Seen, some: Sequence[Branch]) -> list[tuple[Branch, str, float]] | None:
        """Which of the writes of some branches, times which number, lead from one point of the stream to the next."""
        if start.value.shape != end.value.shape or not some:
            return None
        added = end.value.double() - start.value.double()
        for choice in product(*(branch.writes for branch in some)):
            values: list[Tensor] = [call.wrote.value for call in choice if call.wrote is not None]
            by = multiples(added, *values)
            if by is not None:
                return [(b, c.path, x) for b, c, x in zip(some, choice, by, strict=True)]
        return self._scaled(start, end, some[0]) if len(some) == 1 else None

    def _scaled(self, start: Seen, end: Seen, branch: Branch) -> list[tuple[Branch, str, float]] | None:
        """The same where the stream itself is scaled: as a whole, or every dimension by its own factor."""
        for call in branch.writes:
            assert call.wrote is not None
            by = multiples(end.value, start.value, call.wrote.value)
            if by is not None:
                return [(branch, call.path, by[1])]
            if factors_of(end.value, start.value, call.wrote.value) is not None:
                return [(branch, call.path, 1.0)]
        return None

    def _post_norm(self) -> dict[str, Any] | None:
        """The parts of a block whose norms follow the sums of stream and branch; None where they do not."""
        assert self.pre is not None
        assert self.post is not None
        mlp = next((branch for branch in self.branches if branch.name == "mlp"), None)
        first = next((branch for branch in self.branches if branch.name == "attn"), None)
        if mlp is None or first is None:
            return None
        new: dict[str, Any] = {"attn_norm": None, "mlp_norm": None}
        for branch, start, end in ((first, self.pre, mlp.reads), (mlp, mlp.reads, self.post)):
            norm = writer(self.inside, end)
            if norm is None or norm.read is None or self.norm(norm.path) is None:
                return None
            found = self._added(start, norm.read, [branch])
            if found is None:
                return None
            name, (_, path, by) = branch.name, found[0]
            new |= {f"{name}_writes": path, f"{name}_by": by, f"{name}_post_norm": norm.path}
        return new

    def _behind(self, branch: Branch, path: str) -> str | None:
        """The norm behind a branch, where what is added is what that norm wrote."""
        return path if branch.writes and path != branch.writes[0].path and self.norm(path) is not None else None


def _same(one: Seen, other: Seen) -> bool:
    return one.key == other.key or (one.value.shape == other.value.shape and bool((one.value == other.value).all()))
