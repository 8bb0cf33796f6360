"""One run: sites captured, edits done, and whatever could not happen in it refused."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import torch

from microtome.anatomy import Address, Anatomy, Site, integer, parse, parse_indices
from microtome.edit import Edit, Repeat, ScaleBlock, SiteEdit, Skip
from microtome.errors import EditError, SiteError, error
from microtome.run._batch import Batch, Prompt
from microtome.run._core import LoadedModel
from microtome.run._plan import plan_of, refuse_if_over
from microtome.run._result import Run
from microtome.run._session import Observer, PromptFrame, Session, Stop
from microtome.run.hook._lock import lock_of

Capture = str | Address | Sequence[str | Address]


def addresses(capture: Capture) -> list[Address]:
    """The parsed addresses of what to capture."""
    items: Any = [capture] if isinstance(capture, str | Address) else capture
    wrong = next((i for i in items if not isinstance(i, str | Address)), None) if isinstance(items, Iterable) else items
    if wrong is not None or not isinstance(items, Iterable):
        raise error(
            SiteError,
            "cannot capture this",
            got=f"{wrong!r}",
            allowed="an address, or a list of addresses",
            do='name a site, such as "*.mlp.post"',
        )
    return [parse(item) for item in items]


def edits_of(edits: Any) -> list[Edit]:
    """The edits of a run: one alone, or several.

    Raises:
        EditError: something else was given.
    """
    items: Any = [edits] if isinstance(edits, Edit | str) or not isinstance(edits, Iterable) else list(edits)
    wrong = [item for item in items if not isinstance(item, Edit)]
    if wrong:
        raise error(
            EditError,
            "not an edit",
            got=repr(wrong[0]),
            allowed="an edit of microtome, or a list of them",
            do='give one, such as Zero("0.mlp_out")',
        )
    return items


def run_forward(
    model: LoadedModel,
    prompt: Prompt,
    capture: Capture = (),
    edits: Edit | Sequence[Edit] = (),
    *,
    stop_at: int | None = None,
    logits: bool = True,
    grad: bool = False,
    padding: Literal["left", "right"] = "right",
    observe: Mapping[str, Observer] | None = None,
    budget: int | None = None,
    strict: bool = True,
) -> Run:
    """Run a model once, see `Model.run`; `strict=False` lets pass what was named and never reached."""
    batch, captures, edits = model.to_batch(prompt, padding), addresses(capture), edits_of(edits)
    _refuse_no_layer(model, stop_at)
    logits = logits and stop_at is None
    watchers = _watchers(observe)
    _refuse_beyond(model, [*captures, *watchers], edits, stop_at, logits)
    plan = plan_of(model, batch, captures, logits=logits, grad=grad, pace=model.pace)
    refuse_if_over(plan, budget, model.device)
    frame = PromptFrame(batch)
    session = Session(model.hf, model.anatomy, frame, edits=edits, captures=captures, observers=watchers, grad=grad)
    for address in captures:
        frame.columns(address.positions)
    _end(model, session, stop_at, logits)
    output = _forward(model, session, batch, edits, grad)
    if strict:
        _refuse_idle(session, [*captures, *watchers])
    captured, nodes = session.take()
    given = None if output is None else output.logits
    return Run(model.anatomy, batch, given, captured, nodes, model.to_words, model.provenance)


def _refuse_no_layer(model: LoadedModel, stop_at: int | None) -> None:
    """Refuse to stop where there is no layer.

    Raises:
        SiteError: it is not the number of one.
    """
    try:
        found = stop_at is None or 0 <= integer(stop_at) < model.anatomy.n_layers
    except TypeError:
        found = False
    if not found:
        raise error(
            SiteError,
            f"cannot stop at layer {stop_at!r} of {model.anatomy.name}",
            allowed=f"0 to {model.anatomy.n_layers - 1}",
            do="choose a layer of the model",
        )


def _watchers(observe: Any) -> dict[Address, Observer]:
    """What is to be called at each address.

    Raises:
        SiteError: it is no mapping from addresses to functions.
    """
    given: Any = {} if observe is None else observe
    if not isinstance(given, Mapping) or not all(map(callable, given.values())):
        raise error(
            SiteError,
            "cannot observe this",
            got=f"{given!r}",
            allowed="a mapping from addresses to functions",
            do='write observe={"0.mlp_out": function}',
        )
    return {parse(address): function for address, function in given.items()}


def _end(model: LoadedModel, session: Session, stop_at: int | None, logits: bool) -> None:
    def stop(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Stop

    if stop_at is not None:
        session.hooks.before(model.anatomy.parts.layers[stop_at].block, stop)
    elif not logits:
        session.hooks.before(model.anatomy.parts.unembedding, stop)


def _forward(model: LoadedModel, session: Session, batch: Batch, edits: Sequence[Edit], grad: bool) -> Any:
    a = model.anatomy
    takes_positions = "position_ids" in signature(type(model.hf).forward).parameters
    inputs: dict[str, Any] = dict(batch.inputs(takes_positions, a.first_position))
    # Skipped and repeated blocks would leave holes in a cache; otherwise the model runs as it does for anyone.
    uncached = any(isinstance(edit, Skip | Repeat) for edit in (*edits, *lock_of(model.hf).active_edits))
    if uncached and a.causal:
        inputs["use_cache"] = False
    with torch.set_grad_enabled(grad), session.hooks:
        started = time.perf_counter()
        try:
            output = model.hf(**inputs)
        except Stop:
            return None
    took = time.perf_counter() - started
    model.pace = plan_of(model, batch, [], logits=True, grad=False, pace=1.0).seconds / took
    return output


def _refuse_beyond(
    model: LoadedModel, seen: Sequence[Address], edits: Sequence[Edit], stop_at: int | None, logits: bool
) -> None:
    """Refuse what lies behind the end of a run that ends early.

    Raises:
        SiteError: a capture, or something observed, does.
        EditError: an edit does.
    """
    if logits:
        return
    a = model.anatomy
    where = "the unembedding" if stop_at is None else f"layer {stop_at}"

    def reached(site: Site) -> bool:
        if stop_at is None:
            return site.name != "logits"
        if site.layer is None:
            return site.name == "embed"
        return site.layer < stop_at or (site.layer == stop_at and site.name == "resid_pre")

    for address in seen:
        if not _enough(a, address, {s for s in a.sites(address) if reached(s)}):
            raise error(
                SiteError, f'"{address}" is never reached: the run ends before {where}', do="let it run further"
            )
    for edit in edits:
        if isinstance(edit, SiteEdit):
            acts = _enough(a, edit.address, {s for s in a.sites(edit.address) if reached(s)})
        elif isinstance(edit, Skip | Repeat | ScaleBlock):
            layers = parse_indices(edit.layers, "layers")
            first = min(layers.resolve(a.n_layers) or (0,))
            acts = stop_at is None or first < stop_at
        else:
            acts = True
        if not acts:
            raise error(EditError, f"{edit!r} can never act: the run ends before {where}", do="let it run further")


def _enough(anatomy: Anatomy, address: Address, reached: set[Site]) -> bool:
    """Whether a run that reached some sites of an address did what it says: all that are named, or any of ``*``."""
    named = address.layers is None or not address.layers.is_all
    here = reached.intersection(anatomy.sites(address))
    return bool(here) and (not named or len(here) == len(set(anatomy.sites(address))))


def _refuse_idle(session: Session, seen: Sequence[Address]) -> None:
    """Refuse what was named and never came by, such as sites inside a block that was skipped.

    Raises:
        SiteError: a capture, or something observed, did not.
        EditError: an edit did not.
    """
    for address in seen:
        if not _enough(session.anatomy, address, session.visited):
            raise error(
                SiteError,
                f'this run never reached "{address}"',
                do="do not skip its layer, or look at a site before or after it",
            )
    for edit in session.site_edits:
        acted = {site for number, site in session.fired if number == id(edit)}
        if not _enough(session.anatomy, edit.address, acted):
            raise error(
                EditError, f"{edit!r} never acted in this run", do="do not skip its layer, or name another site"
            )
