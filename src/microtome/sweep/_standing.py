"""What every row of a sweep begins with: the edits of `editing`, before those of its cell, and another first stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from microtome.edit import Add, Apply, Edit, Mean, SiteEdit
from microtome.errors import EditError, error
from microtome.run import Batch, LoadedModel
from microtome.sweep._pass import source_rows


def standing_of(active: Sequence[Edit], *, edges: bool) -> tuple[SiteEdit, ...]:
    """The edits of `editing` that hold in every row of a sweep.

    Raises:
        EditError: a sweep cannot hold one of them, or edges cannot.
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
    if edges:
        _refuse_with_edges(found)
    return found


def _refuse_with_edges(standing: Sequence[SiteEdit]) -> None:
    """Refuse edits under which a branch cannot be run by itself.

    Raises:
        EditError: one changes what a norm divides by, or takes from a run of several prompts.
    """
    for edit in standing:
        name = edit.address.name
        why = "it changes what a norm divides by" if name.endswith(".scale") else ""
        why = "heads write what it changes" if name in ("attn_out", "attn.result") else why
        why = "it takes from a run of several rows" if (source_rows(edit) or 1) > 1 else why
        if why:
            what = f"edges cannot be swept inside `editing` of {edit!r}: {why}"
            raise error(EditError, what, do="leave this edit out")


STREAMS = ("resid_pre", "resid_mid", "resid_post")


def standing_in_circuits(active: Sequence[Edit]) -> tuple[SiteEdit, ...]:
    """The edits of `editing` that hold in every row of circuits: those inside of branches, and vectors on the stream.

    Raises:
        EditError: one cannot be held, as it makes the stream something else than a sum, or rows depend on each other.
    """
    found = standing_of(active, edges=True)
    for edit in found:
        why = ""
        if edit.rows is not None:
            why = "it names rows"
        elif isinstance(edit, Apply) or (isinstance(edit, Mean) and edit.mean is None):
            why = "what it does in one row may depend on others"
        elif edit.address.name in STREAMS and not isinstance(edit, Add):
            why = "it changes the sum that the stream is"
        elif edit.address.layers is None and edit.address.name != "embed":
            why = "it acts behind the layers"
        if why:
            raise error(
                EditError,
                f"circuits cannot be run inside `editing` of {edit!r}: {why}",
                allowed="edits inside of branches, and vectors added to the stream",
                do="leave this edit out",
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
