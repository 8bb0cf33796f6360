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


def traced() -> xr.Dataset:
    """What causal tracing returns: one prompt, its subject, and the metric of two runs of it."""
    g = np.random.default_rng(6)
    unit = {"unit": "probability"}
    maps = {kind: (("layer", "pos"), g.random((LAYERS, 5)), unit) for kind in ("resid", "mlp")}
    data = xr.Dataset(maps | {"clean": 0.9, "corrupt": 0.25, "corrupt_each": ("example", [0.25, 0.25], unit)})
    data["resid_each"] = (("example", "layer", "pos"), g.random((2, LAYERS, 5)), unit)
    coords = {"layer": range(LAYERS), "token": ("pos", CLEAN), "subject": ("pos", [False, True, True, False, False])}
    told = {"method": "causal tracing", "answer": " Seattle", "window": 3, "seed": 0}
    return data.assign_coords(coords).assign_attrs(told)


def estimated() -> xr.Dataset:
    """What attribution returns: estimates by site, some of them measured, and how far they hold."""
    data = fake()[["attn.z[head]", "clean", "corrupt"]].copy(deep=True)
    exact = np.full((LAYERS, HEADS), np.nan)
    exact[2, 1], exact[0, 0] = 0.75, -0.0625
    unit = {"unit": "logits"}
    data["attn.z[head]"].attrs.update(unit)
    data["attn.z[head]_exact"] = (("layer", "head"), exact, unit)
    data["rank_correlation"], data["measured"] = ("site", [0.875]), ("site", [2])
    told = {"method": "attribution patching", "rules": "plain", "direction": "noise", "answer_id": 3, "foil_id": 4}
    told |= {"clean_ids": [1, 2], "sites": ["attn.z[head]"]}
    return data.assign_coords(site=["attn.z[head]"]).drop_attrs(deep=False).assign_attrs(told)


def edges() -> xr.Dataset:
    """Scores of edges; NaN where there is none."""
    names = {"sender": ["embed", "0.attn.z[1]", "0.mlp_out"], "receiver": ["1.attn.q[0]", "1.mlp.in", "final"]}
    values = [[1.0, -4.0, 0.5], [np.nan, 2.0, -3.0], [np.nan, np.nan, 2.5]]
    return xr.Dataset({"score": (("sender", "receiver"), values, {"unit": "logits"})}, coords=names)
