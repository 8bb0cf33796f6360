"""One table of what kind each head is, by all scores that measure a kind, above their controls.

Formula:  a head is of a kind if its score minus the control is at least `threshold` (0.2), and the interval of that
          difference lies above 0 where there is one; it may be of several kinds. Its name is the kind with the largest
          difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from microtome.errors import ArgumentError, DataError, error

KINDS: Mapping[str, str] = {
    "previous token": "previous_token",
    "duplicate token": "duplicate",
    "induction": "induction",
    "first token (sink)": "first_token",
    "delimiters": "delimiter_attention",
    "the token itself": "self_attention",
    "next token": "next_attention",
    "previous token in text": "previous_attention",
    "near tokens": "within_4",
    "bigrams": "ngram2_attention",
    "trigrams": "ngram3_attention",
    "4-grams": "ngram4_attention",
    "copying (weights)": "ov_copying",
    "successors (weights)": "successor",
    "relations (weights)": "maps_",
    "suppression (weights)": "suppress_",
}
"""The column that measures each kind; one that ends in _ stands for all that begin so."""
MEASURES = ("induction", "attention_targets", "head_map", "ov_copying", "head_functions")
"""The measures that have these columns."""
OTHER = "other"


def head_types(data: xr.Dataset, *, threshold: float = 0.2) -> xr.Dataset:
    """Which kind each head is of: the coverage table of all measures of heads that were run.

    Formula:  see this file's head.
    Source:   Zheng et al., "Attention Heads of Large Language Models: A Survey", 2024 (2409.03752), the list of kinds.
              Departs: kinds by their controls; the threshold is ours; kinds that need generated text (retrieval) or
              labels (syntax) are not in the list.
    Check:    heads that were made are of their kind and of no other; tests/laws/test_head_map.py.

    Args:
        data: of ``mt.measure(model, *MEASURES)``, or of some of these; kinds that were not measured are left out.
        threshold: by how much a score must exceed its control.

    Returns:
        A dataset: `is_kind` [kind, layer, head] (boolean), `excess` [kind, layer, head] the score minus its control,
        `name` [layer, head] the strongest, "other" where there is none, and `heads` [kind] how many heads are of it.

    Raises:
        ArgumentError: the threshold is not positive.
        DataError: no measure of heads is in the dataset.

    >>> head_types(mt.measure(model, "induction", "attention_targets", "head_map"))["name"]
    """
    if not threshold > 0:
        raise error(ArgumentError, "threshold must be above 0", got=threshold, do="leave it at 0.2")
    excess = {kind: x for kind, name in KINDS.items() if (x := _excess(data, name)) is not None}
    if not excess:
        allowed = ", ".join(MEASURES)
        raise error(DataError, "no column measures a kind of head", got=", ".join(map(str, data)) or "nothing",
                    allowed=allowed, do="run one of these measures")  # fmt: skip
    size = np.stack([np.nan_to_num(x, nan=0.0) for x, _ in excess.values()])
    sure = np.stack([fine for _, fine in excess.values()])
    fits = (size >= threshold) & sure
    strongest = np.where(fits, size, -np.inf).argmax(0)
    names = np.array([*excess, OTHER], dtype=object)
    kind = names[np.where(fits.any(0), strongest, len(excess))].astype(str)
    axes = ("kind", "layer", "head")
    coords = {"kind": list(excess), "layer": data["layer"].values, "head": data["head"].values}
    variables: dict[str, Any] = {
        "is_kind": (axes, fits), "excess": (axes, size, {"unit": "share"}), "name": (axes[1:], kind),
        "heads": (axes[:1], fits.sum((1, 2)), {"unit": "heads"}),
    }  # fmt: skip
    return xr.Dataset(variables, coords=coords, attrs=dict(data.attrs) | {"threshold": threshold})


def _excess(data: xr.Dataset, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]] | None:
    """A score minus its control [layer, head], and where it is surely above; of several the largest."""
    every = [str(v) for v in data if str(v).startswith(name) and str(v).endswith("_diff")] if name.endswith("_") else []
    every = every or ([f"{name}_diff"] if f"{name}_diff" in data else [])
    if not every:
        return None
    found = np.stack([data[v].transpose("layer", "head").values for v in every])
    sure = np.ones_like(found, dtype=bool)
    for at, variable in enumerate(every):
        if f"{variable}_lo" in data:
            low = data[f"{variable}_lo"].transpose("layer", "head").values
            sure[at] = ~(low <= 0)  # too few examples for an interval leave the score alone
    best = np.where(sure, np.nan_to_num(found, nan=-np.inf), -np.inf).argmax(0)[None]
    return np.take_along_axis(found, best, 0)[0], np.take_along_axis(sure, best, 0)[0]
