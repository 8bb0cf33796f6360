"""Attention as the update of a continuous Hopfield network: does repeating it come to rest, and at how many keys.

Formula:  of a head with keys k_i that query q sees and slope b (scores = b q . k):
          state x_0 = q;  x_{s+1} = sum_i softmax_i(b x_s . k_i) k_i, the head's own weights at s = 0;
          E(x) = -(1/b) log sum_i exp(b x . k_i) + x . x / 2 + (1/b) log n + max_i |k_i|^2 / 2, which never rises;
          energy[s] = mean E(x_s) over queries; moved[s] = mean |x_{s+1} - x_s| / |x_{s+1}|;
          k90[s] = mean of the fewest keys that hold 90 % of softmax(b x_s . k): all of them, some, or one.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.errors import ArgumentError, SiteError, error
from microtome.measurements._head_map import fewest
from microtome.model import Model
from microtome.run import Prompt

CLOSE = 1e-3
"""How far the scores may lie from a multiple of q . k, relative to their spread."""


def hopfield_updates(model: Model, prompt: Prompt, *, steps: int = 5) -> xr.Dataset:
    """What becomes of each head's query when its attention is repeated: energy, movement, and the number of keys.

    Formula:  see this file's head.
    Source:   Ramsauer et al., "Hopfield Networks is All You Need", 2020 (2008.02217), equations 2 and 3 and theorem 1.
              Departs: the patterns are a head's keys as they are used; queries of the later half of the prompt.
    Cost:     one forward, and `steps` times the attention of every head, in float64.
    Check:    the energy never rises, for any keys, queries and slopes; tests/laws/test_hopfield.py.

    Args:
        model: an open model.
        prompt: one prompt of several tokens.
        steps: how many updates.

    Returns:
        A dataset of `energy` and `k90` [layer, head, step] at the states 0 to `steps`, and of `moved`
        [layer, head, update].

    Raises:
        ArgumentError: `steps` is no positive number, or the prompt has fewer than 2 tokens.
        SiteError: no layer has queries and keys whose product is its scores.
    """
    if steps < 1:
        raise error(ArgumentError, "at least one update is needed", got=f"steps={steps}", do="leave it at 5")
    points = model.anatomy.hook_points
    names = ("attn.q", "attn.k", "attn.scores")
    layers = [i for i in range(model.anatomy.n_layers) if all(Site(name, i) in points for name in names)]
    if not layers:
        why = next((w for n in names if (w := model.anatomy.missing.get(Site(n, 0)))), None)
        raise error(SiteError, f"{model.anatomy.name} has no queries and keys", got=why, do="use a model with some")
    run = model.run(prompt, capture=[f"{i}.{name}" for i in layers for name in names], logits=False)
    width = run.batch.tokens.shape[1]
    if len(run.batch.lengths) != 1 or width < 2:
        got = f"{len(run.batch.lengths)} prompts of up to {width} tokens"
        raise error(ArgumentError, "one prompt of two tokens or more is needed", got=got, do="give one text")
    sees = torch.ones(width, width, dtype=torch.bool)
    sees = sees.tril() if model.anatomy.causal else sees
    told: dict[str, list[Tensor]] = {"energy": [], "k90": [], "moved": []}
    for at, layer in enumerate(layers):
        q, k, scores = (at_least_float32(run[f"{layer}.{name}"][0]).double().cpu() for name in names)
        q, k = q.transpose(0, 1), k.transpose(0, 1)
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        slope = _slope(model, layer, q, k, scores, sees)
        late = slice(width // 2, width)
        found = updates(q[:, late], k, sees[late], slope, steps)
        for name, x in found.items():
            told[name].append(x.mean(-1).T)
        current().report("repeating attention", at + 1, len(layers))
    units = {"energy": "1", "k90": "tokens", "moved": "ratio"}
    variables: dict[str, Any] = {
        name: (
            ("layer", "head", "update" if name == "moved" else "step"),
            torch.stack(x).numpy(),
            {"unit": units[name]},
        )
        for name, x in told.items()
    }
    return xr.Dataset(
        variables, coords={"layer": layers}, attrs=dict(model.provenance) | {"method": "hopfield_updates"}
    )


def _slope(
    model: Model,
    layer: int,
    q: Float[Tensor, "head pos d_head"],
    k: Float[Tensor, "head pos d_head"],
    scores: Float[Tensor, "head pos pos"],
    sees: Bool[Tensor, "pos pos"],
) -> float:
    """The slope b of scores = b q . k.

    Raises:
        SiteError: the scores are no multiple of it, as where they are capped or biased by distance.
    """
    plain, whole = (q @ k.transpose(-1, -2))[:, sees], scores[:, sees]
    slope = float((plain * whole).sum() / (plain * plain).sum())
    gap = float((whole - slope * plain).abs().max() / whole.std())
    if not gap < CLOSE or slope <= 0:
        what = f"the scores of layer {layer} of {model.anatomy.name} are no multiple of q . k"
        raise error(
            SiteError, what, got=f"a gap of {gap:.2g} standard deviations", do="use a model without caps or biases"
        )
    return slope


def updates(
    query: Float[Tensor, "head q_pos d_head"],
    key: Float[Tensor, "head k_pos d_head"],
    sees: Bool[Tensor, "q_pos k_pos"],
    slope: float,
    steps: int,
) -> dict[str, Float[Tensor, "step head q_pos"]]:
    """Energies and numbers of keys at each state, and how far each update moves it: see this file's head."""
    x = query
    most = key.square().sum(-1).unsqueeze(1).masked_fill(~sees, 0).amax(-1) / 2
    rest = sees.sum(1).double().log() / slope + most
    found: dict[str, list[Tensor]] = {"energy": [], "k90": [], "moved": []}
    for step in range(steps + 1):
        scores = (slope * x @ key.transpose(-1, -2)).masked_fill(~sees, -torch.inf)
        weight = scores.softmax(-1)
        found["energy"].append(rest - scores.logsumexp(-1) / slope + x.square().sum(-1) / 2)
        found["k90"].append(fewest(weight.unsqueeze(0))[0].T)
        if step < steps:
            new = weight @ key
            size = new.norm(dim=-1).clamp(min=torch.finfo(new.dtype).tiny)
            found["moved"].append((new - x).norm(dim=-1) / size)
            x = new
    return {name: torch.stack(x) for name, x in found.items()}
