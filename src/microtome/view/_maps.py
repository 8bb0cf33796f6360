"""Heat maps of a causal result: what a terminal and a page draw alike.

A dataset of effects holds one variable a site over (layer, pos), (layer, head) or another two axes. Here each becomes a
map with the names of its rows and columns; maps of one unit share one scale, symmetric about zero, so that colours can
be compared between them. What was not measured is NaN and stays missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from microtome.errors import DataError, error

if TYPE_CHECKING:
    import xarray as xr

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
}
BESIDE = ("_lo", "_hi", "_exact")
"""Endings of variables that belong to another: the ends of its interval, and what exact measurement gave."""


@dataclass(frozen=True)
class HeatMap:
    """One map: layers from left to right where the variable has layers, what else it has from top to bottom.

    Attributes:
        name: of the variable.
        values: [row, column], float64; NaN where nothing finite was measured.
        bounds: the ends of the 95 % interval, each like `values`; none where the variable has no interval.
        exact: what the cells of an estimate measured that were checked, like `values`; none where none was.
        across, down: the axes of columns and rows.
        columns, rows: the name of each.
        unit: what a value counts.
        listed: whether its strongest cells are listed: not those of a map that sums another up.
    """

    name: str
    values: np.ndarray
    bounds: tuple[np.ndarray, np.ndarray] | None
    exact: np.ndarray | None
    across: str
    down: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    unit: str
    listed: bool = True

    @property
    def title(self) -> str:
        """What the map shows, in words."""
        return TITLES.get(self.name, self.name.replace("_", " "))

    def strongest(self, most: int) -> list[tuple[int, int]]:
        """(row, column) of the largest values of either sign, largest first; what is missing or zero is left out."""
        flat = np.nan_to_num(np.abs(self.values), nan=0.0).reshape(-1)
        order = np.argsort(-flat, kind="stable")[:most]
        width = self.values.shape[1]
        return [(int(i) // width, int(i) % width) for i in order if flat[i] > 0]


def maps_of(data: xr.Dataset) -> list[HeatMap]:
    """The maps of a dataset: each of its variables with two axes, in their order.

    Raises:
        DataError: it holds none.
    """
    ends = {f"{name}{end}" for name in data.data_vars for end in BESIDE}
    names = [str(n) for n, v in data.data_vars.items() if v.ndim == 2 and n not in ends and v.dtype.kind in "fiub"]
    if not names:
        held = ", ".join(f"{n} over ({', '.join(map(str, v.dims))})" for n, v in data.data_vars.items())
        raise error(
            DataError, "nothing to draw as a heat map", got=held or "no variable", allowed="numbers on two axes"
        )
    maps = [_map(data, name) for name in names]
    return maps + [_by_layer(one) for one in maps if one.across == "receiver"]


def _map(data: xr.Dataset, name: str) -> HeatMap:
    first, second = (str(d) for d in data[name].dims)
    across, down = (second, first) if second == "layer" else (first, second)
    if "sender" in (first, second):  # an edge reads from its sender down to its receiver
        across, down = (second, first) if first == "sender" else (first, second)

    def values(variable: str) -> np.ndarray:
        found = np.asarray(data[variable].transpose(down, across).values, dtype=np.float64)
        return np.where(np.isfinite(found), found, np.nan)

    low, high, exact = (values(name + end) if name + end in data else None for end in BESIDE)
    bounds = None if low is None or high is None else (low, high)
    unit = str(data[name].attrs.get("unit", ""))
    return HeatMap(name, values(name), bounds, exact, across, down, labels(data, across), labels(data, down), unit)


def _by_layer(edges: HeatMap) -> HeatMap:
    """The strongest edge between every two layers: edges themselves are too many to be seen."""
    names = [tuple(name.partition(".")[0] for name in axis) for axis in (edges.rows, edges.columns)]
    rows, columns = (tuple(dict.fromkeys(axis)) for axis in names)
    across = np.array([columns.index(n) for n in names[1]])
    place = (np.array([rows.index(n) for n in names[0]])[:, None] * len(columns) + across).reshape(-1)
    flat = edges.values.reshape(-1)
    known = np.flatnonzero(np.isfinite(flat))
    found = np.full(len(rows) * len(columns), np.nan)
    for i in known[np.argsort(np.abs(flat[known]), kind="stable")]:
        found[place[i]] = flat[i]  # the strongest comes last, and stays
    title = f"strongest {edges.name} between two layers"
    values = found.reshape(len(rows), len(columns))
    return HeatMap(title, values, None, None, "receiver layer", "sender layer", columns, rows, edges.unit, listed=False)


def labels(data: xr.Dataset, axis: str) -> tuple[str, ...]:
    """The name of each place on an axis: its coordinate, else its number."""
    held = data[axis].values.tolist() if axis in data.coords else range(data.sizes[axis])
    return tuple(str(value) for value in held)


def tokens_of(data: xr.Dataset) -> dict[str, tuple[str, ...]]:
    """The prompts that a dataset tells of, token by token: "clean" and "corrupt", or "prompt"."""
    named = {"clean": "clean_token", "corrupt": "corrupt_token"}
    if not all(coordinate in data.coords for coordinate in named.values()):
        named = {"prompt": next((c for c in ("token", "prompt", "clean_token") if c in data.coords), "")}
    return {
        role: tuple(str(w) for w in data[c].values.reshape(-1).tolist())
        for role, c in named.items()
        if c in data.coords and data[c].ndim == 1
    }


def limits_of(maps: Sequence[HeatMap]) -> dict[str, float]:
    """The end of the scale of each unit: the largest value of either sign that any of its maps holds."""
    found: dict[str, float] = {}
    for one in maps:
        known = np.abs(one.values[np.isfinite(one.values)])
        found[one.unit] = max(found.get(one.unit, 0.0), float(known.max()) if known.size else 0.0)
    return {unit: limit if limit > 0 else 1.0 for unit, limit in found.items()}


def metric_of(data: xr.Dataset) -> str:
    """What is read off each run, in words; nothing where the dataset does not say."""
    if data.attrs.get("method") == "causal tracing":
        return "probability of the answer"
    named = ("answer", "answer_id", "foil", "foil_id")
    answer, foil = (any(name in data.attrs for name in pair) for pair in (named[:2], named[2:]))
    if not answer:
        return str(data.attrs.get("metric", ""))
    return "logit difference" if foil else "log-probability of the answer"


DENOISE = (
    "Each cell is one run of the corrupt prompt with one activation taken from the clean run: 0 leaves the corrupt "
    "answer, 1 restores the clean one."
)
NOISE = (
    "Each cell is one run of the clean prompt with one activation taken from the corrupt run: 0 leaves the clean "
    "answer, 1 turns it into the corrupt one."
)
TRACE = (
    "Each cell is the run whose subject is corrupted, with one state given back as the clean run had it: by how much "
    "that raises the probability of the answer."
)
ESTIMATE = (
    "Each cell is an estimate, from one gradient, of what {what} would do to the {metric}: above 0 raises it. The "
    "strongest were measured as well: see exact."
)


def reading_of(data: xr.Dataset) -> str:
    """How a value is to be read, in a sentence or two; nothing where the dataset does not say what it is."""
    method, direction = (str(data.attrs.get(name, "")) for name in ("method", "direction"))
    if method == "causal tracing":
        window = data.attrs.get("window")
        return TRACE + (f" Branches are given back over {window} layers at once." if window else "")
    if "rules" in data.attrs:
        given = "corrupt" if direction == "noise" else "clean"
        told = ESTIMATE.format(what=f"taking it from the {given} run", metric=metric_of(data))
        return told if "site" in data.dims else told.partition(" The strongest")[0]
    return {"denoise": DENOISE, "noise": NOISE}.get(direction, "")


def places_marked(data: xr.Dataset) -> list[int]:
    """The positions that matter: where two prompts differ, or the subject's."""
    if "subject" in data.coords and data["subject"].dims == ("pos",):
        return np.flatnonzero(data["subject"].values).tolist()
    prompts = list(tokens_of(data).values())
    return [i for i, words in enumerate(zip(*prompts, strict=True)) if len(set(words)) > 1]


def prompts_of(data: xr.Dataset) -> list[tuple[str, tuple[str, ...], float | None]]:
    """The prompts, each with its role and the metric there; the metric of a run without a prompt of its own too."""
    tokens = tokens_of(data)
    told = [(role, words, _scalar(data, role)) for role, words in tokens.items()]
    return told + [
        (role, (), _scalar(data, role)) for role in ("clean", "corrupt") if role not in tokens and role in data
    ]


def _scalar(data: xr.Dataset, name: str) -> float | None:
    return float(data[name]) if name in data and data[name].ndim == 0 else None


def checks_of(data: xr.Dataset) -> dict[str, dict[str, float]]:
    """What exact measurement said of each map's estimates: by map, what was compared and how well it held."""
    if "site" not in data.coords:
        return {}
    names = [str(n) for n, v in data.data_vars.items() if v.dims == ("site",)]
    return {str(s): {n: float(data[n].values[i]) for n in names} for i, s in enumerate(data["site"].values)}
