"""A causal result of a model that does not exist, with everything in it that could break a table or a page."""

from __future__ import annotations

import numpy as np
import xarray as xr

LAYERS, HEADS = 4, 3
SCRIPT = "</script><script>document.title='broken'</script>"
CLEAN = ["The", " Paris", SCRIPT, "\x1b[31m\n", "\u202eis"]
CORRUPT = ["The", " Rome", SCRIPT, "\x1b[31m\n", "\u202eis"]


def fake() -> xr.Dataset:
    """Maps by position and by head with intervals, holes, and an infinite value."""
    g = np.random.default_rng(5)
    by_position = g.normal(size=(LAYERS, len(CLEAN))) / 3
    by_position[0] = np.nan
    by_position[1, 1] = -1.23456789
    by_head = g.normal(size=(LAYERS, HEADS)) / 9
    by_head[2, 1], by_head[3, 2] = 0.87654321, np.inf
    unit = {"unit": "share of the gap"}
    data = xr.Dataset(
        {
            "resid_pre": (("layer", "pos"), by_position, unit),
            "resid_pre_lo": (("layer", "pos"), by_position - 0.125, unit),
            "resid_pre_hi": (("layer", "pos"), by_position + 0.125, unit),
            "attn.z[head]": (("layer", "head"), by_head, unit),
            "clean": ((), 3.25, {}),
            "corrupt": ((), -2.5, {}),
        },
        coords={"layer": range(LAYERS), "clean_token": ("pos", CLEAN), "corrupt_token": ("pos", CORRUPT)},
    )
    told = {"method": "activation patching", "direction": "denoise", "answer": " <b>Paris", "foil": " Rome"}
    return data.assign_attrs(told | {"model": "Fake <i>& small", "fingerprint": "ab" * 8, "seed": 7, "seconds": 1.5})
