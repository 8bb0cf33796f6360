"""Cause and Isolate of a subspace by held-out interchanges, and the controls that they stand beside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.model import Model
from microtome.model import open as open_model
from microtome.stream import difference_interval, mean_interval
from microtome.subspaces._exchange import Exchange
from microtome.subspaces._reader import divided, has_reader, reader, row_share
from microtome.subspaces._subspace import Subspace
from microtome.subspaces._swaps import Swaps, Wants

SCORES = ("cause", "isolate", "disentangle")
ENDS = ("", "_lo", "_hi")
NOTHING = (torch.nan,) * 3
PLAIN = ("rank", "row_share", "cause_row", "cause_null")


def projection(basis: Float[Tensor, "rank d"]) -> Callable[[Tensor], Tensor]:
    """The function that gives the part of vectors in the span of an orthonormal basis."""

    def part(x: Tensor) -> Tensor:
        q = basis.to(device=x.device, dtype=x.dtype)
        return (x @ q.T) @ q

    return part


def scores(test: Exchange, subspace: Subspace, stage: str = "judging") -> dict[str, float]:
    """Cause, isolate and disentangle with the ends of their intervals over entities, rank, and what is read of it.

    NaN where no swap wants the one or the other.
    """
    found = over_entities(test, test.hits(subspace, stage=stage))
    found |= {"rank": float(subspace.rank)} | dict.fromkeys(PLAIN[1:], torch.nan)
    if has_reader(subspace.site) and subspace.rank:
        found |= read_parts(test, subspace, stage)
    return found


def over_entities(test: Exchange, hits: Float[Tensor, " swap"]) -> dict[str, float]:
    """Cause, isolate and disentangle of hits, or of the differences of two ways' hits, with intervals over entities."""
    cause, isolate = (by_entity(test, hits, wants) for wants in ("cause", "isolate"))
    names = list(dict.fromkeys([*cause, *isolate]))
    sums = [torch.tensor([own.get(name, 0.0) for name in names], dtype=torch.float64) for own in (cause, isolate)]
    counts = [torch.tensor([float(name in own) for name in names], dtype=torch.float64) for own in (cause, isolate)]
    ends = {name: _mean(list(own.values())) for name, own in (("cause", cause), ("isolate", isolate))}
    ends["disentangle"] = NOTHING
    if cause and isolate:  # entities may have the one or the other alone: the mean of two means, jackknifed together
        both = difference_interval(sums[0] / 2, -sums[1] / 2, weights=counts[0], control_weights=counts[1])
        ends["disentangle"] = tuple(float(x) for x in both)
    return {f"{name}{end}": x for name, own in ends.items() for end, x in zip(ENDS, own, strict=True)}


def _mean(values: list[float]) -> tuple[float, ...]:
    """The mean and the ends of its interval; NaN where there is nothing."""
    if not values:
        return NOTHING
    return tuple(float(x) for x in mean_interval(torch.tensor(values, dtype=torch.float64)))


def read_parts(test: Exchange, subspace: Subspace, stage: str) -> dict[str, float]:
    """What of a subspace is read, and the cause of the two parts alone: the check against the illusion."""
    rows = reader(test.model, subspace.site)
    found = {"row_share": row_share(subspace, rows)}
    for name, part in parts_of(subspace, rows).items():
        hits = test.hits(part, stage=f"{stage}, {name} part")
        cause = by_entity(test, hits, "cause")
        found[f"cause_{name}"] = sum(cause.values()) / len(cause) if cause else torch.nan
    return found


def parts_of(subspace: Subspace, rows: Float[Tensor, "rank d"]) -> dict[str, Subspace]:
    """The parts of a subspace, or of the directions of its codes, in a row space and outside it."""
    if subspace.codes is None:
        return {name: replace(subspace, basis=basis) for name, basis in divided(subspace, rows).items()}
    directions = subspace.codes.directions
    inside = (directions @ rows.T) @ rows
    parts = {"row": inside, "null": directions - inside}
    return {name: replace(subspace, codes=replace(subspace.codes, directions=x)) for name, x in parts.items()}


def by_entity(ready: Exchange, hits: Float[Tensor, " swap"], wants: Wants) -> dict[str, float]:
    """By entity, the mean over its swaps that want the one or the other."""
    held: dict[str, list[float]] = {}
    for swap, hit in zip(ready.swaps, hits.tolist(), strict=True):
        if swap.wants == wants:
            held.setdefault(swap.entity, []).append(hit)
    return {name: sum(own) / len(own) for name, own in held.items()}


def placebo(ready: Exchange, seed: int, labels: Sequence[int] | None = None) -> Exchange:
    """The same swaps with labels that mean nothing, of some or of their own."""
    return ready.with_swaps(Swaps(ready.swaps).placebo(seed, labels).swaps)


def twin(model: Model, seed: int) -> Model:
    """The same model with the entries of every matrix shuffled: sizes and distributions stay, what it learned goes."""
    hf = copy.deepcopy(model.hf)
    rng = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1 and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                order = torch.randperm(parameter.numel(), generator=rng).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return open_model(hf, tokenizer=model.tokenizer)
