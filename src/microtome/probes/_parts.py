"""What writes a probe's logit into the stream: each attention and each MLP, directly and through what follows."""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from torch import Tensor

from microtome.anatomy import Site, parse
from microtome.errors import ArgumentError, error
from microtome.model import Model
from microtome.probes._examples import Examples
from microtome.probes._probe import Probe
from microtome.probes._states import placed

STREAM = ("resid_pre", "resid_mid", "resid_post")
BRANCHES = ("attn_out", "mixer_out", "mlp_out")


def parts(
    probe: Probe, model: Model, text: Any, layer: int, label: str | None = None, *, position: int | str | None = None
) -> xr.Dataset:
    """Which attentions and MLPs give a probe its logit on one text.

    Formula:  z = w . x, x the stream where it is probed, w the class's weight minus the mean of the others'.
              direct of a branch = w . (what it adds to the stream there); z = their sum + embed + rest, rest what the
              stream holds that no branch writes. gradient of a branch = sum over positions of (dz / d output) . output,
              through all that lies between.
    Source:   O'Neill et al., "A Single Direction of Truth: An Observer Model's Linear Residual Probe Exposes and Steers
              Contextual Hallucinations", 2025. Departs: direct parts beside gradients.
    Cost:     one forward and one backward.
    Check:    the direct parts sum to the logit; tests/laws/test_probes_causal.py.

    Args:
        probe: a linear one of the stream.
        model: that it was fitted to.
        text: a text, or token ids.
        layer: whose probe.
        label: towards which class; see `Probe.direction`.
        position: a position or a span of the text; by default that of the address.

    Returns:
        Dataset over (layer): `attn`, `mlp` (and `mixer`) direct, `attn_gradient`, `mlp_gradient`; `embed`, `rest`,
        `logit`, in the units of the logit, without its offset.

    Raises:
        ArgumentError: the probe is not linear, or not of the stream; rows named where they were probed, and
            `position` does not.
        DataError: it is of another model.
    """
    sites = [name for name in probe.sites if parse(name).name in STREAM]
    if len({parse(name).name for name in sites}) != 1:
        what = "only a logit of one site of the stream is a sum of what branches write"
        raise error(ArgumentError, what, got=", ".join(probe.sites[:3]), do='fit site="*.resid_post@-1"')
    name = probe.at(layer, parse(sites[0]).name)
    probe.require(model, name)
    vector = probe.normal(layer, label, site=parse(sites[0]).name)  # refuses what is not linear
    if position is None:
        probe.require_place("name a position or a span of the text: position=")
    row = Examples(
        "text", (text if isinstance(text, str) else tuple(text),), (), places=(position,), where=("the text",)
    )
    at = placed(model, row, parse(name), "mean" if probe.pool == "mean" else "last")
    whole = name.partition("@")[0]
    branches = [f"{i}.{b}" for i in range(layer + 1) for b in BRANCHES if Site(b, i) in model.anatomy.hook_points]
    run = model.run([list(at.rows[0])], capture=["0.resid_pre", whole, *branches], grad=True, logits=False)
    columns = list(at.columns[0])

    def read(x: Tensor) -> Tensor:
        """The logit of the mean of the positions."""
        return x[0, columns].mean(0) @ vector.to(x)

    logit = read(run[whole])
    slopes = run.grad(logit)
    values = {f"{b.removesuffix('_out')}{end}": torch.full((layer + 1,), torch.nan, dtype=torch.float64)
              for b in BRANCHES for end in ("", "_gradient")}  # fmt: skip
    for branch in branches:
        i, kind = parse(branch).layers, branch.partition(".")[2].removesuffix("_out")
        assert i is not None
        assert i.ranges is not None
        values[kind][i.ranges[0][0]] = float(read(run[branch].detach()))
        values[f"{kind}_gradient"][i.ranges[0][0]] = float((slopes[branch] * run[branch].detach()).sum())
    return _dataset(values, float(read(run["0.resid_pre"].detach())), float(logit.detach()), parse(name).name, layer)


def _dataset(values: dict[str, Tensor], embed: float, logit: float, site: str, layer: int) -> xr.Dataset:
    values = {name: x for name, x in values.items() if bool(x.isfinite().any())}
    if site != "resid_post":  # what is written behind it takes no part
        values = {name: x.clone() for name, x in values.items()}
        late = [n for n in values if not n.endswith("_gradient") and (site == "resid_pre" or n == "mlp")]
        for name in late:
            values[name][layer] = 0.0
    direct = sum(float(x.nansum()) for name, x in values.items() if not name.endswith("_gradient"))
    data = xr.Dataset({name: ("layer", x.numpy()) for name, x in values.items()})
    for name in data.data_vars:
        how = "through what follows" if str(name).endswith("_gradient") else "directly"
        data[name].attrs.update(unit="logits", meaning=f"what the branch adds to the probe's logit {how}")
    told = {"embed": embed, "logit": logit, "rest": logit - embed - direct}
    return data.assign({name: ((), x, {"unit": "logits"}) for name, x in told.items()})
