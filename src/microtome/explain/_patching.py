"""Activation patching: which parts carry the information that makes the answers to two prompts differ.

Formula:  effect_i(cell) = m_i(cell) - m_i(start) of pair i, where a cell is its run with one activation taken from the
          other prompt. Denoising starts at the corrupt prompt and takes from the clean one, noising the reverse.
          As a share: divided by the mean over pairs of m_i(goal) - m_i(start), so that the mean is
          sum_i effect_i / sum_i gap_i and a pair of a small gap, or of one of the other sign, weighs no more than any.
          The interval is that of this ratio of sums, in which effects and gaps of a pair go together.
          A cell is a layer by a position, a layer by a span that each pair has at its own place, or a layer by a unit.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.edit import Patch
from microtome.errors import PromptError, SiteError, error
from microtome.explain._layout import DEFAULT_SITES, Layout, Sites, every_position, layout, named_sites
from microtome.explain._pairs import (
    SMALLEST_GAP,
    AnswerOfClean,
    Clean,
    Corrupt,
    Direction,
    FoilOfCorrupt,
    Pairs,
    Place,
    ReadMetric,
    Spans,
    pairs_of,
)
from microtome.explain._spans import at
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.model import Model

TOGETHER = 16
"""Pairs whose activations are held at once."""

ENDS = ("clean", "corrupt")
AS_IS = "none: the metric without patching, one end of the gap"
READING = {
    "denoise": "Each cell is one run of the corrupt prompt with one activation taken from the clean run: 0 leaves the "
    "corrupt answer, 1 fully restores the clean one.",
    "noise": "Each cell is one run of the clean prompt with one activation taken from the corrupt run: 0 leaves the "
    "clean answer, 1 fully replaces it by the corrupt one.",
}
CHANGES = {
    "denoise": "Each cell is one run of the corrupt prompt with one activation taken from the clean run, minus the "
    "corrupt run: above 0, that activation raises the {metric}.",
    "noise": "Each cell is one run of the clean prompt with one activation taken from the corrupt run, minus the clean "
    "run: below 0, the activation that it replaces raises the {metric}.",
}


@question(
    "patch",
    command="patch",
    title="activation patching",
    question="Which parts carry the information that makes the answers to two prompts differ?",
    columns=(
        Column("<site>", "share of the gap", "effect of patching this part, by layer and position, span or unit",
               "none: 0 is the run without a patch, 1 the run of the other prompt", test=True),
        Column("clean", "logits", "the metric of the clean prompt", AS_IS, dims=()),
        Column("corrupt", "logits", "the metric of the corrupt prompt", AS_IS, dims=()),
    ),
    source=(
        Source("Meng et al.", "Locating and Editing Factual Associations in GPT", 2022, "2202.05262"),
        Source(
            "Wang et al.", "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
            2022, "2211.00593",
        ),
        Source(
            "Heimersheim and Nanda", "How to use and interpret activation patching", 2024, "2404.15255",
            departs="every cell is measured, none approximated; spans let pairs of different lengths be averaged",
        ),
    ),
    cost="four forwards per pair, and a sweep for every 16 pairs: a cell of layer l and position p costs "
    "(L - l)/L (T - p)/T of a forward",
    check="tests/laws/test_patching.py, tests/laws/test_pairs.py",
    call='mt.explain.patch(model, "The capital of France is", "The capital of Italy is", answer=" Paris")',
)  # fmt: skip
def patch(
    model: Model,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    spans: Spans = None,
    sites: Sites = DEFAULT_SITES,
    direction: Direction = "denoise",
    share: Annotated[
        bool, Argument("give effects as shares of the mean gap, instead of in units of the metric")
    ] = True,
) -> Found:
    """Patch every layer and position (or head) between clean and corrupt prompts, exactly.

    Of several pairs it gives the mean effect, with `_lo`, `_hi`, `_p` and `_each`: over (layer, span) where spans are
    given or the lengths differ, else over (layer, pos); NaN in layers without a site. Stopped by Ctrl-C it keeps the
    pairs that were measured whole, and the attribute `examples` says how many. `mean_gap` and `smallest_gap` are of
    clean - corrupt, `flipped_gaps` how many gaps have the other sign than their mean.

    Raises:
        PromptError: a pair does not align, an answer or foil does not fit, or pairs have no span or length in common.
        SiteError: no layer has a site, both prompts of a pair give the same metric or differ only after what is read,
            or the mean gap that effects are shares of is not clearly one.
        DataError: the file cannot be read as pairs; BudgetError: not even one cell fits.
    """
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric, spans=spans)
    axis, labels, places = _places(pairs, by_span=spans is not None)
    sites = named_sites(model, sites)
    layouts = [
        {site: layout(model, site, place, axis, at(0, length)) for site in sites}
        for place, length in zip(places, pairs.lengths, strict=True)
    ]
    ends = _ends(model, pairs, share)  # every refusal comes before the first sweep
    effects, kept = _measured(model, pairs, layouts, direction)
    ends = ends[kept]
    gaps = ends[:, 0] - ends[:, 1]
    unit = pairs.unit
    if share:
        effects = effects / (gaps.mean() if direction == "denoise" else -gaps.mean())
        unit = "share of the gap" if len(pairs) == 1 else "share of the mean gap"
    coords, attrs = _attributes(model, pairs, kept, gaps)
    reading = READING[direction] if share else CHANGES[direction].format(metric=attrs["metric"])
    cells, one = _by_site(layouts[0], effects), len(pairs) == 1
    values = {name: ((), ends[0, i]) if one else (("example",), ends[:, i]) for i, name in enumerate(ENDS)}
    return Found(
        values | ({site: (dims, x[0]) for site, (dims, x) in cells.items()} if one else {}),
        each={} if one else cells,
        weights=gaps / gaps.mean() if share else None,
        coords=coords | {axis: labels, "layer": list(range(model.anatomy.n_layers))},
        attrs=attrs | {"direction": direction, "reading": reading},
        units=dict.fromkeys(sites, unit) | dict.fromkeys(ENDS, pairs.unit),
    )


def _places(pairs: Pairs, *, by_span: bool) -> tuple[str, list[str] | list[int], list[list[Place]]]:
    """The axis of places, its labels, and where each pair has them."""
    lengths = sorted(set(pairs.lengths))
    if len(lengths) == 1 and not by_span:
        return "pos", list(range(lengths[0])), [every_position(lengths[0])] * len(pairs)
    if not pairs.spans:
        raise error(
            PromptError, "pairs of several lengths have no positions in common", got=str(lengths),
            do="give spans=, names of positions for each pair",
        )  # fmt: skip
    return "span", list(pairs.spans), [list(own) for own in zip(*pairs.spans.values(), strict=True)]


def _chunks(n: int) -> list[slice]:
    return [slice(first, min(first + TOGETHER, n)) for first in range(0, n, TOGETHER)]


def _ends(model: Model, pairs: Pairs, share: bool) -> Float[Tensor, "pair 2"]:
    """The metric of the clean and the corrupt prompt of every pair.

    Raises:
        SiteError: both prompts of a pair give the same; or the mean gap, if it is needed, may as well be 0.
    """
    found = torch.empty(len(pairs), 2, dtype=torch.float64)
    for some in _chunks(len(pairs)):
        for side in (0, 1):
            rows = [pair[side] for pair in pairs.tokens[some]]
            found[some, side] = pairs[some].read(model.run(rows)).detach().double().cpu()
    for i, (clean, corrupt) in enumerate(found.tolist()):
        if abs(clean - corrupt) < SMALLEST_GAP:
            which = f" of pair {i}" if len(pairs) > 1 else ""
            raise error(
                SiteError, f"both prompts{which} give the same metric, so that there is no gap to explain",
                got=f"{clean:.4g}", do="choose prompts that are answered differently",
            )  # fmt: skip
    gaps = found[:, 0] - found[:, 1]
    if not share or len(gaps) == 1:
        return found
    mean, error_of_mean = float(gaps.mean()), float(gaps.std()) / len(gaps) ** 0.5
    if abs(mean) <= max(2 * error_of_mean, SMALLEST_GAP):
        raise error(
            SiteError, "the mean gap of the pairs is not clearly different from 0",
            got=f"{mean:.3g} with a standard error of {error_of_mean:.3g}, "
            f"{int((gaps * mean < 0).sum())} of {len(gaps)} gaps of the other sign",
            do="leave out pairs that the model answers wrongly, or give share=False",
        )  # fmt: skip
    return found


def _measured(
    model: Model, pairs: Pairs, layouts: list[dict[str, Layout]], direction: str
) -> tuple[Float[Tensor, "example cell"], list[int]]:
    """The effects of the pairs that were measured whole, and which these are: all of them, unless it is stopped.

    Raises:
        KeyboardInterrupt: it was stopped in the first pair.
    """
    parts: list[Tensor] = []
    kept: list[int] = []
    try:
        for some in _chunks(len(pairs)):
            stage = "patching" if len(pairs) == 1 else f"patching pairs {some.start + 1}-{some.stop} of {len(pairs)}"
            effects, stopped = _swept(model, pairs[some], layouts[some], direction, stage)
            whole = [i for i in range(len(effects)) if bool(effects[i].isfinite().all()) or not stopped]
            parts.append(effects[whole])
            kept += [some.start + i for i in whole]
            if stopped:
                break
    except KeyboardInterrupt:
        if not kept:
            raise
    if not kept:
        raise KeyboardInterrupt
    return torch.cat(parts), kept


def _swept(
    model: Model, pairs: Pairs, layouts: list[dict[str, Layout]], direction: str, stage: str
) -> tuple[Float[Tensor, "pair cell"], bool]:
    """The effects of some pairs, NaN where they were not reached, and whether the sweep was stopped."""
    wanted = sorted({part.capture for part in layouts[0].values()})
    source = model.run(pairs.goal(direction), capture=wanted, logits=False)
    cells = [[Patch(a, source=source) for part in own.values() for a in part.addresses.values()] for own in layouts]
    which = [i for i, own in enumerate(cells) for _ in own]
    every = [cell for own in cells for cell in own]
    swept = run_sweep(model, pairs.start(direction), every, pairs.metric, prompts=which, stage=stage)
    return swept.effects.double().reshape(len(pairs), -1), swept.done < len(every)


def _by_site(
    layouts: dict[str, Layout], effects: Float[Tensor, "example cell"]
) -> dict[str, tuple[tuple[str, str], Float[Tensor, "example layer _"]]]:
    """The effects [example, cell] of every site with its axes, [example, layer, place or unit]; NaN without a cell."""
    parts = effects.split([len(part.addresses) for part in layouts.values()], dim=1)
    sites = zip(layouts.items(), parts, strict=True)
    return {site: (part.dims, part.spread(x)) for (site, part), x in sites}


def _attributes(
    model: Model, pairs: Pairs, kept: list[int], gaps: Float[Tensor, " example"]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The labels of one pair's tokens or of several examples, and what is known of them."""
    if len(pairs) == 1:
        words = [model.to_words(row) for row in pairs.tokens[0]]
        return {"clean_token": ("pos", words[0]), "corrupt_token": ("pos", words[1])}, pairs.attrs()
    by_example = {"answer": pairs.answer, "foil": pairs.foil, "group": pairs.groups}
    coords = {name: ("example", [said[i] for i in kept]) for name, said in by_example.items() if said}
    attrs = {"examples": len(kept), "mean_gap": float(gaps.mean()), "smallest_gap": float(gaps.abs().min())}
    return coords, pairs.attrs() | attrs | {"flipped_gaps": int((gaps * gaps.mean() < 0).sum())}
