"""Which heads matter: by the gradient of a gate, and by the loss without them.

Formula:  L_e = mean next-token loss of row e, in nats; xi a gate that multiplies z of one head (xi = 1):
          gate_gradient       E_e |dL_e / dxi|,   dL/dxi = sum over tokens and d_head of z dL/dz;
          importance          gate_gradient / its L2 norm over the heads of the layer;
          loss_without_head   E_e (L_e with z of the head set to 0 - L_e);
          loss_without_group  the same with all heads that share its keys and values set to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Edit, Zero
from microtome.errors import DataError, SiteError, error
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.metric import token_loss
from microtome.model import Model
from microtome.stream import ExampleMeans

MICHEL = Source(
    "Michel, Levy and Neubig", "Are Sixteen Heads Really Better than One?", 2019, "1905.10650",
    departs="examples are rows of a text, and the loss is their mean next-token loss",
)  # fmt: skip
MOST = 1024
"""Tokens of a run in which several heads are left out, each in rows of its own."""
TEXT = Text(sequences=8, width=32)
"""What both measures read: short, since one of them runs the model once a head."""


def layers_with_heads(model: Model) -> list[int]:
    """The layers whose attention writes the sum of its heads.

    Raises:
        SiteError: there is none, or they have other numbers of heads than one another.
    """
    a = model.anatomy
    found = [i for i in range(a.n_layers) if Site("attn.z", i) in a.hook_points]
    sizes = {a.size(Site("attn.z", i), "head") for i in found}
    if sizes != {a.n_heads}:
        why = a.missing.get(Site("attn.z", 0)) or f"layers with {sorted(sizes)} heads"
        raise error(SiteError, f"no table of the heads of {a.name}", got=why, do="leave the measure out")
    return found


class OfAllHeads(Statistic):
    """What is kept of every head of every layer, from forwards of its own; NaN in layers without heads."""

    names: tuple[str, ...]

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """The layers that have heads.

        Raises:
            ModelUnsupported: the model is not causal.
            SiteError: no layer has heads.
        """
        model.require_next_token()
        self.layers = layers_with_heads(model)

    def start(self, model: Model, layer: int | None) -> Kept:
        """The mean of every head."""
        return {name: ExampleMeans((model.anatomy.n_layers, model.anatomy.n_heads)) for name in self.names}

    def keep(self, kept: Kept, seen: Seen, found: Mapping[str, Float[Tensor, "example layer head"]]) -> None:
        """Take in values [example, layer, head] of the layers that have heads."""
        a = seen.model.anatomy
        absent = torch.ones((a.n_layers, a.n_heads), dtype=torch.bool)
        absent[self.layers] = False
        counted = None if seen.mask is None else seen.mask.any(1)
        for name, x in found.items():
            whole = x.new_zeros((len(x), a.n_layers, a.n_heads))
            whole[:, self.layers] = x
            kept[name].update(whole, seen.examples, counted, absent)


@measure(
    "head_importance",
    of="head",
    on=TEXT,
    title="heads by the gradient of their gates",
    question="Which heads would change the loss if they were turned down a little?",
    columns=(
        Column(
            "gate_gradient", "nats", "mean size of the loss's gradient with respect to a gate on the head",
            "none: compare other heads, and loss_without_head of the measure head_ablation", (0, None),
        ),
        Column(
            "importance", "1", "the same divided by its L2 norm over the heads of the layer",
            "importance_even", (0, 1), interval=False,
        ),
        Column(
            "importance_even", "1", "what every head would have if all were alike", range=(0, 1), interval=False
        ),
    ),
    source=MICHEL,
    cost="one forward and one backward over the first sequences of the text, with z of all heads kept",
    check="tests/laws/test_head_importance.py",
    atlas="full",
)  # fmt: skip
class HeadImportance(OfAllHeads):
    """The mean size of the loss's gradient with respect to a gate on each head, normalised by layer."""

    names = ("gate_gradient",)

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch: one forward and one backward."""
        self.keep(kept, seen, {"gate_gradient": gate_gradients(seen.model, seen.tokens, self.layers).abs()})

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The gradients, and these by layer."""
        raw = kept["gate_gradient"].mean
        even = torch.full_like(raw, raw.shape[-1] ** -0.5)
        return {"gate_gradient": raw, "importance": raw / raw.norm(dim=-1, keepdim=True), "importance_even": even}


