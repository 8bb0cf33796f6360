"""Which neurons and heads stand out on a prompt, against what the atlas says is usual for them.

Formula:  z = (x - mean) / std, at the token where |z| is largest; x the activation of a neuron, or the norm of what a
          head adds to the stream; mean and std those over the tokens of the atlas's text. Each text's first token,
          where attention sinks live, is left out.
Cost:     one forward of the prompt.
Check:    tests/laws/test_atlas_read.py: equal to a run of the model; a planted neuron comes first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from microtome.anatomy import Site
from microtome.errors import DataError, error
from microtome.model import Model

if TYPE_CHECKING:
    import pandas as pd

READ = {
    "neurons": ("mlp.post", "neuron", "mean", "std"),
    "heads": ("attn.result", "head", "result_norm", "result_norm_std"),
}
"""By table: the site that is captured, its unit, and the columns that say what is usual."""


def standing_out(
    manifest: Mapping[str, Any], table: Callable[[str], pd.DataFrame], prompt: Any, model: Model, top: int = 20
) -> pd.DataFrame:
    """The units that are furthest, on a prompt, from what is usual for them.

    Args:
        manifest: of an atlas of this model.
        table: gives its tables by name.
        prompt: text, token ids, or what else `model.run` takes: one row.
        model: the model, open.
        top: how many to list.

    Returns:
        One row per unit, furthest first: `unit`, `layer`, `number`, `site`, `position`, `token`, `value`, `usual`,
        `spread` and `z`.

    Raises:
        DataError: the atlas is of another model, holds no statistics to compare with, or the prompt is one token.
    """
    fingerprint = manifest["model"]["fingerprint"]
    if model.fingerprint != fingerprint:
        do = "open the model that the atlas was made of, or make an atlas of this one"
        raise error(DataError, "the atlas is of another model", got=model.fingerprint, allowed=fingerprint, do=do)
    told = manifest["tables"]
    usable = {
        name: how for name, how in READ.items() if name in told and {how[2], how[3]} <= set(told[name]["columns"])
    }
    if not usable:
        do = "make one with the measures activations and head_norms"
        raise error(DataError, "this atlas does not say what is usual", do=do)
    sites = [how[0] for how in usable.values()]
    there = [str(s) for s in model.anatomy.hook_points if s.name in sites]
    run = model.run(prompt, capture=[*there, *(f"*.{n}" for n in sites if n == "attn.result")], logits=False)
    words = model.to_words(run.tokens[0])
    if len(words) < 2:
        raise error(DataError, "the prompt is too short", got=f"{len(words)} token", allowed="2 or more")
    pd: Any = importlib.import_module("pandas")
    parts = [_of_table(table(name), run, words, *how) for name, how in usable.items()]
    found = pd.concat(parts, ignore_index=True)
    order = found["z"].abs().sort_values(ascending=False, kind="stable").index[:top]
    return found.loc[order].reset_index(drop=True)


def _of_table(rows: Any, run: Any, words: list[str], site: str, unit: str, mean: str, std: str) -> Any:
    """The row of every unit of a table, at the token where it is furthest from what is usual."""
    pd: Any = importlib.import_module("pandas")
    usual = rows[[mean, std]]
    parts: list[Any] = []
    for layer, of in usual.groupby(level="layer"):
        x = run[str(Site(site, int(layer)))][0].double()  # [pos, neuron], or [pos, head, d_model]
        x = x.norm(dim=-1) if x.dim() == 3 else x
        middle, spread = (torch.from_numpy(of[c].to_numpy(dtype=np.float64, copy=True)) for c in (mean, std))
        z = ((x.cpu() - middle) / spread.where(spread > 0, torch.nan))[1:]
        size, place = z.abs().nan_to_num(-1.0).max(dim=0)
        position = (place + 1).numpy()
        number = of.index.get_level_values(unit).to_numpy()
        table = pd.DataFrame({
            "unit": unit, "layer": int(layer), "number": number,
            "site": [f"{layer}.{'attn.z' if unit == 'head' else site}[{n}]" for n in number],
            "position": position, "token": [words[p] for p in position],
            "value": x.cpu()[position, np.arange(len(number))].numpy(), "usual": middle.numpy(),
            "spread": spread.numpy(), "z": z[place, torch.arange(len(number))].numpy(),
        })  # fmt: skip
        parts.append(table[size.numpy() >= 0])
    return pd.concat(parts, ignore_index=True)
