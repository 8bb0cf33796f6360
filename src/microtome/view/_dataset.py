"""What a labelled result says of itself: its variables and what belongs to each, its prompts, its title.

A result is an `xarray.Dataset`. A variable has the attributes `unit` and `meaning`, and may have `title`, `control`
(the variable to compare it with), `range` ([low, high], infinite where open) and `shade` (for text: the variable that
colours it). `X_lo` and `X_hi` are the ends of the 95 % interval of X, `X_p` its p-value, `X_diff` X minus its control
(with `X_diff_lo`, `X_diff_hi`, `X_diff_p` of its own), `X_each` its values by example, `X_exact` exact measurements of
an estimate, `X_source` what each X reads, by position. The dataset's own attributes say the `method` (a title), the
`reading` (how to read a value), the `metric`, `parts` that sum to `sum_of`, and where it comes from. Nothing here knows
a method by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

BESIDE = ("_lo", "_hi", "_p", "_each", "_exact", "_source", "_diff")
"""Endings of the variables that belong to another."""

AXES = (
    "layer", "head", "kv_head", "pos", "span", "neuron", "group", "sender", "receiver", "node", "component", "site",
    "feature", "answer", "share", "set", "attribute", "found_by", "variable", "part", "setting", "label", "estimate",
    "task", "program", "frequency", "round", "recipe", "state", "changed",
)  # fmt: skip
"""The axes that are drawn; an axis may say which of two it is: `q_pos`, `k_pos`, `group_2`, `other_group`."""

TITLES = {
    "resid": "residual stream",
    "resid_pre": "residual stream before the block",
    "resid_mid": "residual stream between the branches",
    "resid_post": "residual stream after the block",
    "attn": "attention output",
    "attn_out": "attention output",
    "mlp": "MLP output",
    "mlp_out": "MLP output",
    "attn.q": "queries",
    "attn.k": "keys",
    "attn.v": "values",
    "attn.z": "attention mix (z)",
    "attn.q[head]": "queries by head",
    "attn.k[head]": "keys by head",
    "attn.v[head]": "values by head",
    "attn.z[head]": "heads",
    "mlp.post[neuron]": "neurons",
}
"""Headings of variables that are named after a site and have no `title` of their own."""


def without_batch(data: xr.Dataset) -> xr.Dataset:
    """The same without a batch of one."""
    return data.isel(batch=0) if data.sizes.get("batch") == 1 else data


def axis_kind(axis: str) -> str:
    """What an axis is: "pos" for "k_pos", "group" for "group_2"; nothing where it is none that is drawn."""
    plain = axis.rstrip("0123456789").rstrip("_")
    last = plain.rpartition("_")[2]
    return plain if plain in AXES else last if last in AXES else ""


def own_variables(data: xr.Dataset) -> list[str]:
    """The variables that stand for themselves: not ends of an interval, controls, or shades of another."""
    beside = {f"{name}{end}" for name in data.data_vars for end in BESIDE}
    beside |= {str(v.attrs[key]) for v in data.data_vars.values() for key in ("control", "shade") if key in v.attrs}
    return [str(name) for name in data.data_vars if name not in beside]


def is_numeric(data: xr.Dataset, name: str) -> bool:
    """Whether a variable holds numbers."""
    return data[name].dtype.kind in "fiub"


def numbers(data: xr.Dataset, name: str) -> np.ndarray:
    """The values of a variable as float64; NaN where it is not finite."""
    found = np.asarray(data[name].values, dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def without_interval(data: xr.Dataset) -> str:
    """Why variables with an interval have none here: the rule of their interval; nothing where they have one."""
    ends = ((name, low) for name in map(str, data.data_vars) if (low := beside(data, name, "_lo")) is not None)
    lacks = any(np.isnan(low).all() and not np.isnan(numbers(data, name)).all() for name, low in ends)
    rule = str(data.attrs.get("interval", "")).partition(";")[2].strip()
    return f"too few examples for intervals: {rule}" if lacks and rule else ""


def beside(data: xr.Dataset, name: str, ending: str) -> np.ndarray | None:
    """The values of what belongs to a variable, such as "_lo", shaped like it; nothing where there is none."""
    other = name + ending
    fits = other in data and data[other].dims == data[name].dims and is_numeric(data, other)
    return numbers(data, other) if fits else None


def control(data: xr.Dataset, name: str) -> np.ndarray | None:
    """The values of a variable's control, shaped like it; one number stands for all."""
    other = str(data[name].attrs.get("control", ""))
    if other not in data or not is_numeric(data, other):
        return None
    held = data[other]
    if held.dims == data[name].dims:
        return numbers(data, other)
    if not set(held.dims) <= set(data[name].dims) or len(set(data[name].dims)) < data[name].ndim:
        return None
    spread = held.astype("float64").broadcast_like(data[name]).transpose(*data[name].dims)
    return np.asarray(spread.values)