def gate_gradients(
    model: Model, tokens: Tensor, layers: Sequence[int], edits: Sequence[Edit] = ()
) -> Float[Tensor, "example layer head"]:
    """[example, layer, head] The derivative of each row's loss with respect to a gate on each head, under edits."""
    with torch.enable_grad():
        run = model.run(tokens, capture=[f"{i}.attn.z" for i in layers], edits=list(edits), grad=True)
        slopes = run.grad(token_loss(run.logits, tokens).mean(1).sum())
    found = [(run[f"{i}.attn.z"].detach().double() * slopes[f"{i}.attn.z"].double()).sum((1, 3)) for i in layers]
    return torch.stack(found, dim=1)


@measure(
    "head_ablation",
    of="head",
    on=TEXT,
    title="loss without a head",
    question="How much does the loss rise without each head, and without the heads that share its keys and values?",
    columns=(
        Column(
            "loss_without_head", "nats", "increase in loss when the head adds nothing", "none: already relative to"
            " the loss of the whole model",
        ),
        Column(
            "loss_without_group", "nats", "increase in loss when no head with its keys and values adds anything",
            "loss_without_head",
        ),
    ),
    source=MICHEL,
    cost="a forward per head and one per group of heads, from its own layer on: about L (H + groups) / 2 full ones",
    check="tests/laws/test_head_importance.py",
    atlas="full",
)  # fmt: skip
class HeadAblation(OfAllHeads):
    """The increase in loss without each head, and without each group of heads that shares keys and values."""

    names = ("loss_without_head", "loss_without_group")

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch."""
        self.keep(kept, seen, losses_without(seen.model, seen.tokens, self.layers))


def losses_without(
    model: Model, tokens: Tensor, layers: Sequence[int]
) -> dict[str, Float[Tensor, "example layer head"]]:
    """[example, layer, head] The increase of each row's loss without a head, and without its group."""
    a = model.anatomy
    base = model.run(tokens, capture=[f"{i}.resid_pre" for i in layers])
    whole, size = token_loss(base.logits, tokens).double().mean(1), a.n_heads // a.n_kv_heads
    groups = [tuple(range(first, first + size)) for first in range(0, a.n_heads, size)]
    cells = [(head,) for head in range(a.n_heads)] + (groups if size > 1 else [])
    made = {name: whole.new_zeros((len(whole), len(layers), a.n_heads)) for name in HeadAblation.names}
    for at, layer in enumerate(layers):
        given = base[f"{layer}.resid_pre"]
        rise = dict(zip(cells, _losses_of_cells(model, tokens, layer, cells, given), strict=True))
        for head in range(a.n_heads):
            group = groups[head // size]
            made["loss_without_head"][:, at, head] = rise[(head,)] - whole
            made["loss_without_group"][:, at, head] = rise[group] - whole
        current().report("leaving heads out", at + 1, len(layers))
    return made


def _losses_of_cells(
    model: Model, tokens: Tensor, layer: int, cells: Sequence[tuple[int, ...]], given: Tensor
) -> list[Float[Tensor, " example"]]:
    """The loss of each row without each of some sets of heads of a layer; several a run, each in rows of its own."""
    rows, found = len(tokens), list[Tensor]()
    together = max(1, MOST // tokens.numel())
    for first in range(0, len(cells), together):
        some = cells[first : first + together]
        edits: list[Edit] = [
            Zero(f"{layer}.attn.z[{','.join(map(str, heads))}]", rows=tuple(range(i * rows, (i + 1) * rows)))
            for i, heads in enumerate(some)
        ]
        every, stream = tokens.repeat(len(some), 1), given.repeat(len(some), *[1] * (given.dim() - 1))
        run = model.run(every, edits=edits, start_at=layer, given=stream)
        found += token_loss(run.logits, every).double().mean(1).split(rows)
    return found


def head_inequality(data: xr.Dataset) -> xr.Dataset:
    """How unequally heads matter, and whether the gradient tells it: from both measures of the importance of heads.

    Formula:  gini(x) = sum_ij |x_i - x_j| / (2 n sum_i x_i).
    Source:   Sun et al., "Alleviating the Inequality of Attention Heads for Neural Machine Translation", 2020
              (2009.09672). Departs: the Gini coefficient is ours.
    Check:    tests/laws/test_head_importance.py.

    Args:
        data: of ``mt.measure(model, "head_importance", "head_ablation")``.

    Returns:
        A dataset of `gini` [layer] of gate_gradient: 0 where all heads are alike, (n - 1) / n where one is all;
        `gini_exact` [layer] of the increase in loss, decreases counted as 0; and `rank_correlation`, Spearman's, over
        all heads, between the gradient and the size of the exact change.

    Raises:
        DataError: one of the two is not in it.
    """
    names = ("gate_gradient", "loss_without_head")
    missing = [name for name in names if name not in data]
    if missing:
        do = 'give mt.measure(model, "head_importance", "head_ablation")'
        raise error(DataError, "the inequality of heads needs two measures", got=f"no {missing[0]}", do=do)
    gradient, exact = (np.asarray(data[name].values, dtype=float) for name in names)
    there = np.isfinite(gradient).all(1) & np.isfinite(exact).all(1)
    variables: dict[str, Any] = {
        name: ("layer", [gini(row) for row in np.maximum(x[there], 0)], {"unit": "1"})
        for name, x in (("gini", gradient), ("gini_exact", exact))
    }
    found: Any = spearmanr(gradient[there].ravel(), np.abs(exact[there]).ravel())
    variables["rank_correlation"] = (), float(found.statistic), {"unit": "1"}
    return xr.Dataset(variables, coords={"layer": data["layer"].values[there]}, attrs=dict(data.attrs))


def gini(x: npt.NDArray[np.float64]) -> float:
    """The Gini coefficient of numbers that are not negative; NaN where all are 0."""
    total = float(x.sum())
    return float(np.abs(x[:, None] - x[None]).sum() / (2 * len(x) * total)) if total > 0 else float("nan")


def leave_one_out(model: Model, tokens: Tensor) -> xr.Dataset:
    """By how much the loss of each row would fall without its own worst head: a bound for gates that choose a head.

    Formula:  gain_e = max(0, max over heads of L_e - L_e(without the head));  gain_one = max over heads of the mean
              over rows of the same: what the choice of one head for all rows gives.
    Source:   Peng et al., "A Mixture of h-1 Heads is Better than h Heads", 2020 (2005.06537). Departs: a bound on a
              model as it is; nothing is trained.
    Cost:     that of the measure head_ablation.
    Check:    tests/laws/test_head_importance.py.

    Args:
        model: an open model.
        tokens: [row, pos] token ids.

    Returns:
        A dataset of `gain` [example], `layer` and `head` [example] of the head that is left out, -1 where every loss
        rises, and `gain_one`, nats.

    Raises:
        ModelUnsupported: the model is not causal.
        SiteError: no layer has heads.
    """
    model.require_next_token()
    layers = layers_with_heads(model)
    fall = -losses_without(model, tokens, layers)["loss_without_head"]
    gain, at = fall.flatten(1).max(1)
    gains = gain.clamp(min=0).cpu().numpy()
    found = {"layer": torch.tensor(layers, device=at.device)[at // fall.shape[2]], "head": at % fall.shape[2]}
    chosen = {name: ("example", torch.where(gain > 0, x, -1).cpu().numpy()) for name, x in found.items()}
    one = float(fall.mean(0).max().clamp(min=0))
    variables: dict[str, Any] = {"gain": ("example", gains, {"unit": "nats"}), "gain_one": ((), one, {"unit": "nats"})}
    return xr.Dataset(variables | chosen, attrs=dict(model.provenance))
