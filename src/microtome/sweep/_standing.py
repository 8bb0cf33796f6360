"""What every row of a sweep begins with: the edits of `editing`, before those of its cell, and another first stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from microtome.edit import Edit, SiteEdit
from microtome.errors import EditError, error
from microtome.run import Batch, LoadedModel


def standing_of(active: Sequence[Edit], *, edges: bool) -> tuple[SiteEdit, ...]:
    """The edits of `editing` that hold in every row of a sweep.

    Raises:
        EditError: a sweep cannot hold one of them, or they meet edges.
    """
    found = tuple(edit for edit in active if isinstance(edit, SiteEdit))
    wrong = next((edit for edit in active if not isinstance(edit, SiteEdit)), None)
    if wrong is not None:
        raise error(
            EditError,
            "a sweep inside `editing` cannot hold this edit in its rows",
            got=repr(wrong),
            allowed="edits of sites",
            do="run the cells one by one with model.run",
        )
    if found and edges:
        raise error(
            EditError,
            "a sweep of edges cannot run inside `editing`: an edge is the difference of two unedited runs",
            got=", ".join(map(repr, found)),
            do="leave the `editing` block",
        )
    return found


def refuse_other_edits(now: Sequence[Edit], prepared: Sequence[Edit]) -> None:
    """Refuse to run a sweep under other edits than those under which it was prepared.

    Raises:
        EditError: they are others.
    """
    if [*map(id, now)] != [*map(id, prepared)]:
        raise error(
            EditError,
            "a sweep must run under the edits of `editing` under which it was prepared",
            got=", ".join(map(repr, now)) or "none",
            allowed=", ".join(map(repr, prepared)) or "none",
            do="prepare it again: model.sweep(...)",
        )


def refuse_unfit_start(model: LoadedModel, batch: Batch, start: Tensor | None) -> None:
    """Refuse a stream to start with that is not one of every prompt, all of one length."""
    wanted = [len(batch.lengths), max(batch.lengths), model.anatomy.d_model]
    got = list(start.shape) if isinstance(start, Tensor) else type(start).__name__
    if start is not None and (got != wanted or len(set(batch.lengths)) > 1):
        what, do = "the stream that prompts start with must be [prompt, pos, d_model]", "start prompts of one length"
        raise error(EditError, what, got=got, allowed=str(wanted), do=do)


def refuse_apart(model: LoadedModel) -> None:
    """Refuse to run cells as rows of one batch where rows change each other.

    Raises:
        EditError: they do, in a model whose layers round what they read.
    """
    if model.anatomy.rows_interact:
        raise error(
            EditError,
            f"cells of a sweep of {model.anatomy.name} would change each other",
            got=model.anatomy.rows_interact,
            do="run the cells one by one with model.run, or open the model that is not quantised",
        )
