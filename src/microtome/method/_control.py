"""Columns minus their controls, of questions about prompts: made from the declaration, for every method alike."""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from torch import Tensor

from microtome.context import current
from microtome.method._declare import DIFFERENCE, Column, Method
from microtome.stream import mean_interval, sign_flip

EACH = "_each"
EXAMPLE = "example"


def with_differences(method: Method, data: xr.Dataset, weights: Tensor | None) -> xr.Dataset:
    """The same with every column minus its control, which holds wherever both are numbers on axes that fit.

    Where values were kept by example, so is the difference, and it has an interval and, where the column has one, a
    p-value of its own: of two columns the same example is subtracted, and a value without examples counts as known.
    """
    found: dict[str, Any] = {}
    for column in method.columns:
        if _has_control(column, data):
            found |= _difference(column, data, weights)
    return data.assign(found)


def _has_control(column: Column, data: xr.Dataset) -> bool:
    pair = [data[name] for name in (column.name, column.control) if name in data.data_vars]
    return len(pair) == 2 and all(x.dtype.kind in "fiu" for x in pair) and set(pair[1].dims) <= set(pair[0].dims)


def _difference(column: Column, data: xr.Dataset, weights: Tensor | None) -> dict[str, Any]:
    own, control = (data[name].astype("float64") for name in (column.name, column.control))
    attrs = {"unit": own.attrs["unit"]} if "unit" in own.attrs else {}
    name = f"{column.name}_{DIFFERENCE}"
    found = {name: (own - control).transpose(*own.dims).assign_attrs(attrs)}
    examples = [data.get(f"{of}{EACH}") for of in (column.name, column.control)]
    if EXAMPLE in own.dims or all(x is None for x in examples):
        return found
    counts = 1.0 if weights is None else xr.DataArray(weights.double().cpu().numpy(), dims=EXAMPLE)
    both = zip((own, control), examples, strict=True)
    first, second = (alone * counts if each is None else each for alone, each in both)
    each = torch.from_numpy((first - second).transpose(EXAMPLE, *own.dims).values.copy())
    _, low, high = mean_interval(each, weights=weights)
    ends = {"_lo": low, "_hi": high} | ({"_p": sign_flip(each, seed=current().seed)} if column.test else {})
    units = {"_p": {"unit": "probability"}}
    return found | {name + end: (own.dims, x.numpy(), units.get(end, attrs)) for end, x in ends.items()}
