"""Of which kind each head is, as a column of the pages' table of heads; and the classes of neurons by name.

Formula:  the kinds of `head_types`, from the scores above their controls in the table. A head may be of several; it
          is named after the one furthest above its control, a sink only where it is of no other kind, since most
          heads are sinks beside what else they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import xarray as xr

from microtome.errors import DataError
from microtome.measurements import CLASSES, head_types

SINK, OTHER = "first token (sink)", "other"
MEANING = (
    "what kind of head it is: the kind whose score is furthest above its control, by 0.2 or more and with its interval "
    "above 0; a sink where it is of no other kind, and other where it is of none"
)


def kinds_of(heads: pa.Table) -> list[str] | None:
    """The kind of each head of a table, by row; None where no column measures one."""
    if not heads.num_rows:
        return None
    layers, numbers = (heads.column(name).to_numpy() for name in ("layer", "head"))
    size = (int(layers.max()) + 1, int(numbers.max()) + 1)
    variables: dict[str, Any] = {}
    # A list, of one value for each class or distance, is no score of the head; no kind is made of one.
    scores = [f.name for f in heads.schema if f.name.endswith(("_diff", "_diff_lo")) and not pa.types.is_list(f.type)]
    for name in scores:
        grid = np.full(size, np.nan)
        grid[layers, numbers] = heads.column(name).to_numpy().astype(np.float64)
        variables[name] = (("layer", "head"), grid)
    coords = {"layer": np.arange(size[0]), "head": np.arange(size[1])}
    try:
        found = head_types(xr.Dataset(variables, coords=coords))
    except DataError:
        return None
    excess = found["excess"].where(found["is_kind"])
    best = excess.drop_sel(kind=SINK, errors="ignore").transpose("kind", "layer", "head")
    names = best["kind"].values.astype(object)
    sink = found["is_kind"].sel(kind=SINK).values if SINK in found["kind"] else np.zeros(size, bool)
    strongest = np.where(np.isnan(best.values), -np.inf, best.values).argmax(0) if len(names) else np.zeros(size, int)
    named = np.asarray(np.isfinite(best.values).any(0))
    return [
        str(names[strongest[at]]) if named[at] else SINK if sink[at] else OTHER
        for at in zip(layers.tolist(), numbers.tolist(), strict=True)
    ]


def for_pages(
    manifest: Mapping[str, Any], tables: Mapping[str, pa.Table]
) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """Manifest and tables for the pages: with the kinds of heads where they were measured, and the names of classes."""
    shown, told = dict(tables), {name: dict(table) for name, table in manifest["tables"].items()}
    if "heads" in tables and (kinds := kinds_of(tables["heads"])) is not None:
        shown["heads"] = tables["heads"].append_column("kind", pa.array(kinds))
        told["heads"]["columns"] = told["heads"]["columns"] | {"kind": {"meaning": MEANING}}
    if "io_class" in (columns := told.get("neurons", {}).get("columns", {})):
        names = [*CLASSES, *(f"{name}, atypical" for name in CLASSES)]
        told["neurons"]["columns"] = columns | {"io_class": columns["io_class"] | {"names": names}}
    return {**manifest, "tables": told}, shown
