"""What a fingerprint of an inference tells apart: the same run, and runs that differ in one thing.

Formula:  a commitment to one prompt (see _commit.py) is verified with runs of the same model, of the prompt in a batch
          with another one, of the model in another type of numbers, of the model with one weight matrix changed by
          noise of a given relative norm, and of another prompt of the same length; with all dimensions, and without the
          massive ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import PromptError, SiteError, error
from microtome.measurements._commit import SITE, commit, massive_dimensions, verify_commit
from microtome.model import Model
from microtome.model import open as open_model
from microtome.run import Prompt, Run

CHANGES = ("same", "batch", "dtype", "weight", "prompt")


def commit_separation(
    model: Model,
    prompt: Prompt,
    other: Prompt,
    *,
    every: int = 32,
    top: int = 128,
    noise: float = 0.1,
    dtype: torch.dtype | None = None,
) -> xr.Dataset:
    """What `commit` tells apart on a prompt: a table of the comparisons by what was changed.

    Formula:  see this file's head.
    Source:   Ong et al., "TOPLOC: A Locality Sensitive Hashing Scheme for Trustless Verifiable Inference", 2025
              (2501.16007). Departs: the table is ours.
    Cost:     6 forwards, and two copies of the model, one after the other.
    Check:    tests/laws/test_commit.py.

    Args:
        model: an open model.
        prompt: one prompt.
        other: another one of as many tokens or more, of which as many are used.
        every: tokens of a chunk, see `commit`.
        top: entries of a chunk.
        noise: norm of the change of the MLP's output weights in the middle layer, relative to the weights.
        dtype: what a copy of the model is cast to, such as ``torch.bfloat16``; without it this change is left out.

    Returns:
        A dataset of `overlap`, `exponent`, `mean`, `median` (means over chunks) and `passes` [dimensions, change].

    Raises:
        PromptError: the other prompt is shorter.
        SiteError: the middle layer has no MLP whose weights could be changed.
    """
    rows = [model.to_batch(x).tokens[:1] for x in (prompt, other)]
    if rows[1].shape[1] < rows[0].shape[1]:
        got, allowed = f"{rows[1].shape[1]} tokens", f"{rows[0].shape[1]} or more"
        raise error(PromptError, "the other prompt is shorter", got=got, allowed=allowed, do="give a longer one")
    both = torch.cat([rows[0], rows[1][:, : rows[0].shape[1]]])
    base = model.run(both[:1], capture=SITE, logits=False)
    runs: dict[str, Callable[[], Run]] = {
        "same": lambda: model.run(both[:1], capture=SITE, logits=False),
        "batch": lambda: model.run(both, capture=SITE, logits=False),
        "dtype": lambda: _copied(model, lambda hf: hf.to(dtype)).run(both[:1], capture=SITE, logits=False),
        "weight": lambda: _copied(model, lambda hf: _shaken(model, hf, noise)).run(
            both[:1], capture=SITE, logits=False
        ),
        "prompt": lambda: model.run(both[1:], capture=SITE, logits=False),
    }
    ways = {"all": (), "without massive": massive_dimensions(base)}
    commitments = {way: commit(base, every=every, top=top, without=left) for way, left in ways.items()}
    names = ("overlap", "exponent", "mean", "median")
    found: dict[str, list[list[float]]] = {name: [[] for _ in ways] for name in (*names, "passes")}
    tried = [change for change in CHANGES if change != "dtype" or dtype is not None]
    for change in tried:
        run = runs[change]()
        for at, way in enumerate(ways):
            verdict = verify_commit(commitments[way], run, row=0)
            for name in names:
                found[name][at].append(float(verdict.chunks[name].mean()))
            found["passes"][at].append(float(verdict.passes))
        current().report("changing one thing", tried.index(change) + 1, len(tried))
    units = {"overlap": "share", "exponent": "share", "mean": "last places", "median": "last places", "passes": "share"}
    variables: dict[str, Any] = {n: (("dimensions", "change"), x, {"unit": units[n]}) for n, x in found.items()}
    variables["left_out"] = "dimensions", [len(left) for left in ways.values()], {"unit": "dimensions"}
    coords = {"dimensions": list(ways), "change": tried}
    return xr.Dataset(variables, coords=coords, attrs=dict(model.provenance) | {"seed": current().seed})


def _copied(model: Model, change: Callable[[Any], None]) -> Model:
    """The model once more, with a change; the given one keeps its weights."""
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        change(hf)
    return open_model(hf, tokenizer=model.tokenizer, prove=False)


def _shaken(model: Model, hf: Any, noise: float) -> None:
    """Noise on the output weights of the MLP in the middle layer of a copy.

    Raises:
        SiteError: there is none.
    """
    layer = model.anatomy.n_layers // 2
    path = model.anatomy.parts.layers[layer].down
    if path is None or Site("mlp_out", layer) not in model.anatomy.hook_points:
        what = f"no MLP in layer {layer} of {model.anatomy.name} whose output weights could be changed"
        raise error(SiteError, what, do="use a model with one")
    weight: Tensor = hf.get_submodule(path).weight
    random = torch.randn(weight.shape, generator=torch.Generator().manual_seed(current().seed)).to(weight)
    weight += random * (noise * weight.norm() / random.norm())
