"""The effects of a sweep of your own, on average over its prompts."""

from __future__ import annotations

import torch
import xarray as xr

from microtome.context import current
from microtome.errors import DataError, error
from microtome.stream import OF_MEANS, mean_interval, sign_flip
from microtome.sweep import SweepResult


def over_prompts(swept: SweepResult) -> xr.Dataset:
    """The effects of a sweep on average over its prompts, of which each has the same cells in the same order.

    Formula:  mean over prompts of values - base, cell by cell; interval of `mean_interval`; p-value of sign flips.
    Source:   as `mean_interval` and `sign_flip`. Departs: none.
    Cost:     no forward.
    Check:    equal to both of these on the effects of each prompt; tests/laws/test_sweep.py.

    Args:
        swept: the result of a sweep over several prompts.

    Returns:
        Dataset over (cell, ...): `effect`, `effect_lo`, `effect_hi`, `effect_p`; `effect_each` (example, cell, ...);
        in units of the metric. Prompts of which a stopped sweep did not reach every cell are left out.

    Raises:
        DataError: prompts have different numbers of cells, or none was reached whole.

    >>> swept = model.sweep(prompts, cells * 5, metric, prompts=[i for i in range(5) for _ in cells]).run()
    >>> over_prompts(swept)["effect_lo"]
    """
    numbers = torch.tensor(swept.prompts)
    each = [swept.effects[numbers == prompt] for prompt in numbers.unique()]
    sizes = sorted({len(part) for part in each})
    if len(sizes) != 1:
        what, do = "the prompts of this sweep do not have the same cells", "sweep as many cells of every prompt"
        raise error(DataError, what, got=f"{sizes} cells", do=do)
    whole = [part for part in each if bool(part.isfinite().all())]
    if not whole:
        raise error(DataError, "no prompt of this sweep was measured to its end", do="let it run longer")
    values, seed = torch.stack(whole).double(), current().seed
    dims = ("cell", *(f"value_{i}" for i in range(values.dim() - 2)))
    mean, low, high = mean_interval(values)
    parts = {"": mean, "_lo": low, "_hi": high, "_p": sign_flip(values, seed=seed)}
    data = xr.Dataset({f"effect{end}": (dims, x.numpy()) for end, x in parts.items()})
    data["effect_each"] = (("example", *dims), values.numpy())
    return data.assign_attrs(seed=seed, examples=len(whole), interval=OF_MEANS)
