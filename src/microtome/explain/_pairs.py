"""Activation patching over many pairs, of any lengths: the mean effect of every part, and how sure it is.

Formula:  effect_i(cell) = m_i(cell) - m_i(start), as a share of the gap m_i(goal) - m_i(start) of pair i; then its mean
          over pairs, a 95 % bootstrap interval, and the p-value of sign flips.
          A cell is a layer by a span of positions, which each pair has at its own place, or a layer by a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from microtome.errors import PromptError, SiteError, error
from microtome.explain._examples import Answers, Variables, answer_and_foil, summarised
from microtome.explain._patching import Layout, aligned, layout
from microtome.explain._spans import Span, at, span_of
from microtome.run import LogitDifference, LogProbability, Metric, Model, SwapFrom

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
    direction: Literal["denoise", "noise"] = "denoise",
    share: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Patch every layer and span (or head) in many pairs of prompts, exactly, and say how sure the mean is.

    Formula:  see the head of this file; m is the logit difference, or without foils the answer's log-probability.
    Source:   as `activation_patching`. Departs: positions are named spans, so that pairs of different lengths average.
    Cost:     two forwards a pair and one sweep for every 16 pairs.
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
        share: effects as shares of each pair's gap, instead of logits or nats.
        seed: of the statistics.
        progress: called with (done, all) pairs.

    Returns:
        Dataset: for every site its mean effect over (layer, span), (layer, pos) or (layer, head), with `_lo`, `_hi`,
        `_p` and `_each` (example, ...); `clean` and `corrupt` (example), the metric of the two prompts.

    Raises:
        PromptError: a pair does not align, an answer or foil does not fit, or pairs have no span or length in common.
        SiteError: a site cannot be patched this way, or both prompts of a pair give the same metric.
    """
    pairs = _pairs(model, cleans, corrupts)
    read, unit, words = _reading(model, answers, foils, metric, len(pairs))
    names, places = _places(model, pairs, spans)
    axis, parts = "pos" if spans is None else "span", []
    for first in range(0, len(pairs), TOGETHER):
        some = slice(first, first + TOGETHER)
        layouts = [
            {site: layout(model, site, place, axis, at(0, pair.shape[1])) for site in sites}
            for pair, place in zip(pairs[some], places[some], strict=True)
        ]
        parts.append(_measure(model, pairs[some], layouts, read(some), direction, first))
        if progress is not None:
            progress(min(first + TOGETHER, len(pairs)), len(pairs))
    effects, began, reached = (torch.cat(x).double() for x in zip(*parts, strict=True))
    if share:
        effects = effects / (reached - began).unsqueeze(1)
    first_layouts = {site: layout(model, site, places[0], axis) for site in sites}
    data = _dataset(first_layouts, effects, "share of the gap" if share else unit, seed)
    clean, corrupt = (reached, began) if direction == "denoise" else (began, reached)
    data = data.assign(clean=("example", clean.numpy()), corrupt=("example", corrupt.numpy()))
    data = data.assign_coords({axis: names} | words)
    return data.assign_attrs(model.provenance | {"method": "activation patching", "direction": direction, "seed": seed})


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
) -> tuple[Callable[[slice], Metric], str, dict[str, object]]:
    """The metric of some of the pairs, its unit, and the words that it is about."""
    if metric is not None:
        return lambda some: _From(metric, some.start), type(metric).__name__, {}
    if answers is None:
        raise error(PromptError, "there is nothing to read", do="give answers= or metric=")
    wanted, others = answer_and_foil(model, answers, foils, n)
    words: dict[str, object] = {"answer": ("example", model.to_words(wanted))}
    if others is None:
        return lambda some: LogProbability(wanted[some]), "nats", words
    words["foil"] = ("example", model.to_words(others))
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


def _measure(
    model: Model, pairs: list[Tensor], layouts: list[dict[str, Layout]], metric: Metric, direction: str, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Effects [pair, cell], and the metric of where the cells start and of where they lead [pair]."""
    start, goal = (1, 0) if direction == "denoise" else (0, 1)
    wanted = sorted({f"*.{site.removesuffix('[head]')}" for site in layouts[0]})
    source = model.run([pair[goal].tolist() for pair in pairs], capture=wanted)
    cells = [
        [SwapFrom(a, source=source) for part in layouts_of.values() for a in part.addresses] for layouts_of in layouts
    ]
    starts = [pair[start].tolist() for pair in pairs]
    whose = [i for i, own in enumerate(cells) for _ in own]
    swept = model.sweep(starts, [cell for own in cells for cell in own], metric, prompts=whose).whole()
    reached: list[Tensor] = []
    for i, pair in enumerate(pairs):
        read = source.logits[i : i + 1, metric.columns(i, pair.shape[1])]
        reached.append(metric.read(read, torch.tensor([i], device=read.device)).cpu())
    goals = torch.cat(reached)
    for i, gap in enumerate((goals - swept.base).abs().tolist()):
        if gap < 1e-4:
            raise error(
                SiteError, f"both prompts of pair {first + i} give the same metric", got=f"{float(goals[i]):.4g}",
                do="leave the pair out, or choose prompts that are answered differently",
            )  # fmt: skip
    return swept.effects.reshape(len(pairs), -1), swept.base, goals


def _dataset(layouts: dict[str, Layout], effects: Tensor, unit: str, seed: int) -> xr.Dataset:
    """The cells of all sites, cut apart and given their axes and statistics."""
    import xarray as xr

    variables: Variables = {}
    parts = effects.split([len(part.addresses) for part in layouts.values()], dim=1)
    for (site, part), x in zip(layouts.items(), parts, strict=True):
        variables |= summarised(site, x.reshape(-1, *part.shape), part.dims, unit, seed)
    data = xr.Dataset(variables)  # pyright: ignore[reportArgumentType]
    return data.assign_coords(layer=list(range(data.sizes["layer"])))
