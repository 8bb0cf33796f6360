"""Two atlases of models of one shape: which columns differ, in how many units, and where most.

Formula:  change = b - a, of each column of numbers that both have, by layer, head or neuron. Where a column has 95 %
          intervals a unit is `apart` if its two intervals do not overlap; of units that are the same that is seldom,
          for which reason fewer are apart than would differ by an interval of the difference itself.
Law:      an atlas compared with itself has no change; exchanged, every change has the other sign.
Check:    tests/laws/test_atlas_compare.py.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from microtome.atlas._read import TABLE_OF, Atlas
from microtome.atlas._read import open as open_atlas
from microtome.errors import DataError, MicrotomeWarning, error

if TYPE_CHECKING:
    import pandas as pd

SHAPE = ("n_layers", "n_heads", "n_kv_heads", "d_mlp")
"""What must agree for units to correspond."""

ENDS = ("_lo", "_hi")


def compare(a: Atlas | str | Path, b: Atlas | str | Path, *, top: int = 5) -> pd.DataFrame:
    """What differs between two atlases, from their tables alone; `mt.compare` measures two models anew, with pairs.

    Cost:  reads the columns of numbers of both.
    Check: tests/laws/test_atlas_compare.py.

    Args:
        a: an atlas, or its folder.
        b: another, of a model of the same shape.
        top: how many units to name.

    Returns:
        A row per column, those first whose units are apart most often: `table`, `column`, `unit`, `units` (compared),
        `apart` (units whose intervals do not overlap; None where there are none), `largest` (the largest change, b - a)
        and `where` (the units that differ most).

    Raises:
        DataError: there is no atlas, or the models have other shapes.

    Warns:
        MicrotomeWarning: the atlases were made of different texts, so that differences are not of the models alone.
    """
    first, second = (one if isinstance(one, Atlas) else open_atlas(one) for one in (a, b))
    _require_alike(first, second)
    pd: Any = importlib.import_module("pandas")
    rows = [row for name in TABLE_OF.values() for row in _of_table(first, second, name, top)]
    columns = ["table", "column", "unit", "units", "apart", "largest", "where"]
    found = pd.DataFrame(rows, columns=columns).astype({"apart": "Int64"})
    share = (found["apart"].astype("Float64") / found["units"]).fillna(-1.0)
    return found.loc[share.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _require_alike(a: Atlas, b: Atlas) -> None:
    """Refuse atlases whose units do not correspond."""
    shapes = [{name: one.manifest["model"].get(name) for name in SHAPE} for one in (a, b)]
    other = [f"{name} {shapes[0][name]} and {shapes[1][name]}" for name in SHAPE if shapes[0][name] != shapes[1][name]]
    if other:
        names = " and ".join(str(one.manifest["model"]["name"]) for one in (a, b))
        what = f"the atlases of {names} have other shapes, so that their units do not correspond"
        raise error(DataError, what, got=", ".join(other), do="compare atlases of one architecture")
    texts = [one.manifest["text"] for one in (a, b)]
    if texts[0]["sha256"] != texts[1]["sha256"]:
        what = "the atlases were made of different texts: what differs is not of the models alone"
        told = error(DataError, what, got=" and ".join(text["source"] for text in texts), do="make both of one text")
        warnings.warn(str(told), MicrotomeWarning, stacklevel=3)


def _of_table(a: Atlas, b: Atlas, name: str, top: int) -> list[dict[str, Any]]:
    """The rows of the columns of one table."""
    told = a.manifest["tables"].get(name, {}).get("columns", {})
    both = [c for c in told if c in b.manifest["tables"].get(name, {}).get("columns", {}) and not c.endswith(ENDS)]
    if not both:
        return []
    one, other = a.table(name).align(b.table(name), join="inner")
    found: list[dict[str, Any]] = []
    for column in (c for c in both if c in one and one[c].dtype.kind == "f" and other[c].dtype.kind == "f"):
        change = (other[column].astype(float) - one[column].astype(float)).to_numpy()
        size = np.nan_to_num(np.abs(change))
        order = [k for k in np.argsort(-size, kind="stable")[:top].tolist() if size[k] > 0]
        found.append({
            "table": name, "column": column, "unit": told[column].get("unit", ""),
            "units": int(np.isfinite(change).sum()), "apart": _apart(one, other, column),
            "largest": float(change[order[0]]) if order else 0.0,
            "where": [".".join(map(str, np.atleast_1d(np.asarray(one.index[k])).tolist())) for k in order],
        })  # fmt: skip
    return found


def _apart(a: pd.DataFrame, b: pd.DataFrame, column: str) -> int | None:
    """How many units have intervals that do not overlap; None where a table has none."""
    names = [f"{column}{end}" for end in ENDS]
    if not all(name in table for table in (a, b) for name in names):
        return None
    (a_lo, a_hi), (b_lo, b_hi) = ([table[name].astype(float).to_numpy() for name in names] for table in (a, b))
    return int(((a_hi < b_lo) | (b_hi < a_lo)).sum()) if np.isfinite(a_lo + b_lo).any() else None
