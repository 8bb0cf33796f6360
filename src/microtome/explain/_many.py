"""Activation patching over many pairs, of any lengths: the mean effect of every part, and how sure it is.

Formula:  effect_i(cell) = m_i(cell) - m_i(start), as a share of the mean gap, the mean over pairs of
          m_i(goal) - m_i(start); then its mean over pairs, a 95 % bootstrap interval, and the p-value of sign flips.
          So the mean is sum_i effect_i / sum_i gap_i: a pair of a small gap, or of one of the other sign, weighs no
          more than any. The interval is that of the effects, the mean gap being taken as it is.
          A cell is a layer by a span of positions, which each pair has at its own place, or a layer by a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome.edit import Patch
from microtome.errors import PromptError, SiteError, error
from microtome.explain._examples import Answers, Variables, answer_and_foil, summarised
from microtome.explain._layout import Layout, layout
from microtome.explain._pairs import aligned, require_effect_on_metric
from microtome.explain._patching import refuse_wrong
from microtome.explain._spans import Span, at, span_of
from microtome.metric import LogitDifference, LogProbability, Metric
from microtome.model import Model
from microtome.stream import mean_interval
from microtome.sweep import SweepPlan

if TYPE_CHECKING:
    import xarray as xr

TOGETHER = 16
"""Pairs whose activations are held at once."""


def patch_pairs(
    model: Model,
    cleans: Sequence[str] | Sequence[Sequence[int]] | Tensor,
    corrupts: Sequence[str] | Sequence[Sequence[int]] | Tensor,
    *,
    answers: Answers | None = None,
    foils: Answers | None = None,
    metric: Metric | None = None,
    spans: Sequence[Mapping[str, Span]] | None = None,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "attn.z[head]"),
    direction: str = "denoise",
    share: bool = True,
    seed: int = 0,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """Patch every layer and span (or head) in many pairs of prompts, exactly, and say how sure the mean is.

    Formula:  see the head of this file; m is the logit difference, or without foils the answer's log-probability.
    Source:   as `activation_patching`. Departs: positions are named spans, so that pairs of different lengths average.
    Cost:     four forwards a pair, two of them before anything is swept, and one sweep for every 16 pairs.
    Check:    every pair's values equal `activation_patching` of it alone; tests/laws/test_pairs.py.

    Args:
        model: an open model.
        cleans: the prompts with the answers.
        corrupts: one a clean prompt, of the same number of tokens.
        answers: the clean prompts' answers, one token each.
        foils: the corrupt prompts' answers.
        metric: what to read instead, of prompt i for pair i, such as the `metric()` of a task.
        spans: for each pair, names and what they mean in its clean prompt: (first, end), a position, or a text; those
            that all pairs have are used. Without it all pairs must have one length, and every position is a cell.
        sites: site names, patched by layer and span; with ``[head]`` behind, by layer and head at all positions.
        direction: "denoise" puts clean values into the corrupt run, "noise" the reverse.
        share: effects as shares of the mean gap, instead of logits or nats.
        seed: of the statistics.
        budget: bytes that one walk may hold.
        progress: called with (done, all) pairs.
        on_plan: called with the plan of every 16 pairs' sweep, before its first cell.

    Returns:
        Dataset: for every site its mean effect over (layer, span), (layer, pos) or (layer, head), with `_lo`, `_hi`,
        `_p` and `_each` (example, ...); `clean` and `corrupt` (example), the metric of the two prompts. Attributes:
        `examples`, how many (stopped by Ctrl-C, those that were measured whole); `mean_gap` and `smallest_gap` of
        clean - corrupt, in units of the metric; `flipped_gaps`, how many have the other sign than their mean.

    Raises:
        PromptError: a pair does not align, an answer or foil does not fit, or pairs have no span or length in common.
        SiteError: there is no site, one cannot be patched this way, both prompts of a pair give the same metric or
            differ only after what is read, or the mean gap that effects are shares of is not clearly one.
        EditError: there is no such direction; BudgetError: not even one cell fits.
    """
    refuse_wrong(direction, sites)
    pairs = _pairs(model, cleans, corrupts)
    read, unit, words = _reading(model, answers, foils, metric, len(pairs))
    names, places = _places(model, pairs, spans)
    axis = "pos" if spans is None else "span"
    layouts = _layouts(model, sites, pairs, places, axis)
    ends = _ends(model, pairs, read, share)  # every refusal comes before the first sweep
    effects, kept = _measured(model, pairs, layouts, read, direction, budget, progress, on_plan)
    ends = ends[kept]
    if share:
        gap = float((ends[:, 0] - ends[:, 1]).mean())
        effects = effects / (gap if direction == "denoise" else -gap)
    data = _dataset(layouts[0], effects, "share of the mean gap" if share else unit, ends, seed)
    coords = {axis: names} | {name: ("example", [said[i] for i in kept]) for name, said in words.items()}
    told = {"method": "activation patching", "direction": direction, "seed": seed}
    return data.assign_coords(coords).assign_attrs(model.provenance | told)


@dataclass(frozen=True)
class _From:
    """A metric of all pairs, read for those from a number on."""

    metric: Metric
    first: int

    def columns(self, prompt: int, length: int) -> list[int]:
        """The columns of the pair."""
        return self.metric.columns(prompt + self.first, length)

    def read(self, logits: Tensor, prompts: Tensor) -> Tensor:
        """What the metric reads of the pairs, [row, ...]."""
        return self.metric.read(logits, prompts + self.first)


def _reading(
    model: Model, answers: Answers | None, foils: Answers | None, metric: Metric | None, n: int
) -> tuple[Callable[[slice], Metric], str, dict[str, list[str]]]:
    """The metric of some of the pairs, its unit, and the words that it is about."""
    if metric is not None:
        return lambda some: _From(metric, some.start), type(metric).__name__, {}
    if answers is None:
        raise error(PromptError, "there is nothing to read", do="give answers= or metric=")
    wanted, others = answer_and_foil(model, answers, foils, n)
    words = {"answer": model.to_words(wanted)}
    if others is None:
        return lambda some: LogProbability(wanted[some]), "nats", words
    words["foil"] = model.to_words(others)
    return lambda some: LogitDifference(wanted[some], foil=others[some]), "logits", words


def _pairs(model: Model, cleans: object, corrupts: object) -> list[Tensor]:
    """Tokens [2, pos] of every pair."""
    sides = [model.to_batch(x) for x in (cleans, corrupts)]  # pyright: ignore[reportArgumentType]
    counts = [len(side.lengths) for side in sides]
    if counts[0] != counts[1]:
        raise error(PromptError, "there must be one corrupt prompt a clean one", got=counts[1], allowed=counts[0])
    pairs: list[Tensor] = []
    for i in range(counts[0]):
        rows = [side.tokens[i, : side.lengths[i]].tolist() for side in sides]
        try:
            pairs.append(aligned(model, *rows))
        except PromptError as problem:
            raise PromptError(f"pair {i}: {problem}") from None
    return pairs


def _places(
    model: Model, pairs: list[Tensor], spans: Sequence[Mapping[str, Span]] | None
) -> tuple[list[str] | list[int], list[list[tuple[int, int]]]]:
    """The names of the positions, and where each pair has them."""
    if spans is None:
        lengths = {pair.shape[1] for pair in pairs}
        if len(lengths) > 1:
            raise error(
                PromptError, "pairs of several lengths have no positions in common", got=sorted(lengths),
                do="give spans=, names of positions for each pair",
            )  # fmt: skip
        n = lengths.pop()
        return list(range(n)), [[(p, p + 1) for p in range(n)]] * len(pairs)
    if len(spans) != len(pairs):
        raise error(PromptError, "there must be spans for each pair", got=len(spans), allowed=len(pairs))
    names = [name for name in spans[0] if all(name in given for given in spans)]
    if not names:
        raise error(PromptError, "the pairs have no span in common", got=[list(given) for given in spans[:3]])
    return names, [
        [span_of(model, pair[0], given[name], name) for name in names] for pair, given in zip(pairs, spans, strict=True)
    ]


def _layouts(
    model: Model,
    sites: Sequence[str],
    pairs: list[Tensor],
    places: list[list[tuple[int, int]]],
    axis: str,
) -> list[dict[str, Layout]]:
    """The cells of every pair, by site."""
    return [
        {site: layout(model, site, place, axis, at(0, pair.shape[1])) for site in sites}
        for pair, place in zip(pairs, places, strict=True)
    ]


def _chunks(n: int) -> list[slice]:
    return [slice(first, min(first + TOGETHER, n)) for first in range(0, n, TOGETHER)]


def _ends(model: Model, pairs: list[Tensor], read: Callable[[slice], Metric], share: bool) -> Tensor:
    """[pair, (clean, corrupt)] The metric of both prompts of every pair, in float64.

    Raises:
        SiteError: no patch can reach what is read of a pair, or both of its prompts give the same; or effects are to be
            shares of the mean gap, and it is not clearly one.
    """
    found = torch.empty(len(pairs), 2, dtype=torch.float64)
    for some in _chunks(len(pairs)):
        metric = read(some)
        for i, pair in enumerate(pairs[some]):
            require_effect_on_metric(model, read(slice(0, None)), pair, some.start + i, len(pairs))
        for side in (0, 1):
            logits = model.run([pair[side].tolist() for pair in pairs[some]]).logits
            for i, pair in enumerate(pairs[some]):
                of = logits[i : i + 1, metric.columns(i, pair.shape[1])]
                value = metric.read(of, torch.tensor([i], device=of.device))
                found[some.start + i, side] = float(value.reshape(()))
    for i, (clean, corrupt) in enumerate(found.tolist()):
        if abs(clean - corrupt) < 1e-4:
            raise error(
                SiteError, f"both prompts of pair {i} give the same metric", got=f"{clean:.4g}",
                do="leave the pair out, or choose prompts that are answered differently",
            )  # fmt: skip
    if share:
        _require_gap(found[:, 0] - found[:, 1])
    return found


def _require_gap(gaps: Tensor) -> None:
    """Refuse gaps whose mean may as well be 0: a share of it says nothing.

    Raises:
        SiteError: its interval over pairs holds 0.
    """
    mean, low, high = (float(x) for x in mean_interval(gaps))
    if low <= 0 <= high or abs(mean) < 1e-4:
        raise error(
            SiteError, "the gaps of the pairs have no clear mean to be shared out",
            got=f"{mean:.3g}, 95 % interval {low:.3g} to {high:.3g}, "
            f"{int((gaps * mean < 0).sum())} of {len(gaps)} gaps of the other sign",
            do="leave out pairs that the model answers wrongly, or give share=False",
        )  # fmt: skip


def _measured(
    model: Model,
    pairs: list[Tensor],
    layouts: list[dict[str, Layout]],
    read: Callable[[slice], Metric],
    direction: str,
    budget: int | None,
    progress: Callable[[int, int], None] | None,
    on_plan: Callable[[SweepPlan], None] | None,
) -> tuple[Tensor, list[int]]:
    """Effects [example, cell] of the pairs that were measured whole, and which these are: all, unless it is stopped."""
    parts: list[Tensor] = []
    kept: list[int] = []
    try:
        for some in _chunks(len(pairs)):
            effects, whole = _sweep(model, pairs[some], layouts[some], read(some), direction, budget, on_plan)
            done = [i for i in range(len(effects)) if whole or bool(effects[i].isfinite().all())]
            parts.append(effects[done])
            kept += [some.start + i for i in done]
            if not whole:
                break
            if progress is not None:
                progress(some.stop, len(pairs))
    except KeyboardInterrupt:
        if not kept:
            raise
    if not kept:  # stopped in the first pair
        raise KeyboardInterrupt
    return torch.cat(parts), kept


def _sweep(
    model: Model,
    pairs: list[Tensor],
    layouts: list[dict[str, Layout]],
    metric: Metric,
    direction: str,
    budget: int | None,
    on_plan: Callable[[SweepPlan], None] | None,
) -> tuple[Tensor, bool]:
    """Effects [pair, cell], and whether all were measured; NaN where not."""
    start, goal = (1, 0) if direction == "denoise" else (0, 1)
    wanted = sorted({f"*.{site.removesuffix('[head]')}" for site in layouts[0]})
    source = model.run([pair[goal].tolist() for pair in pairs], capture=wanted, logits=False)
    cells = [
        [Patch(a, source=source) for part in layouts_of.values() for a in part.addresses] for layouts_of in layouts
    ]
    starts = [pair[start].tolist() for pair in pairs]
    whose = [i for i, own in enumerate(cells) for _ in own]
    every = [cell for own in cells for cell in own]
    if on_plan is not None:
        on_plan(model.sweep(starts, every, metric, prompts=whose, budget=budget).plan)
    swept = model.sweep(starts, every, metric, prompts=whose, budget=budget).run()
    return swept.effects.double().reshape(len(pairs), -1), swept.done == len(whose)


def _dataset(layouts: dict[str, Layout], effects: Tensor, unit: str, ends: Tensor, seed: int) -> xr.Dataset:
    """The cells of all sites, cut apart and given their axes and statistics; and what is to be said of the gaps."""
    import xarray as xr

    variables: Variables = {}
    parts = effects.split([len(part.addresses) for part in layouts.values()], dim=1)
    for (site, part), x in zip(layouts.items(), parts, strict=True):
        variables |= summarised(site, x.reshape(-1, *part.shape), part.dims, unit, seed)
    data = xr.Dataset(variables)  # pyright: ignore[reportArgumentType]
    data = data.assign(clean=("example", ends[:, 0].numpy()), corrupt=("example", ends[:, 1].numpy()))
    gaps = ends[:, 0] - ends[:, 1]
    told = {"examples": len(gaps), "mean_gap": float(gaps.mean()), "smallest_gap": float(gaps.abs().min())}
    told["flipped_gaps"] = int((gaps * gaps.mean() < 0).sum())
    return data.assign_coords(layer=list(range(data.sizes["layer"]))).assign_attrs(told)