def companions(data: xr.Dataset, name: str) -> dict[str, np.ndarray]:
    """What is shown beside each value of a variable, where there is such.

    Exact measurements, the control, the difference of both and from where to where its interval goes, and p-values.
    """
    low, high = (beside(data, name, f"_diff_{end}") for end in ("lo", "hi"))
    known = low is not None and not np.isnan(low).all()
    found = {
        "exact": beside(data, name, "_exact"),
        "control": control(data, name),
        "difference": beside(data, name, "_diff"),
        "from": low if known else None,
        "to": high if known else None,
        "p": beside(data, name, "_p"),
    }
    return {key: values for key, values in found.items() if values is not None}


def title(data: xr.Dataset, name: str) -> str:
    """The heading of a variable."""
    caption = data[name].attrs.get("title") if name in data else None
    return str(caption or TITLES.get(name, name.replace("_", " ")))


def unit(data: xr.Dataset, name: str) -> str:
    """What a value of a variable counts."""
    return str(data[name].attrs.get("unit", ""))


def labels(data: xr.Dataset, axis: str) -> tuple[str, ...]:
    """The name of each place on an axis: its coordinate, else its number; `before` is the name of the place -1."""
    if axis not in data.coords:
        return tuple(map(str, range(data.sizes[axis])))
    held, before = [str(value) for value in data[axis].values.tolist()], data[axis].attrs.get("before")
    return tuple(str(before) if name == "-1" and before is not None else name for name in held)


# ------------------------------------------------------------------------------------------------ the prompts and title


def tokens_of(data: xr.Dataset) -> dict[str, tuple[str, ...]]:
    """The prompts that a dataset tells of, token by token: "clean" and "corrupt", or "prompt"."""
    named = {"clean": "clean_token", "corrupt": "corrupt_token"}
    if not all(coordinate in data.coords for coordinate in named.values()):
        named = {"prompt": next((c for c in ("token", "prompt", "clean_token") if c in data.coords), "")}
    return {
        role: tuple(str(w) for w in data[c].values.reshape(-1).tolist())
        for role, c in named.items()
        if c in data.coords and data[c].dims == ("pos",)
    }


def places_marked(data: xr.Dataset) -> list[int]:
    """The positions that matter: where two prompts differ, or the subject's."""
    if "subject" in data.coords and data["subject"].dims == ("pos",):
        return np.flatnonzero(data["subject"].values).tolist()
    prompts = list(tokens_of(data).values())
    return [i for i, words in enumerate(zip(*prompts, strict=True)) if len(set(words)) > 1]


def prompts_of(data: xr.Dataset) -> list[tuple[str, tuple[str, ...], float | None]]:
    """The prompts, each with its role and the metric there; the metric of a run without a prompt of its own too."""
    tokens = tokens_of(data)
    caption = [(role, words, _scalar(data, role)) for role, words in tokens.items()]
    return caption + [
        (role, (), _scalar(data, role))
        for role in ("clean", "corrupt")
        if role not in tokens and _scalar(data, role) is not None
    ]


def _scalar(data: xr.Dataset, name: str) -> float | None:
    single = name in data.data_vars and data[name].ndim == 0 and is_numeric(data, name)
    return float(data[name]) if single else None


def metric_of(data: xr.Dataset) -> str:
    """What is read off each run, in words."""
    return str(data.attrs.get("metric", ""))


def reading_of(data: xr.Dataset) -> str:
    """How a value is to be read."""
    return str(data.attrs.get("reading", ""))


def sought(data: xr.Dataset) -> list[str]:
    """The answer, and the foil where there is one."""
    found = [data.attrs.get(name, _word(data, name)) for name in ("answer", "foil")]
    return [str(word) for word in found if word is not None]


def _word(data: xr.Dataset, name: str) -> object:
    return data[name].values.item() if name in data.coords and data[name].ndim == 0 else None


def title_of(data: xr.Dataset) -> str:
    """The method and what it was asked: "Title of the method: Paris rather than Rome"."""
    method = str(data.attrs.get("method", "results"))
    asked = " rather than ".join(word.strip() for word in sought(data))
    return method[:1].upper() + method[1:] + (f": {asked}" if asked else "")


def in_header(data: xr.Dataset) -> set[str]:
    """The single numbers that stand beside the prompts."""
    return {role for role, _, value in prompts_of(data) if value is not None}
