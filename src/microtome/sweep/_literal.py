"""A cell as a forward of its own: what a sweep does where its layers cannot run on a batch that grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Address
from microtome.edit import Frame, Set, SiteEdit
from microtome.errors import EditError, error
from microtome.run import LoadedModel, Session
from microtome.run.hook import HookSet, lock_of


def literal_logits(
    model: LoadedModel,
    tokens: Int[Tensor, "row pos"],
    edits: Sequence[SiteEdit] = (),
    *,
    prompt: int | None = None,
    standing: Sequence[SiteEdit] = (),
    start: Float[Tensor, "row pos d_model"] | None = None,
) -> Float[Tensor, "row pos vocab"]:
    """Logits of a prompt under the edits of one cell, or of several rows, as a run gives them.

    Args:
        model: the model.
        tokens: without pads.
        edits: the cell's, or those of all rows.
        prompt: the number of a prompt that is run alone: sources of edits hold a row for every prompt.
        standing: edits that come before those of the cell.
        start: what enters the first layer instead of its own.
    """
    rows, length = tokens.shape
    frame = Frame(((0, length),) * rows, length, source_row=prompt)
    first = [] if start is None else [Set("0.resid_pre", value=start)]
    session = Session(model.hf, model.anatomy, frame, edits=[*standing, *first, *edits])
    with torch.no_grad(), session.hooks, lock_of(model.hf).aside():
        return model.hf(input_ids=tokens).logits


def unreached_layers(model: LoadedModel, tokens: Int[Tensor, "one pos"]) -> frozenset[int]:
    """The layers that a forward over tokens passes by, such as those that read an image."""
    reached: set[int] = set()
    hooks = HookSet(model.hf, model.anatomy.attention, model.anatomy.n_heads)
    for i, layer in enumerate(model.anatomy.parts.layers):
        hooks.before(layer.block, lambda args, kwargs, i=i: reached.add(i))
    with torch.no_grad(), hooks, lock_of(model.hf).aside():
        model.hf(input_ids=tokens)
    return frozenset(range(model.anatomy.n_layers)) - reached


def refuse_unreached(model: LoadedModel, cells: Sequence[Sequence[SiteEdit]], unreached: frozenset[int]) -> None:
    """Refuse cells that act in a layer that no forward over tokens reaches, as a run does.

    Raises:
        EditError: one does.
    """
    for edit in (edit for cell in cells for edit in cell):
        sites = model.anatomy.sites(edit.address)
        never = [site for site in sites if site.layer in unreached]
        if never and (_names_layers(edit.address) or len(never) == len(sites)):
            raise error(
                EditError,
                f"{edit!r} never acts: a forward over tokens passes layer {never[0].layer} by",
                allowed=f"layers {', '.join(str(i) for i in range(model.anatomy.n_layers) if i not in unreached)}",
                do="leave the cells of this layer out",
            )


def _names_layers(address: Address) -> bool:
    return address.layers is not None and not address.layers.is_all
