"""Whether the parts that matter for one task matter for another."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import xarray as xr

from microtome.errors import DataError, error


def transfer(first: xr.Dataset, second: xr.Dataset, name: str, *, top: int = 20) -> xr.Dataset:
    """How much of what matters for a first task matters for a second, by the same variable of two results.

    Formula:  A, B the `top` places of the largest |effect| of either; overlap = |A and B| / top, by chance top / N of
              N places; p = P(X >= |A and B|), X hypergeometric; carried = mean |effect| in the second task of
              A, over that of all places there.
    Source:   transfer of components as in Zhang et al., "Interpreting and Improving Large Language Models in
              Arithmetic Calculation", 2024 (arXiv 2409.01659). Departs: against chance.
    Cost:     no forward.
    Check:    equal results share all, shuffled ones what chance gives; tests/laws/test_transfer.py.

    Args:
        first: a result with the variable, such as that of `patch` or of `component_effects`.
        second: one of the same model and places, of another task.
        name: of the variable, such as "attn.z[head]" or "total".
        top: how many places of either are compared.

    Returns:
        Dataset of single numbers: `overlap` and its control `overlap_chance`, shares; `p`; `rank_correlation`
        (Spearman, of the sizes of all effects); `carried`, a ratio of which 1 is nothing.

    Raises:
        DataError: a result lacks the variable, their places or models differ, or there are fewer places than `top`.

    >>> mt.explain.transfer(heads_of_one_task, heads_of_another, "attn.z[head]", top=20)["overlap"]
    """
    from scipy.stats import hypergeom, spearmanr

    for data in (first, second):
        if name not in data:
            raise error(DataError, f'a result has no "{name}"', got=", ".join(map(str, data.data_vars)), do="name one")
    models = [data.attrs.get("fingerprint") for data in (first, second)]
    if not _same_places(first[name], second[name]) or models[0] != models[1]:
        got = f"{dict(first[name].sizes)} and {dict(second[name].sizes)}"
        raise error(DataError, "the results are not of the same places of one model", got=got, do="ask both alike")
    a, b = (np.abs(np.asarray(data[name].values, dtype=np.float64)).ravel() for data in (first, second))
    there = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
    if not 1 <= top < len(there):
        raise error(DataError, "too few places to compare", got=len(there), allowed=f"more than top={top}")
    a, b = a[there], b[there]
    best = [set(np.argsort(-x, kind="stable")[:top].tolist()) for x in (a, b)]
    shared, size, fit = len(best[0] & best[1]), len(there), cast("Any", spearmanr(a, b))
    values = {
        "overlap": (shared / top, "share"), "overlap_chance": (top / size, "share"),
        "p": (float(hypergeom.sf(shared - 1, size, top, top)), "probability"),
        "rank_correlation": (float(fit.statistic), "correlation"),
        "carried": (float(b[sorted(best[0])].mean() / b.mean()), "1"),
    }  # fmt: skip
    said = {"method": "transfer of components", "variable": name, "top": top, "places": size}
    return xr.Dataset({key: ((), x, {"unit": unit}) for key, (x, unit) in values.items()}, attrs=said)


def _same_places(first: xr.DataArray, second: xr.DataArray) -> bool:
    """Whether two variables have the same axes in one order, of the same size, with the same names along each."""
    if dict(first.sizes) != dict(second.sizes) or first.dims != second.dims:
        return False
    return all(
        (dim in first.coords) == (dim in second.coords)
        and (dim not in first.coords or np.array_equal(first[dim].values, second[dim].values))
        for dim in first.dims
    )
