"""One run: sites captured, edits applied, and requests that it could not fulfil refused."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from traceback import walk_tb
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import Address, Anatomy, Site, integer, parse, parse_indices
from microtome.edit import Edit, Repeat, ScaleBlock, Set, SiteEdit, Skip
from microtome.errors import EditError, MicrotomeError, SiteError, error
from microtome.run._batch import Batch, Prompt
from microtome.run._core import LoadedModel
from microtome.run._plan import plan_of, refuse_if_over
from microtome.run._result import Run
from microtome.run._session import Observer, Session, Stop
from microtome.run.hook._lock import lock_of

Capture = str | Address | Iterable[str | Address]


def addresses(capture: Capture) -> list[Address]:
    """The parsed addresses of what to capture."""
    items = _listed(capture)
    wrong = [item for item in items if not isinstance(item, str | Address)]
    if wrong:
        raise error(
            SiteError,
            "cannot capture this",
            got=f"{wrong[0]!r}",
            allowed="an address, or a list of addresses",
            do='name a site, such as "*.mlp.post"',
        )
    return [parse(item) for item in items]


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | Address) or not isinstance(given, Iterable) else list(given)


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
    edits: Edit | Iterable[Edit] = (),
    *,
    start_at: int | None = None,
    given: Tensor | None = None,
    stop_at: int | None = None,
    logits: bool = True,
    grad: bool = False,
    padding: Literal["left", "right"] = "right",
    observe: Mapping[str, Observer] | None = None,
    budget: int | None = None,
    strict: bool = True,
) -> Run:
    """Run a model once, see `Model.run`; `strict=False` accepts addresses and edits that are never reached."""
    model.require_mapped()
    batch, captures, edits = model.to_batch(prompt, padding), addresses(capture), edits_of(edits)
    extent = _Extent(model.anatomy, start_at, stop_at, logits)
    logits = extent.logits
    watchers = _watchers(observe)
    extent.refuse_outside([*captures, *watchers], edits)
    edits = [*_start(model, batch, start_at, given), *edits]
    plan = plan_of(model, batch, captures, logits=logits, grad=grad, pace=model.pace)
    refuse_if_over(plan, budget, model.device)
    session = Session(
        model.hf, model.anatomy, batch.frame, edits=edits, captures=captures, observers=watchers, grad=grad,
        first=start_at or 0,
    )  # fmt: skip
    for address in captures:
        batch.frame.columns_of(address.positions)
    _end(model, session, stop_at, logits, edits)
    output = _forward(model, session, batch, edits, grad)
    if strict:
        _refuse_idle(session, [*captures, *watchers])
    captured, nodes = session.take()
    given = None if output is None else output.logits
    return Run(model.anatomy, batch, given, captured, nodes, model.to_words, model.provenance)


@dataclass
class _Extent:
    """The part of a forward that is computed: from layer `start_at` on, up to layer `stop_at` or to the logits."""

    anatomy: Anatomy
    start_at: int | None
    stop_at: int | None
    logits: bool

    def __post_init__(self) -> None:
        for name, layer in (("start", self.start_at), ("stop", self.stop_at)):
            self._refuse_no_layer(name, layer)
        if self.start_at is not None and self.stop_at is not None and self.stop_at <= self.start_at:
            raise error(
                SiteError,
                "a run must stop after the layer at which it starts",
                got=f"start_at={self.start_at}, stop_at={self.stop_at}",
                do="choose a later stop_at, or leave it out",
            )
        self.logits = self.logits and self.stop_at is None

    def _refuse_no_layer(self, name: str, layer: object) -> None:
        try:
            found = layer is None or 0 <= integer(layer) < self.anatomy.n_layers
        except TypeError:
            found = False
        if not found:
            raise error(
                SiteError,
                f"cannot {name} at layer {layer!r} of {self.anatomy.name}",
                allowed=f"0 to {self.anatomy.n_layers - 1}",
                do="choose a layer of the model",
            )

    def _outside(self, site: Site) -> str | None:
        """Why a site is not computed, or None."""
        before = site.name == "embed" if site.layer is None else site.layer < (self.start_at or 0)
        if self.start_at is not None and before:
            return f"the run starts at layer {self.start_at}"
        if self.stop_at is None:
            return "the run ends before the unembedding" if site.name == "logits" and not self.logits else None
        if site.layer is None:
            after = site.name != "embed"
        else:
            after = site.layer > self.stop_at or (site.layer == self.stop_at and site.name != "resid_pre")
        return f"the run ends before layer {self.stop_at}" if after else None

    def _never(self, address: Address) -> str | None:
        """Why an address is not reached, or None; of ``*`` any layer is enough."""
        reasons = {site: self._outside(site) for site in self.anatomy.sites(address)}
        if _enough(self.anatomy, address, {site for site, reason in reasons.items() if reason is None}):
            return None
        return next(reason for reason in reasons.values() if reason is not None)

    def _never_acts(self, edit: Edit) -> str | None:
        """Why an edit cannot act, or None."""
        if isinstance(edit, SiteEdit):
            return self._never(edit.address)
        if not isinstance(edit, Skip | Repeat | ScaleBlock):
            return None
        chosen = parse_indices(edit.layers, "layers")
        layers = chosen.resolve(self.anatomy.n_layers) or [0]
        if self.stop_at is not None and min(layers) >= self.stop_at:
            return f"the run ends before layer {self.stop_at}"
        first = max(layers) if chosen.is_all else min(layers)
        return f"the run starts at layer {self.start_at}" if first < (self.start_at or 0) else None

    def refuse_outside(self, seen: Sequence[Address], edits: Sequence[Edit]) -> None:
        """Refuse what lies before the start or after the end of a run.

        Raises:
            SiteError: a capture, or an observed address, does.
            EditError: an edit does.
        """
        for address in seen:
            why = self._never(address)
            if why is not None:
                raise error(SiteError, f'"{address}" is never reached: {why}', do="let the run reach it")
        for edit in edits:
            why = self._never_acts(edit)
            if why is not None:
                raise error(EditError, f"{edit!r} can never act: {why}", do="let the run reach it")


def _start(model: LoadedModel, batch: Batch, start_at: int | None, given: Any) -> list[Edit]:
    """The edits by which a run starts at a layer with a given stream: earlier blocks are skipped.

    Raises:
        EditError: there is a layer without a stream or the reverse, or the stream has another shape.
    """
    if start_at is None and given is None:
        return []
    if start_at is None or given is None:
        raise error(
            EditError,
            "start_at and given go together",
            got=f"no {'start_at' if start_at is None else 'given'}",
            do="give the layer, and the residual stream [batch, pos, d_model] that enters it",
        )
    wide = model.anatomy.size(Site("resid_pre", start_at), "d_model")
    shape = [*batch.tokens.shape, wide]
    if not isinstance(given, Tensor) or list(given.shape) != shape:
        raise error(
            EditError,
            f"given is not a residual stream that can enter layer {start_at}",
            got=f"shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__,
            allowed=f"a tensor {shape} [batch, pos, d_model]",
            do="give resid_pre of that layer, of a run over prompts of the same shape",
        )
    skipped = [Skip(f"0-{start_at - 1}")] if start_at else []
    return [*skipped, Set(f"{start_at}.resid_pre", value=given)]


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


def _end(model: LoadedModel, session: Session, stop_at: int | None, logits: bool, edits: Sequence[Edit]) -> None:
    """Let a run end where it is to end, and one without logits where nothing that is named is left to come."""

    def stop(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Stop

    if stop_at is not None:
        session.hooks.before(model.anatomy.parts.layers[stop_at].block, stop)
    elif not logits:
        session.hooks.before(model.anatomy.parts.unembedding, stop)
    # A site in a repeated block is seen several times, of which the last counts.
    if not logits and not any(isinstance(edit, Repeat) for edit in (*edits, *lock_of(model.hf).active_edits)):
        session.end_after_last()


def _forward(model: LoadedModel, session: Session, batch: Batch, edits: Sequence[Edit], grad: bool) -> Any:
    a = model.anatomy
    takes_positions = "position_ids" in signature(type(model.hf).forward).parameters
    inputs: dict[str, Any] = dict(batch.inputs(takes_positions, a.first_position))
    # Skipped and repeated blocks would leave holes in a cache; otherwise the model runs as it does for anyone.
    uncached = any(isinstance(edit, Skip | Repeat) for edit in (*edits, *lock_of(model.hf).active_edits))
    # Mixers that are no attention overwrite the states that they keep, so that no gradient goes through these.
    stateless = grad and any(layer.mixer is not None for layer in a.parts.layers)
    if (uncached or stateless) and a.causal:
        inputs["use_cache"] = False
    with torch.set_grad_enabled(grad), session.hooks:
        started = time.perf_counter()
        try:
            with refusing_gaps(a.name, changed=uncached):
                output = model.hf(**inputs)
        except Stop:
            return None
    took = time.perf_counter() - started
    if not uncached:  # the pace is that of whole forwards
        model.pace = plan_of(model, batch, [], logits=True, grad=False, pace=1.0).seconds / took
    return output


@contextmanager
def refusing_gaps(name: str, *, changed: bool) -> Iterator[None]:
    """Say so where a forward fails because some of its blocks are skipped or repeated, if that is `changed`.

    Raises:
        EditError: it fails so.
    """
    try:
        yield
    except (Stop, MicrotomeError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        if not changed or _from_outside(problem):
            raise
        raise error(
            EditError,
            f"{name} does not run with some of its blocks skipped or repeated",
            got=f"{type(problem).__name__}: {' '.join(str(problem).split())[:100]}",
            allowed="blocks of which the others need nothing but the stream",
            do="leave these blocks as they are, and edit what they write",
        ) from problem


def _from_outside(problem: Exception) -> bool:
    """Whether an exception comes of what an edit or an observer does, and not of the model."""
    return any(frame.f_globals.get("__name__") == Session.__module__ for frame, _ in walk_tb(problem.__traceback__))


def _enough(anatomy: Anatomy, address: Address, reached: set[Site]) -> bool:
    """Whether a run reached an address: all of its sites if layers are named, any of them for ``*``."""
    named = address.layers is None or not address.layers.is_all
    here = reached.intersection(anatomy.sites(address))
    return bool(here) and (not named or len(here) == len(set(anatomy.sites(address))))


def _refuse_idle(session: Session, seen: Sequence[Address]) -> None:
    """Refuse addresses and edits that were never reached, such as sites inside a skipped block.

    Raises:
        SiteError: a captured or observed address was not.
        EditError: an edit was not.
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
