"""Verification of scores: the top candidates are measured exactly, and random others beside them.

Formula:  rank correlation = Spearman's, of scores and exact effects over the k cells of the largest |score|; the same
          over the random others is its control.
          recall = share of the k cells of the largest |exact effect| that are among the k of the largest |score|. Of N
          cells k + m are measured; a random other stands for (N - k)/m cells, so this is an estimate where m < N - k,
          and the truth where all are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from numpy import ndarray

from microtome.context import current
from microtome.edit import Patch
from microtome.errors import DataError, error
from microtome.explain._edges import WRITTEN
from microtome.explain._layout import every_position, layout
from microtome.explain._pair import recorded
from microtome.explain._pairs import Pairs
from microtome.method import Argument, Column, Source, question, run_sweep
from microtome.model import Model
from microtome.sweep import Edge

TOGETHER = 4096
"""Cells of how many are held in one sweep, of several pairs."""
MEASURED = "none: random cells are measured beside the top ones"
SCORES = (
    Column("score", "logits", "estimated effect of taking the edge from the other run", MEASURED,
           dims=("sender", "receiver")),
    Column("<site>", "logits", "estimated effect of taking the activation from the other run", MEASURED),
    Column("clean", "logits", "the metric of the clean prompt", "corrupt", dims=()),
    Column("corrupt", "logits", "the metric of the corrupt prompt", dims=()),
    Column("gap", "share", "how far the scores out of the embedding are from adding up to the whole difference between "
           "the prompts", "none: 0 is complete", (0, None), dims=()),
    Column("ig_gap", "share", "what the scores of a site leave of the exact effect of patching all of it, as a share "
           "of the difference between the prompts", "none: 0 is complete", (0, None), dims=("site", "layer")),
    Column("ig_steps", "points", "at how many points gradients were taken", "none: a count", (1, None),
           dims=("site", "layer")),
    Column("answered", "share", "share of the clean prompts that the model answers as given: above the foil, or above "
           "every other token", "none: 1 is all of them", (0, 1), dims=()),
    Column("rank_correlation", "correlation", "between scores and exact effects, among the top-scored cells",
           "rank_correlation_others", (-1, 1), dims=("site",)),
    Column("rank_correlation_others", "correlation", "between scores and exact effects, among random other cells",
           range=(-1, 1), dims=("site",)),
    Column("recall", "share", "share of the cells with the largest exact effects that are among the top-scored ones",
           "recall_random", (0, 1), dims=("site",)),
    Column("recall_random", "share", "the same for random scores: the share of all cells that as many are",
           range=(0, 1), dims=("site",)),
    Column("measured", "cells", "how many cells were measured exactly", "none: a count", (0, None), dims=("site",)),
)  # fmt: skip
"""The columns of scores, which `attribute` estimates and `verify` measures."""

Cells = Mapping[str, xr.DataArray]
Chosen = tuple[Int[ndarray, " top"], Int[ndarray, " others"]]


@question(
    "verify",
    title="attribution, verified",
    question="How reliable are estimated scores?",
    columns=SCORES,
    source=Source(
        "Kramár, Lieberum, Shah, Nanda",
        "AtP*: An efficient and scalable method for localizing LLM behaviour to components", 2024, "2403.00745",
        "verification of the best candidates",
        departs="recall is estimated by weighting the sample, instead of a bound on the chance of misses",
    ),
    cost="one forward and a sweep of 2 * top cells per site",
    check="tests/laws/test_verify.py",
    call="mt.explain.verify(model, scores, top=50)",
)  # fmt: skip
def verify(
    model: Model,
    scores: Annotated[xr.Dataset, Argument("what `attribute` returned", command=False)],
    *,
    top: Annotated[int, Argument("how many top cells per site to measure", "cells", least=1)] = 50,
    others: Annotated[
        int | None, Argument("how many random others to measure beside them; by default as many", "cells", least=0)
    ] = None,
) -> xr.Dataset:
    """Measure the top-scored cells of every site exactly, and report how reliable the scores are.

    Beside the scores there is `<site>_exact`, the effect metric(cell) - metric(start), NaN where not measured. A
    correlation is NaN where there are fewer than two cells, or all are equal. Stopped by Ctrl-C, it keeps what was
    measured; everything about a site not measured to its end is NaN.

    Raises:
        DataError: the scores are of another model, of no pair, without labels, or have fewer than `top` cells.
        BudgetError: not even one cell fits.
    """
    pairs, direction = recorded(model, scores)
    sites = [str(name) for name in scores.attrs["sites"]]
    most = max(int(np.isfinite(scores[site].values).sum()) for site in sites)
    if top > most:
        do = "choose a top in that range, or verify=0 to measure none"
        raise error(
            DataError, "cannot verify that many candidates", got=f"top={top}",
            allowed=f"1 to {most}, the number of cells", do=do,
        )  # fmt: skip
    found = measure_best(model, pairs, direction, {site: scores[site] for site in sites}, top, others)
    own = {name: value for name, value in scores.attrs.items() if name not in ("seconds", "plan")}
    attributes = own | {"verified_top": top, "seed": current().seed}
    return scores.assign(found).assign_coords(site=site_axis(sites)).assign_attrs(attributes)


def site_axis(sites: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """The coordinate of the sites that were verified."""
    return "site", list(sites), {"title": "how reliable the estimates are"}


def measure_best(
    model: Model, pairs: Pairs, direction: str, scores: Cells, top: int, others: int | None = None
) -> dict[str, Any]:
    """Variables by name: exact effects of the best-scored and of random other cells of each site, and what they say.

    Of several pairs, the mean effect over them.
    """
    random = np.random.default_rng(current().seed)
    flat = {site: np.asarray(x.values, dtype=np.float64).reshape(-1) for site, x in scores.items()}
    chosen = {site: candidates(x, top, random, others) for site, x in flat.items()}
    places = {site: np.concatenate(both) for site, both in chosen.items()}
    means = mean_effects(model, pairs, direction, scores, places)
    effects = np.split(means, np.cumsum([len(b) + len(o) for b, o in chosen.values()])[:-1])
    found: dict[str, Any] = {}
    rows: dict[str, list[float]] = {}
    for site, mine in zip(scores, effects, strict=True):
        exact = np.full(flat[site].shape, np.nan)
        exact[places[site]] = mine
        unit = {"unit": pairs.unit}
        found[f"{site}_exact"] = (scores[site].dims, exact.reshape(scores[site].shape), unit)
        for name, value in _attributes(flat[site], chosen[site], mine).items():
            rows.setdefault(name, []).append(value)
    return found | {name: (("site",), values) for name, values in rows.items()}


def _attributes(
    scores: Float[ndarray, " cell"], places: Chosen, effects: Float[ndarray, " measured"]
) -> dict[str, float]:
    """What the exact effects say of the scores of one site; NaN where a stopped sweep left some of them out."""
    best, others = places
    first, rest = np.split(effects, [len(best)])
    attributes = {
        "rank_correlation": rank_correlation(scores[best], first),
        "rank_correlation_others": rank_correlation(scores[others], rest),
        "recall": recall(first, rest, int(np.isfinite(scores).sum())),
        "recall_random": len(best) / int(np.isfinite(scores).sum()),
    }
    whole, measured = bool(np.isfinite(effects).all()), int(np.isfinite(effects).sum())
    # NaN would sort like the largest effect and rank like a number.
    return {name: value if whole else float("nan") for name, value in attributes.items()} | {"measured": measured}


def candidates(
    scores: Float[ndarray, " cell"], top: int, random: np.random.Generator, others: int | None = None
) -> Chosen:
    """The places of the `top` largest |scores|, best first, and of as many (or so many) others; NaN is no cell."""
    there = np.flatnonzero(np.isfinite(scores))
    ordered = there[np.argsort(-np.abs(scores[there]), kind="stable")]
    best, rest = ordered[:top], ordered[top:]
    return best, np.sort(
        random.choice(rest, size=min(len(best) if others is None else others, len(rest)), replace=False)
    )


def mean_effects(
    model: Model, pairs: Pairs, direction: str, scores: Cells, places: Mapping[str, Int[ndarray, " cell"]]
) -> Float[ndarray, " all"]:
    """Exact effects of the cells at some flat places of the scores of each site, on average over pairs.

    NaN where a sweep was stopped before it.
    """
    n = max(1, sum(len(own) for own in places.values()))
    parts: list[ndarray] = []
    done = 0
    for some in pairs.batches(max(1, TOGETHER // n)):
        batch = pairs.take(some)
        cells = _cells(model, batch, direction, scores, places)
        which = [i for i in range(len(some)) for _ in cells]
        more = f", pairs {done + 1}-{done + len(some)} of {len(pairs)}" if len(pairs) > 1 else ""
        swept = run_sweep(
            model, batch.start(direction), cells * len(some), batch.metric, prompts=which,
            stage=f"measuring the best{more}",
        )  # fmt: skip
        parts.append(swept.effects.double().numpy().reshape(len(some), -1))
        done += len(some)
        if swept.done < len(which):
            break
    whole = np.concatenate(parts)
    return whole.mean(0) if len(whole) == len(pairs) else np.full(whole.shape[1], np.nan)


def _cells(
    model: Model, pairs: Pairs, direction: str, scores: Cells, places: Mapping[str, Int[ndarray, " cell"]]
) -> list[Patch | Edge]:
    """The cells at some flat places of the scores of each site, by what these are called; for each pair the same."""
    sites = [site for site, x in scores.items() if "sender" not in x.dims]
    layouts = {site: layout(model, site, every_position(pairs.lengths[0])) for site in sites}
    wanted = {part.capture for part in layouts.values()} | (set() if len(sites) == len(scores) else set(WRITTEN))
    source = model.run(pairs.goal(direction), capture=sorted(wanted), logits=False)
    cells: list[Patch | Edge] = []
    for site, x in scores.items():
        labels = _labels(x, site, places[site])
        if part := layouts.get(site):
            where = zip(*(labels[dim] for dim in part.dims), strict=True)
            cells += [Patch(part.addresses[int(i), int(j)], source=source) for i, j in where]
        else:
            ends = zip(labels["sender"], labels["receiver"], strict=True)
            cells += [Edge(str(sender), str(receiver), source=source) for sender, receiver in ends]
    return cells


def _labels(scores: xr.DataArray, site: str, places: Int[ndarray, " cell"]) -> dict[str, ndarray]:
    """By axis, what the flat places of a site's scores are called: scores may be cut out, or turned round.

    Raises:
        DataError: an axis has no labels.
    """
    bare = [dim for dim in scores.dims if dim not in scores.coords]
    if bare:
        raise error(
            DataError, f"the scores of {site} do not say what they are of",
            got=f"no labels along {', '.join(map(str, bare))}", do="keep the coordinates that `attribute` returned",
        )  # fmt: skip
    indices = np.unravel_index(places, scores.shape)
    return {str(dim): scores[dim].values[at] for dim, at in zip(scores.dims, indices, strict=True)}


def rank_correlation(a: Float[ndarray, " cell"], b: Float[ndarray, " cell"]) -> float:
    """Spearman's correlation, ties sharing their mean rank; NaN where either is constant."""
    from scipy.stats import spearmanr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    found: Any = spearmanr(a, b)
    return float(found.statistic)


def recall(best: Float[ndarray, " top"], others: Float[ndarray, " others"], n_cells: int) -> float:
    """Share of the cells of the largest |exact effect| that the best-scored ones are.

    `best` and `others` are the exact effects of these and of random others, out of n_cells cells.
    """
    k = len(best)
    weight = (n_cells - k) / len(others) if len(others) else 0.0
    sizes = np.abs(np.concatenate([best, others]))
    weights = np.concatenate([np.ones(k), np.full(len(others), weight)])
    order = np.argsort(-sizes, kind="stable")
    # The largest cells until they are k by weight; the last one counts for what is left.
    before = np.cumsum(weights[order]) - weights[order]
    counted = np.clip(k - before, 0, weights[order])
    return float(counted[order < k].sum() / k)
