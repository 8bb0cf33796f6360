"""A change of weights as a value: applied, undone bit for bit, composed, compared with a random one, saved.

Formula:  W := round(W + delta), the sum in float64, rounded to the type of the parameter once.
Cost:     the fingerprint of the model is read before and after (half a second for 135M parameters in float32); what
          was there is kept in memory until the change is undone.
Check:    undo restores every bit after any sequence of changes, also after an exception; tests/laws/test_change.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from microtome.change._delta import Delta, copied, norm_of, of_parts, parts_of, random_like
from microtome.change._weight import weight_at
from microtome.change._written import Kept, restore, trying, uninterrupted, write, writing
from microtome.edit import Edit, load_edits, unshared
from microtome.errors import ArgumentError, DataError, EditError, error
from microtome.files import atomic
from microtome.model import Model
from microtome.run.hook import lock_of
from microtome.shown import shown

FORMAT = 1


@shown
@dataclass(frozen=True, eq=False)
class Step:
    """One set of weights that changes at once.

    Attributes:
        deltas: by address of the weight, see `mt.change.weight_at`.
        method: what made it.
        reason: why, in a sentence.
        parameters: with which it was made, as plain values.
        seed: of what was drawn for it.
        before: fingerprint of the model that it is for.
        after: that of the model that it gives.
    """

    deltas: Mapping[str, Delta]
    method: str
    reason: str
    parameters: Mapping[str, Any]
    seed: int | None
    before: str
    after: str


@dataclass
class _Applied:
    """A change that a model has now, and what its weights were."""

    change: Change
    kept: Kept


_LEDGER: WeakKeyDictionary[nn.Module, list[_Applied]] = WeakKeyDictionary()


@shown
@dataclass(frozen=True, eq=False)
class Change:
    """A change of a model's weights.

    Attributes:
        steps: what is done, in order.
        model: name of the model that it is for.

    >>> change = mt.change.of(model, {"12.W_out[431]": -model.layers[12].W_out[431:432]}, reason="without neuron 431")
    >>> with change.applied(model):
    ...     model.generate("The capital of France is")
    """

    steps: tuple[Step, ...]
    model: str = field(default="")

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def before(self) -> str:
        """Fingerprint of the model that it is for."""
        return self.steps[0].before

    @property
    def after(self) -> str:
        """Fingerprint of the model that it gives."""
        return self.steps[-1].after

    @property
    def weights(self) -> list[str]:
        """The addresses of the weights that change."""
        return list(dict.fromkeys(name for step in self.steps for name in step.deltas))

    def then(self, other: Change) -> Change:
        """This change, and then another.

        Raises:
            EditError: the other is for another model than this one gives.
        """
        if other.before != self.after:
            got, allowed = f"a change for {other.before}", f"one for {self.after}, which the first gives"
            what, do = "the changes do not follow on each other", "make it with the first applied"
            raise error(EditError, what, got=got, allowed=allowed, do=do)
        return Change((*self.steps, *other.steps), self.model)

    def apply(self, model: Model) -> None:
        """Change the model, until it is undone.

        Raises:
            EditError: it is for another model, or this one has changed since; the model is as it was.
            SiteError: a weight is not there.
        """
        self._require(model)
        with writing(model) as kept:
            for step in self.steps:
                write(model, step.deltas, kept)
            if (found := model.fingerprint) != self.after:
                raise error(EditError, "the change gives other weights here than where it was made", got=found,
                            allowed=self.after, do="make it again on this machine")  # fmt: skip
            _LEDGER.setdefault(model.hf, []).append(_Applied(self, kept))

    def undo(self, model: Model) -> None:
        """Give the model the weights back that it had before this change, bit for bit.

        Raises:
            EditError: it is not the change that was applied last, or the weights were written to since.
        """
        done = _LEDGER.get(model.hf, [])
        numbers = [i for i, one in enumerate(done) if one.change is self]
        if not numbers:
            raise error(EditError, "this change is not applied to this model", do="undo what was applied to it here")
        if numbers[-1] != len(done) - 1:
            last = [one.change.steps[-1] for one in done[numbers[-1] + 1 :]]
            later = ", ".join(step.reason or step.method for step in last)
            raise error(EditError, "another change was applied after this one", got=later, do="undo that one first")
        if (found := model.fingerprint) != self.after:
            raise error(EditError, "the weights were written to since the change was applied", got=found,
                        allowed=self.after, do="undo what else was done, or open the model again")  # fmt: skip
        _unwind(model, len(done) - 1)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """Change the model within a block; its weights are restored bit for bit, also after an exception.

        Changes that are applied inside and not undone there are undone too.

        Raises:
            EditError: it is for another model, or weights were written to inside that no change is known of.
        """
        depth = len(_LEDGER.get(model.hf, []))
        try:
            self.apply(model)
            yield model
        except BaseException:
            _unwind(model, depth)
            raise
        _unwind(model, depth)
        if (found := model.fingerprint) != self.before:
            raise error(EditError, "weights were written to inside the block, by no change", got=found,
                        allowed=self.before, do="make them changes, or open the model again")  # fmt: skip

    def random(self, model: Model, seed: int = 0) -> Change:
        """A random change of the same weights, each by a sum of the same norm and rank: a control.

        Raises:
            EditError: the model is not the one that the change is for.
        """
        self._require(model)
        generator, found = torch.Generator().manual_seed(seed), list[Step]()
        with trying(model) as kept:
            for step in self.steps:
                drawn = {name: random_like(weight_at(model, name), d, generator) for name, d in step.deltas.items()}
                reason = f"a control of: {step.reason or step.method}"
                found.append(_step(model, drawn, kept, method="random", reason=reason, seed=seed))
        return Change(tuple(found), self.model)

    def norms(self, model: Model) -> xr.Dataset:
        """Frobenius norms over weights: of what is added, of what was there, and their ratio.

        Raises:
            EditError: the model is not the one that the change is for.
        """
        self._require(model)
        rows: list[tuple[str, float, float]] = []
        with trying(model) as kept:
            for step in self.steps:
                for name, delta in step.deltas.items():
                    weight = weight_at(model, name)
                    rows.append((name, norm_of(weight, delta), float(weight.read().double().norm())))
                write(model, step.deltas, kept)
        added, there = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (1, 2))
        columns = {"added": added, "weight": there, "share": added / there}
        return xr.Dataset({k: ("weight_name", v.numpy()) for k, v in columns.items()},
                          coords={"weight_name": [row[0] for row in rows]}, attrs=model.provenance)  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file, with all but the tensors as JSON in its metadata.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        listing: list[dict[str, Any]] = []
        for i, step in enumerate(self.steps):
            for name, delta in step.deltas.items():
                tensors |= {f"{i}/{name}/{part}": x for part, x in parts_of(delta).items()}
            listing.append({
                "weights": list(step.deltas), "method": step.method, "reason": step.reason,
                "parameters": dict(step.parameters), "seed": step.seed, "before": step.before, "after": step.after,
            })  # fmt: skip
        record = json.dumps({"format": FORMAT, "model": self.model, "steps": listing})
        with atomic(path, "the change to") as partial:
            save_file(unshared(tensors), partial, metadata={"change": record})

    def _require(self, model: Model) -> None:
        """Refuse a model that it is not for.

        Raises:
            EditError: it is not.
        """
        if (own := model.provenance["fingerprint"]) == self.before:
            return
        done = any(one.change is self for one in _LEDGER.get(model.hf, []))
        got, do = f"{model.anatomy.name} ({own})", "open the model that it was made for"
        if done:
            got, do = f"{got}, to which it is applied already", "undo it first"
        raise error(EditError, "the change is for another model or another state of it", got=got,
                    allowed=f"{self.model} ({self.before})", do=do)  # fmt: skip


def of(
    model: Model, deltas: Mapping[str, Delta], *, reason: str = "", method: str = "given",
    parameters: Mapping[str, Any] | None = None, seed: int | None = None,
) -> Change:  # fmt: skip
    """A change of a model as it is now; the model is unchanged.

    Args:
        model: an open model.
        deltas: by address of a weight (see `mt.change.weight_at`) what is added to it, a tensor or a `LowRank`; or
            `Values` that it takes.
        reason: why, in a sentence.
        method: what made it.
        parameters: with which it was made, as plain values.
        seed: of what was drawn for it.

    Returns:
        A `Change`.

    Raises:
        SiteError: there is no such weight, or it cannot be written.
        ArgumentError: nothing changes, a delta does not fit its weight or is not finite, or the parameters are no
            plain values.
    """
    if not deltas:
        raise error(ArgumentError, "a change needs at least one weight", do="name one, such as 12.W_out")
    try:
        json.dumps(dict(parameters or {}))
    except TypeError as problem:
        raise error(ArgumentError, "the parameters of a change must be plain values", got=str(problem),
                    do="give numbers, texts and lists of them") from None  # fmt: skip
    with trying(model) as kept:
        made = _step(model, deltas, kept, method=method, reason=reason, seed=seed, parameters=parameters)
    return Change((made,), model.anatomy.name)


def _step(
    model: Model, deltas: Mapping[str, Delta], kept: Kept, *, method: str, reason: str, seed: int | None,
    parameters: Mapping[str, Any] | None = None,
) -> Step:  # fmt: skip
    """A step of a model as it is now, which has it afterwards."""
    before, own = model.provenance["fingerprint"], {name: copied(delta) for name, delta in deltas.items()}
    write(model, own, kept)
    return Step(own, method, reason, dict(parameters or {}), seed, before, model.fingerprint)


def _unwind(model: Model, depth: int) -> None:
    """Undo the changes of a model beyond the first so many, the last first."""
    done = _LEDGER.get(model.hf, [])
    with lock_of(model.hf).take(()), uninterrupted():
        while len(done) > depth:
            restore(model, done[-1].kept)
            done.pop()


def read(path: str | os.PathLike[str]) -> Change | list[Edit]:
    """Read a change or edits, whichever the file holds.

    Raises:
        DataError: it is missing, damaged, or holds neither.
    """
    try:
        with safe_open(str(path), "pt") as file:
            held = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as problem:
        what = f"cannot read a change or edits from {path}"
        raise error(DataError, what, got=str(problem), do="name a file that was saved") from problem
    if not held.keys() & {"change", "edits"}:
        raise error(DataError, f"{path} holds neither a change nor edits", do="name a file that was saved")
    return load(path) if "change" in held else load_edits(Path(path))


def applied_to(model: Model) -> list[Change]:
    """The changes that a model has now, in the order in which they were applied."""
    return [one.change for one in _LEDGER.get(model.hf, [])]


def load(path: str | os.PathLike[str]) -> Change:
    """Read a change that `Change.save` wrote.

    Raises:
        DataError: the file is missing, damaged, of a newer version, or holds no change.
    """
    try:
        with safe_open(str(path), "pt") as file:
            record = json.loads((file.metadata() or {}).get("change", "null"))
            if record is None:
                raise ValueError("a file without a change")
            if record["format"] > FORMAT:
                raise ValueError(f"a change of version {record['format']}, and this Microtome reads {FORMAT}")
            names, steps = list(file.keys()), list[Step]()
            for i, entry in enumerate(record["steps"]):
                deltas: dict[str, Delta] = {}
                for name in entry.pop("weights"):
                    start = f"{i}/{name}/"
                    deltas[name] = of_parts({n[len(start) :]: file.get_tensor(n) for n in names if n.startswith(start)})
                steps.append(Step(deltas, **entry))
            return Change(tuple(steps), record["model"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise error(DataError, f"cannot read a change from {path}", got=str(problem), do="save it again") from problem
