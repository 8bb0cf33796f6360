"""Results of a model that does not exist, of every form, with everything in them that could break a table or a page."""

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
    told |= {"metric": "logit difference", "reading": "0 leaves the corrupt answer, 1 fully restores the clean one."}
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
    told |= {"metric": "probability of the answer", "reading": "By how much a state given back raises it."}
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
    told |= {"clean_ids": [1, 2], "sites": ["attn.z[head]"], "reading": "An estimate, from one gradient."}
    site = ("site", ["attn.z[head]"], {"title": "how reliable the estimates are"})
    return data.assign_coords(site=site).drop_attrs(deep=False).assign_attrs(told)


def edges() -> xr.Dataset:
    """Scores of edges; NaN where there is none."""
    names = {"sender": ["embed", "0.attn.z[1]", "0.mlp_out"], "receiver": ["1.attn.q[0]", "1.mlp.in", "final"]}
    values = [[1.0, -4.0, 0.5], [np.nan, 2.0, -3.0], [np.nan, np.nan, 2.5]]
    return xr.Dataset({"score": (("sender", "receiver"), values, {"unit": "logits"})}, coords=names)


def over_layers() -> xr.Dataset:
    """A line over layers with its interval and control, one without, and single numbers."""
    values = np.array([0.25, -1.5, np.nan, 0.75])
    unit = {"unit": "nats", "meaning": "change of <b>loss</b>"}
    data = xr.Dataset({"change": ("layer", values, unit | {"title": "change of the loss", "control": "random"})})
    data["change_lo"], data["change_hi"] = ("layer", values - 0.125), ("layer", values + 0.125)
    data["random"] = ("layer", [0.0, 0.0625, 0.0, -0.03125], unit)
    data["gain"] = ("layer", [1.0, 2.0, 3.0, 4.0], {"unit": "ratio"})
    data["loss"], data["rows"] = ((), 2.5, {"unit": "nats"}), ((), 12000, {"unit": "tokens"})
    return data.assign_coords(layer=range(LAYERS)).expand_dims("batch").assign_attrs(method="skipping")


def over_neurons() -> xr.Dataset:
    """Values of neurons with one that stands out in each direction, and a control."""
    values = np.random.default_rng(8).normal(size=(LAYERS, 50)) / 10
    values[3, 17], values[0, 4], values[1, 1] = 2.5, -1.25, np.nan
    more = {"unit": "share", "title": "selectivity", "control": "shuffled"}
    data = xr.Dataset({"selectivity": (("layer", "neuron"), values, more)})
    return data.assign(shuffled=(("layer", "neuron"), values / 8)).assign_coords(layer=range(LAYERS))


def over_groups() -> xr.Dataset:
    """A matrix of groups, values of each group, and a variable whose axes are drawn nowhere."""
    names = ["code", "<i>law", "news"]
    data = xr.Dataset(
        {"similarity": (("group", "other_group"), np.eye(3) - 0.25, {"unit": "cosine", "range": [-1, 1]})}
    )
    data["count"], data["mean"] = ("group", [3, 4, 5]), ("group", [0.5, -0.25, np.nan], {"unit": "activation"})
    data["spread"] = (("group", "colour"), np.ones((3, 2)))
    return data.assign_coords(group=names, other_group=names).assign_attrs(method="similarity of groups")


def words() -> xr.Dataset:
    """Tokens by layer, position and rank with their probability, and a number by layer and position."""
    tokens = np.array(
        [[[f" w{layer}{pos}{rank}" for rank in range(2)] for pos in range(5)] for layer in range(3)], object
    )
    tokens[2, 4] = [" <i>Paris", "\n"]
    p = np.linspace(0, 1, 30).reshape(3, 5, 2)
    ranked = ("layer", "pos", "rank")
    data = xr.Dataset({"word": (ranked, tokens, {"title": "top tokens", "shade": "probability"})})
    data["probability"], data["ids"] = (ranked, p), (ranked, np.arange(30).reshape(3, 5, 2))
    data["entropy"] = (("layer", "pos"), p[..., 0], {"unit": "nats"})
    coords = {"layer": ("layer", [-1, 0, 1], {"before": "embed"}), "token": ("pos", CLEAN)}
    return data.assign_coords(coords).assign_attrs(method="lens")


def parts() -> xr.Dataset:
    """Parts that sum to a number, heads with what they read."""
    heads = np.array([[3.0, -0.5], [0.0, 1.0]])
    unit = {"unit": "logits"}
    data = xr.Dataset({"embed": ((), 0.25, unit | {"title": "embedding"}), "attn": (("layer", "head"), heads, unit)})
    data["mlp"] = ("layer", [-2.0, 0.125], unit | {"title": "MLP"})
    data["attn_source"] = (("layer", "head", "k_pos"), np.stack([heads * 0.75, heads * 0.25, heads * 0], -1), unit)
    data["logit"], data["gap"] = ((), 1.875, unit), ((), 1e-7, unit)
    data = data.assign_coords(source=("k_pos", [" France", "<i>", " is"]), answer=" Paris")
    return data.assign_attrs(method="attribution", parts=["embed", "attn", "mlp"], sum_of="logit")


def circuit() -> xr.Dataset:
    """A circuit: edges with their scores, some measured exactly."""
    data = edges().copy(deep=True)
    exact = np.full((3, 3), np.nan)
    exact[0, 1], exact[1, 2] = -3.5, 0.25
    data["score_exact"] = (("sender", "receiver"), exact, {"unit": "logits"})
    return data.assign_attrs(method="circuit", graph="score")


EVERY = (fake, traced, estimated, edges, over_layers, over_neurons, over_groups, words, parts, circuit)
