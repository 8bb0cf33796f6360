"""Check scores: measure the best candidates exactly, and random others beside them.

Formula:  rank correlation = Spearman's, of scores and exact effects over the k cells of the largest |score|; the same
          over the random others is its control.
          recall = share of the k cells of the largest |exact effect| that are among the k of the largest |score|. Of N
          cells k + m are measured; a random other stands for (N - k)/m cells, so this is an estimate where m < N - k,
          and the truth where all are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from microtome.edit import Patch
from microtome.errors import DataError, error
from microtome.explain._layout import every_position, layout
from microtome.explain._pair import pair_of
from microtome.explain._patching import refuse_seed
from microtome.model import Model
from microtome.run import Run
from microtome.sweep import Edge, SweepPlan

if TYPE_CHECKING:
    import xarray as xr


def verify(
    model: Model,
    scores: xr.Dataset,
    *,
    top: int = 50,
    seed: int = 0,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_plan: Callable[[SweepPlan], None] | None = None,
) -> xr.Dataset:
    """Measure the best-scored cells of every site exactly, and say how far the scores can be trusted.

    Formula:  see the head of this file.
    Source:   as a first filter whose misses are bounded by sampling, Kramár, Lieberum, Shah, Nanda, "AtP*: An efficient
              and scalable method for localizing LLM behaviour to components", 2024 (arXiv 2403.00745). Departs: recall
              is estimated by weighting the sample, instead of a bound on the chance of misses.
    Cost:     one forward and a sweep of 2 * top cells a site.
    Check:    exact scores give 1 and 1, reversed ones -1 and 0; tests/laws/test_verify.py.

    Args:
        model: the model that the scores come from.
        scores: what `attribute` returned.
        top: how many candidates of each site, and how many random others; all, for sites that have fewer.
        seed: of the random others.
        budget: bytes that one walk may hold.
        progress: called with (done, all) cells.
        on_plan: called with the plan of the sweep, before its first cell.

    Returns:
        The scores, and for each site `<site>_exact`, the effect metric(cell) - metric(start), NaN where not measured;
        over `site`: `rank_correlation`, `rank_correlation_others`, `recall` and `measured` (cells). `verified_top` and
        `seed` are among the attributes. A correlation is NaN where there are fewer than two cells, or all are equal.
        Stopped by Ctrl-C, it keeps what was measured; all that is said of a site not measured to its end is NaN.

    Raises:
        DataError: the scores are of another model, of no pair, without labels, or have fewer than `top` cells.
        EditError: there is no such seed; BudgetError: not even one cell fits.
    """
    refuse_seed(seed)
    pair = pair_of(model, scores)
    sites = [str(name) for name in scores.attrs["sites"]]
    flat = {site: np.asarray(scores[site].values, dtype=np.float64).reshape(-1) for site in sites}
    _check_top(top, max(int(np.isfinite(x).sum()) for x in flat.values()))
    random = np.random.default_rng(seed)
    chosen = {site: candidates(x, top, random) for site, x in flat.items()}
    source = _source(model, scores, pair.goal)
    cells = [cell for site in sites for cell in _cells(model, scores, site, source, np.concatenate(chosen[site]))]
    metric = pair.metric(model)
    if on_plan is not None:
        on_plan(model.sweep(pair.start, cells, metric, budget=budget).plan)
    swept = model.sweep(pair.start, cells, metric, budget=budget).run(progress)
    return _dataset(scores, flat, chosen, swept.effects.double().numpy(), top, seed)


def _check_top(top: int, most: int) -> None:
    if not 1 <= top <= most:
        raise error(
            DataError,
            "cannot verify so many candidates",
            got=f"top={top}",
            allowed=f"1 to {most}, the number of cells",
            do="choose a top in that range, or verify=0 to check nothing",
        )


def candidates(
    scores: Float[ndarray, " cell"], top: int, random: np.random.Generator
) -> tuple[Int[ndarray, " top"], Int[ndarray, " others"]]:
    """The places of the `top` largest |scores|, best first, and of as many random others; NaN is no cell."""
    there = np.flatnonzero(np.isfinite(scores))
    ordered = there[np.argsort(-np.abs(scores[there]), kind="stable")]
    best, rest = ordered[:top], ordered[top:]
    return best, np.sort(random.choice(rest, size=min(len(best), len(rest)), replace=False))


def _source(model: Model, scores: xr.Dataset, goal: Tensor) -> Run:
    if "sender" in scores.dims:
        return model.run(goal, capture=["embed", "*.attn.z", "*.mlp_out"], logits=False)
    layouts = [layout(model, str(site), every_position(goal.shape[1])) for site in scores.attrs["sites"]]
    return model.run(goal, capture=sorted({layout.capture for layout in layouts}), logits=False)


def _cells(
    model: Model, scores: xr.Dataset, site: str, source: Run, places: Int[ndarray, " cell"]
) -> list[Patch | Edge]:
    labels = _labels(scores, site, places)
    if "sender" in labels:
        pairs = zip(labels["sender"], labels["receiver"], strict=True)
        return [Edge(str(sender), str(receiver), source=source) for sender, receiver in pairs]
    part = layout(model, site, every_position(source.tokens.shape[1]))
    grid = np.array(part.addresses).reshape(part.shape)
    layers, others = (labels[dim] for dim in part.dims)
    return [Patch(str(grid[i, j]), source=source) for i, j in zip(layers, others, strict=True)]


def _labels(scores: xr.Dataset, site: str, places: Int[ndarray, " cell"]) -> dict[str, ndarray]:
    """By axis, what the flat places of a site's scores are called: scores may be cut out, or turned round.

    Raises:
        DataError: an axis has no labels.
    """
    data = scores[site]
    bare = [dim for dim in data.dims if dim not in data.coords]
    if bare:
        raise error(
            DataError,
            f"the scores of {site} do not say what they are of",
            got=f"no labels along {', '.join(map(str, bare))}",
            do="keep the coordinates that `attribute` returned",
        )
    indices = np.unravel_index(places, data.shape)
    return {str(dim): data[dim].values[at] for dim, at in zip(data.dims, indices, strict=True)}


def rank_correlation(a: Float[ndarray, " cell"], b: Float[ndarray, " cell"]) -> float:
    """Spearman's correlation, by SciPy: tied values share their mean rank. NaN where either is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    from scipy.stats import spearmanr

    found: Any = spearmanr(a, b)
    return float(found.statistic)


