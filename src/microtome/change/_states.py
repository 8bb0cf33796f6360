"""A model before a change, after it, and after a random change of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.change._change import Change, of, read
from microtome.change._delta import Values
from microtome.edit import Add, Edit
from microtome.errors import ArgumentError, error
from microtome.model import Model
from microtome.model import open as open_model


@dataclass(frozen=True)
class State:
    """One of the models that are assessed.

    Attributes:
        name: "before", "after" or "random".
        entered: gives the model within a block.
    """

    name: str
    entered: Callable[[], AbstractContextManager[Model]]


def states_of(model: Model, after: Any, seed: int) -> tuple[list[State], str]:
    """The model before and after, with the control where there is one, and what the control is.

    Args:
        model: before.
        after: a `Change`, edits, another model, or the path of any of them.
        seed: of the random change.

    Raises:
        ArgumentError: it is none of these, or a model whose tokens are others.
        EditError: a change for another model.
    """
    given = _read(model, after)
    first = State("before", lambda: nullcontext(model))
    if isinstance(given, Change):
        drawn = given.random(model, seed)
        control = State("random", lambda: drawn.applied(model))
        return [first, State("after", lambda: given.applied(model)), control], "a random change of equal norm and rank"
    if isinstance(given, list):
        edits: list[Edit] = given
        second = State("after", lambda: model.editing(*edits))
        other = _random_edits(edits, seed)
        if other is None:
            return [first, second], "none: no random edit of equal size is known for these edits"
        return [first, second, State("random", lambda: model.editing(*other))], "random vectors of equal norm"
    own: Model = given
    if own.anatomy.d_vocab != model.anatomy.d_vocab:
        raise error(ArgumentError, f"{own.anatomy.name} has other tokens than {model.anatomy.name}",
                    got=f"{own.anatomy.d_vocab} tokens", allowed=f"{model.anatomy.d_vocab}",
                    do="compare models of one tokenizer")  # fmt: skip
    second = State("after", lambda: nullcontext(own))
    change = _between(model, own)
    if change is None:
        return [first, second], "none: the models have other parameters"
    drawn = change.random(model, seed)
    return [first, second, State("random", lambda: drawn.applied(model))], "a random change of equal norm"


def _read(model: Model, after: Any) -> Change | list[Edit] | Model:
    """What is assessed, read from its file where it is a path."""
    if isinstance(after, Change | Model):
        return after
    if isinstance(after, Edit):
        return [after]
    if isinstance(after, Sequence) and not isinstance(after, str):
        listed: list[Any] = list(after)
        if listed and all(isinstance(one, Edit) for one in listed):
            return listed
    if isinstance(after, str | Path):
        if Path(after).suffix == ".safetensors":
            return read(after)
        return open_model(str(after), dtype=model.dtype, device=model.device)
    raise error(ArgumentError, "this cannot be assessed", got=type(after).__name__,
                allowed="a Change, edits, a Model, or the path of one of them", do="give one of these")  # fmt: skip


def _random_edits(edits: Sequence[Edit], seed: int) -> list[Edit] | None:
    """Additions of random vectors of the same norms; None where an edit adds nothing."""
    generator, found = torch.Generator().manual_seed(seed), list[Edit]()
    for edit in edits:
        if not isinstance(edit, Add) or not isinstance(edit.value, Tensor):
            return None
        drawn = torch.randn(edit.value.shape, generator=generator)
        norms = [x.norm(dim=-1, keepdim=True) for x in (edit.value.float().cpu(), drawn)]
        found.append(replace(edit, value=(drawn * norms[0] / norms[1]).to(edit.value)))
    return found


def _between(model: Model, other: Model) -> Change | None:
    """The change from one model to another of the same parameters; None where they are none of one shape."""
    if other is model:
        return of(model, _some(model), reason="nothing")
    own, its = dict(model.hf.named_parameters()), dict(other.hf.named_parameters())
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in its.items()}:
        return None
    moved = {n: Values(p.detach()) for n, p in its.items() if not torch.equal(p.to(own[n]), own[n])}
    return of(model, moved or _some(model), reason="another model")


def _some(model: Model) -> dict[str, Any]:
    """A change of nothing."""
    name, parameter = next(iter(model.hf.named_parameters()))
    return {name: torch.zeros(parameter.shape)}
