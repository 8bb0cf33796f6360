"""The illusion of a direction: its effect when patched, and that of its parts, of which the reader sees only one.

Formula:  with R an orthonormal basis of the row space of the matrix that reads the site (W_out, or W_O of a head),
          row = R Rᵀ v,  null = v - row, both made orthonormal again; a part's effect is the change of
          logit(label) - logit(own) when base + (source - base) P replaces base, P the projection on that part.
          The null part changes nothing that is read, so that its effect is 0 exactly. The illusion: the whole has a
          large effect, its row part alone a small one, since the whole carries along what the null part measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval
from microtome.subspaces._reader import divided, reader
from microtome.subspaces._score import ENDS, by_entity, projection
from microtome.subspaces._subspace import Subspace
from microtome.subspaces._swaps import Swaps, require_swaps
from microtome.subspaces._ways import Exchange, Plan, found_in, prepared, random_basis
from microtome.tasks import Task

PARTS = ("whole", "row", "null", "component", "random")


@question(
    "split_direction",
    title="a direction and what of it is read",
    question="Does a direction carry its effect itself, or does it only carry along what nothing reads?",
    columns=(
        Column("effect", "logits", "change of the logit of the label minus that of the base's own answer, by the part "
               "of the direction that is patched", "none: the rows component (all of the site) and random (a random "
               "subspace of the same rank)", dims=("part",)),
        Column("accuracy", "share", "of swaps after which the model says the label", "none: the rows component and "
               "random", (0, 1), dims=("part",)),
        Column("norm", "share", "of the direction's squared length that lies in the part", "none: whole is 1", (0, 1),
               dims=("part",)),
    ),
    source=Source(
        "Makelov et al.", "Is This the Subspace You Are Looking for? An Interpretability Illusion for Subspace "
        "Activation Patching", 2023, "2311.17030", "section 3",
        departs="subspaces of any rank; the parts are normalised before they are patched, as the direction is",
    ),
    cost="a forward of every prompt, and five of every swap from the site's layer on; without a direction also a "
    "training of rank 1",
    check="tests/planted/test_subspaces.py",
    call='mt.subspaces.split_direction(model, mt.tasks.build("gendered_pronoun", model), "12.mlp.post")',
    reading="An effect of `whole` far above that of `row` means that the direction owes it to what nothing reads: the "
    "illusion. A direction that the model uses keeps its effect in `row`. `null` is 0 by necessity.",
    needs="next token",
)  # fmt: skip
def split_direction(
    model: Model,
    swaps: Annotated[Swaps | Task, Argument("interchanges, or a task of pairs", command=False)],
    site: Annotated[str, Argument('the site, such as "12.mlp.post" or "12.attn.z[3]"')],
    direction: Annotated[
        Tensor | Subspace | None,
        Argument("the direction or subspace; by default the one that DAS finds with the first half", command=False),
    ] = None,
    *,
    at: Annotated[str, Argument("of a task: span whose last token is the place", from_text=str)] = "end",
    rank: Annotated[int, Argument("of what DAS finds", "dimensions", least=1)] = 1,
    steps: Annotated[int, Argument("of its training", "steps", least=0)] = 200,
    lr: Annotated[float, Argument("of its training", least=0)] = 0.01,
) -> Found:
    """Effects of a direction, of its part in the row space of what reads the site, and of its part in the null space.

    Raises:
        SiteError: several matrices, or none, read the site.
        ArgumentError: the direction is not as wide as the site, is 0, or is of another model, or these are no swaps.
        PromptError: the model answers none of the prompts.
    """
    rows = reader(model, site)
    told = Swaps.of_pairs(swaps, at) if isinstance(swaps, Task) else require_swaps(swaps)
    half = len(told) // 2 if direction is None else 0
    ready, known = prepared(model, told[half:], site)
    subspace = _given(model, site, direction)
    if subspace is None:
        train, share = prepared(model, told[:half], site)
        subspace = found_in(train, "das", Plan(rank, 0.0, steps, lr, seed=current().seed), share, given_lr=lr)
    parts = divided(subspace, rows)
    inside = float((subspace.basis @ rows.T).square().sum()) / subspace.rank
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "whole": projection(subspace.basis), "row": projection(parts["row"]), "null": projection(parts["null"]),
        "component": lambda x: x,
        "random": projection(random_basis(subspace.width, subspace.rank, current().seed)),
    }  # fmt: skip
    found = {name: _effect(ready, part, name) for name, part in ways.items()}
    dims, values = ("part",), dict[str, tuple[tuple[str, ...], Tensor]]()
    for k, column in enumerate(("effect", "accuracy")):
        for e, end in enumerate(ENDS):
            values[column + end] = (dims, torch.stack([found[name][k][e] for name in PARTS]))
    norms = [1.0, inside, 1 - inside, torch.nan, torch.nan]
    return Found(
        values | {"norm": (dims, torch.tensor(norms, dtype=torch.float64))}, coords={"part": list(PARTS)},
        attrs={"site": site, "rank": subspace.rank, "found_by": subspace.method, "swaps": len(ready), "known": known,
               "reader_rank": len(rows), "width": subspace.width},
    )  # fmt: skip


def _given(model: Model, site: str, direction: Tensor | Subspace | None) -> Subspace | None:
    """The subspace that was given.

    Raises:
        ArgumentError: it does not fit the site, has no dimension, or is of another model.
    """
    if direction is None:
        return None
    found = direction if isinstance(direction, Subspace) else Subspace.of(model, site, direction)
    found.require(model)
    if found.site != site:
        raise error(ArgumentError, "the subspace is of another site", got=found.site, allowed=site, do="name its site")
    if not found.rank:
        raise error(ArgumentError, "a direction of length 0 has no parts", do="give another")
    return found


def _effect(ready: Exchange, part: Callable[[Tensor], Tensor], name: str) -> tuple[tuple[Tensor, ...], ...]:
    """The mean change of the logit difference and the accuracy of a part, with the ends of their intervals."""
    before, _ = _read(ready, torch.zeros_like, "unpatched")
    after, hits = _read(ready, part, name)
    both = (by_entity(ready, x, "cause") for x in (after - before, hits))
    return tuple(mean_interval(torch.tensor(list(x.values()), dtype=torch.float64)) for x in both)


def _read(ready: Exchange, part: Callable[[Tensor], Tensor], name: str) -> tuple[Float[Tensor, " swap"], ...]:
    """logit(label) - logit(own) of each swap, and whether the label is reached."""
    said, gaps = ready.gaps(part, stage=f"patching {name}")
    return gaps, ready.reached(said, gaps)