def recall(best: Float[ndarray, " top"], others: Float[ndarray, " others"], n_cells: int) -> float:
    """Share of the cells of the largest |exact effect| that the best-scored ones are.

    Args:
        best: exact effects of the k best-scored cells.
        others: exact effects of random others.
        n_cells: how many cells there are.
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


def _dataset(
    scores: xr.Dataset,
    flat: dict[str, Float[ndarray, " cell"]],
    chosen: dict[str, tuple[Int[ndarray, " top"], Int[ndarray, " others"]]],
    effects: Float[ndarray, " measured"],
    top: int,
    seed: int,
) -> xr.Dataset:
    data = scores.copy()
    columns: dict[str, list[float]] = {
        "rank_correlation": [], "rank_correlation_others": [], "recall": [], "measured": []
    }  # fmt: skip
    at = 0
    for site, (best, others) in chosen.items():
        mine = effects[at : at + len(best) + len(others)]
        at += len(mine)
        exact = np.full(flat[site].shape, np.nan)
        exact[np.concatenate([best, others])] = mine
        data[f"{site}_exact"] = (scores[site].dims, exact.reshape(scores[site].shape), scores[site].attrs)
        first, rest = np.split(mine, [len(best)])
        # A sweep that was stopped leaves NaN, which sorts like the largest effect and ranks like a number.
        whole = bool(np.isfinite(mine).all())
        told = (
            rank_correlation(flat[site][best], first),
            rank_correlation(flat[site][others], rest),
            recall(first, rest, int(np.isfinite(flat[site]).sum())),
        )
        for name, value in zip(columns, told, strict=False):
            columns[name].append(value if whole else float("nan"))
        columns["measured"].append(int(np.isfinite(mine).sum()))
    data = data.assign({name: ("site", values) for name, values in columns.items()})
    return data.assign_coords(site=("site", list(chosen), {"title": "how far the estimates hold"})).assign_attrs(
        verified_top=top, seed=seed
    )
