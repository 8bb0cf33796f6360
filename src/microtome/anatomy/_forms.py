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

from microtome.anatomy._discover import Form, LayerParts, Norm, Parts
from microtome.anatomy._end import called_norm, norm_at
from microtome.anatomy._flow import Call, Flow, Seen, and_a_vector, chain, factors_of, fits_of, multiples, same, writer
from microtome.anatomy._neurons import with_neurons

NOTHING = 1e-6
"""A branch that is added so few times is not what was added."""
MOST = 5
"""Places at which what a branch writes is looked for."""


def learned(model: Any, parts: Parts, flow: Flow) -> Parts:
    """The parts of a model with the forms that one forward shows of its blocks."""
    found = [BlockForm(model, with_neurons(model, layer, flow), flow).learned() for layer in parts.layers]
    forms = [form for layer, form in found if form is not None and layer.attn and (layer.mlp or layer.down)]
    form = max(set(forms), key=forms.count) if forms else "sequential"
    return replace(parts, layers=tuple(layer for layer, _ in found), form=form)


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
        self.model, self.layer, self.mixes, self.flow = model, layer, layer.mixer is not None, flow
        self.inside = flow.inside(layer.block)
        whole = flow.first(layer.block)
        self.pre = None if whole is None else whole.read
        self.post = None if whole is None else whole.wrote
        attn = self._branch("attn", layer.attn, layer.o)
        mlp = self._branch("mlp", layer.mlp or layer.gate or layer.up, layer.down or layer.mlp)
        mixer = self._branch("mixer", layer.mixer, layer.mixer)
        written = {
            c.wrote.key for other in (attn, mlp) if other is not None for c in other.writes if c.wrote is not None
        }
        if mixer is not None and mixer.reads.key in written:  # it is behind another branch
            self.layer, mixer = replace(layer, mixer=None, mixer_writes=None), None
        found = (attn, mixer, mlp)
        self.branches = [branch for branch in found if branch is not None]
        self.plus: dict[str, str] = {}

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
            known = called_norm(self.model, before) or self.norm(before.path) is not None
            return before if before.read is not None and known else None
        for call in reversed(self.inside[: self.inside.index(reading)]):
            if call.read is None or call.wrote is None or self.norm(call.path) is None:
                continue
            if multiples(reading.read.value, call.wrote.value) is not None:
                return call
        return None

    def norm(self, path: str) -> Norm | None:
        """A module as a norm; None where it is none."""
        return norm_at(self.model, path, 0 if self.pre is None else int(self.pre.value.shape[-1]))

    def learned(self) -> tuple[LayerParts, Form | None]:
        """The parts of the block with its norms and what its branches add, and its form; as they were where unclear."""
        if self.pre is None or self.post is None or not self.branches:
            return self.layer, None
        behind = self._post_norm()
        if behind is not None:
            return replace(self.layer, **behind), "post_norm"
        norms = {f"{each.name}_norm": self._norm_of(each) for each in self.branches if each.name != "mixer"}
        sole = self._sole() if self.layer.attn is not None and self.mixes else None
        if sole is not None:  # attention adds nothing by itself
            alone: dict[str, Any] = norms | {"mixer": sole, "mixer_writes": sole, "attn_writes": None}
            return replace(self.layer, **alone), None
        points = self._points()
        new: dict[str, Any] = norms | {"mid": self._reader(points[-2]) if len(points) > 2 else None} | self._of_lanes()
        form: Form = "parallel" if len(points) == 2 and len(self.branches) > 1 else "sequential"
        base: str | None = None
        for start, end in pairwise(points):
            some = [branch for branch in self.branches if same(branch.point, start)]
            if not some:
                base = self._made_by_norm(start, end)
                continue
            last = end is points[-1]
            found, base, until = self._section(start, end, some, base, last)
            new |= {"post_base" if last else "mid_base": base} | ({"until": until} if last else {})
            for branch, path, by in found:
                new |= {f"{branch.name}_writes": path, f"{branch.name}_by": by}
                if branch.name != "mixer":
                    new[f"{branch.name}_post_norm"] = self._behind(branch, path)
            base = None
        return replace(self.layer, **new, **self.plus), form

    def _section(
        self, start: Seen, end: Seen, some: Sequence[Branch], base: str | None, last: bool
    ) -> tuple[list[tuple[Branch, str, float]], str | None, str | None]:
        """What leads from one point of the stream to the next: what is added, to which norm of it, until which module.

        Branches are added to the stream, or to what a norm makes of it; and behind the last of them more may follow.
        """
        norms = [c for c in self.inside if c.read is not None and c.wrote is not None and same(c.read, start)]
        bases = [(start, base), *((n.wrote, n.path) for n in norms if n.wrote is not None and self.norm(n.path))]
        written = max((self.inside.index(branch.writes[0]) for branch in some if branch.writes), default=0)
        ends: dict[Any, tuple[Seen, str | None]] = {end.key: (end, None)}
        for call in self.inside[written:] if last else ():
            if call.read is not None:
                ends.setdefault(call.read.key, (call.read, call.path))
        every = [c for c in self.inside[written:] if c.wrote is not None and c.wrote.value.shape == end.value.shape]
        summed = [replace(branch, writes=every[::-1]) for branch in some if len(some) == 1]  # with others, before
        for branches in (some, summed):
            for to, until in ends.values():
                for origin, norm in bases:
                    found = self._added(origin, to, branches)
                    if found is not None:
                        added = [(b, path, by) for b, (_, path, by) in zip(some, found, strict=True)]
                        return added, norm, until
        return [], None, None

    def _sole(self) -> str | None:
        """The module that wrote all that the block adds to the stream."""
        assert self.pre is not None
        assert self.post is not None
        added = self.post.value.double() - self.pre.value.double()
        calls = (c for c in self.inside if c.wrote is not None and multiples(added, c.wrote.value) == [1.0])
        return min((c.path for c in calls), key=lambda path: path.count("."), default=None)

    def _reader(self, point: Seen) -> str | None:
        """The first module that reads a point of the stream."""
        return next((c.path for c in self.inside if c.read is not None and same(c.read, point)), None)

    def _made_by_norm(self, start: Seen, end: Seen) -> str | None:
        """The norm that makes one point of the stream of another, with nothing added."""
        norm = writer(self.inside, end)
        made = norm is not None and norm.read is not None and same(norm.read, start)
        return norm.path if norm is not None and made and self.norm(norm.path) is not None else None

    def _norm_of(self, branch: Branch) -> Norm | None:
        """The norm through which a branch reads the stream, with the number that what it gives is read times."""
        if branch.norm is None or branch.norm.wrote is None:
            return None
        norm = self.norm(branch.norm.path)
        by = None if norm is None else multiples(branch.reads.value, branch.norm.wrote.value)
        if norm is not None:
            return norm if by is None else replace(norm, times=by[0])
        # Around a norm of a known form there may be a gate of what it gives.
        within = [c for c in self.inside if c.path.startswith(branch.norm.path + ".") and c.read is not None]
        known = (self.norm(c.path) for c in within if c.read is not None and same(c.read, branch.point))
        return next((norm for norm in known if norm is not None), None)

    def _of_lanes(self) -> dict[str, Any]:
        """Which module reads the lanes of a stream between the branches, and which branches read a mixture of lanes."""
        assert self.pre is not None
        if self.pre.value.numel() <= self.branches[0].reads.value.numel():
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
            if not any(same(branch.point, point) for point in points):
                points.append(branch.point)
        return [*points, self.post]

    def _added(self, start: Seen, end: Seen, some: Sequence[Branch]) -> list[tuple[Branch, str, float]] | None:
        """Which of the writes of some branches, times which number, lead from one point of the stream to the next."""
        if start.value.shape != end.value.shape or not some or same(start, end):
            return None
        added = end.value.double() - start.value.double()
        for choice in product(*(branch.writes for branch in some)):
            values: list[Tensor] = [call.wrote.value for call in choice if call.wrote is not None]
            by = multiples(added, *values)
            if by is not None and min(map(abs, by)) > NOTHING:
                return [(b, c.path, x) for b, c, x in zip(some, choice, by, strict=True)]
        return self._scaled(start, end, some[0]) if len(some) == 1 else None

    def _scaled(self, start: Seen, end: Seen, branch: Branch) -> list[tuple[Branch, str, float]] | None:
        """The same where the stream itself is scaled: as a whole, or every dimension by its own factor."""
        for call in branch.writes:
            assert call.wrote is not None
            if same(call.wrote, end):
                continue
            by = multiples(end.value, start.value, call.wrote.value)
            if by is not None and min(map(abs, by)) > NOTHING:
                return [(branch, call.path, by[1])]
            if factors_of(end.value, start.value, call.wrote.value) is not None:
                return [(branch, call.path, 1.0)]
            moved = and_a_vector(end.value.double() - start.value.double(), call.wrote.value)
            vector = None if moved is None else self._parameter(moved[1])
            if moved is not None and vector is not None:
                self.plus[f"{branch.name}_plus"] = vector
                return [(branch, call.path, moved[0])]
        return None

    def _parameter(self, vector: Tensor) -> str | None:
        """The parameter of the block that is a vector [d_model]."""
        block = self.layer.block
        own = self.model.get_submodule(block).named_parameters(prefix=block)
        same_size = ((path, p.detach()) for path, p in own if p.shape == vector.shape)
        gaps = ((path, float((p.double() - vector).norm()), fits_of(p)) for path, p in same_size)
        return next((path for path, gap, fits in gaps if gap <= fits * float(vector.norm())), None)

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
        """The norm, or another module, behind a branch, where what is added is what that wrote."""
        first = branch.writes[0].path if branch.writes else path
        behind = path != first and (not first.startswith(path + ".") or self.norm(path) is not None)
        return path if behind else None
