"""How much of what the branches read is new at each token: small steps from token to token left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, parse
from microtome.context import current
from microtome.edit import Apply, Edit
from microtome.errors import ArgumentError, error
from microtome.method import Text
from microtome.metric import token_loss
from microtome.model import Model
from microtome.stream import ExampleMeans, mean_interval

SITES = ("attn.in", "attn.z", "mlp.in", "mlp.post")
"""What the weights of the branches read."""


def held(x: Float[Tensor, "row pos dim"], limit: Float[Tensor, "row 1"]) -> Float[Tensor, "row pos dim"]:
    """What is kept of x [row, pos, dim] when a dimension changes only if it is off by more than its row's limit."""
    found = [x[:, 0]]
    for now in x[:, 1:].unbind(1):
        found.append(torch.where((now - found[-1]).abs() > limit, now, found[-1]))
    return torch.stack(found, dim=1)


def loss_at_deltas(
    model: Model,
    text: Any = None,
    *,
    limits: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8),
    sites: Sequence[str] = SITES,
    tokens: int = 2_000,
    length: int = 128,
    rows: int = 4,
) -> xr.Dataset:
    """How much of what the weights of attention and MLPs read can stay what it was at the token before, at what cost.

    Formula:  x_t what a weight reads (behind its norm, if there is one), its heads in a row; h_0 = x_0; each dimension
              of h_t is that of x_t where it differs from h_t-1 by more than `limit` times the root mean square of x
              over its row, else that of h_t-1; every weight of every layer reads h. still = share of dimensions that
              stay, over t > 0;  kl = mean over tokens of KL(p | p'), p' the prediction then.
              Control: as large a share of the dimensions of each token at that site, those of the smallest size, set
              to 0.
    Source:   Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks, application in video
              processing", 2021 (arXiv 2107.07305). Departs: nothing is trained; the control by size.
    Cost:     two forwards for each limit, and one.
    Check:    a limit of 0 changes nothing; tests/laws/test_sparsity.py.

    Args:
        model: an open causal model.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        limits: relative to the root mean square of what is read.
        sites: of these, those that a layer has: "attn.in", "attn.z", "mlp.in", "mlp.post".
        tokens: of the text to read.
        length: tokens of a row.
        rows: rows of a batch.

    Returns:
        A dataset with the axis `limit`: `still`, `rise` of the loss in nats and `kl`, each of the two with its 95 %
        interval over rows as `_lo` and `_hi`, and of the control as `rise_small` and `kl_small`; `still_at` [limit,
        layer, site], NaN where a layer lacks one.

    Raises:
        ArgumentError: a limit is below 0, or a site is none of these.
        SiteError: the model has none of the sites.
        ModelUnsupported: the model does not predict the next token.
    """
    if not limits or not all(limit >= 0 for limit in limits):
        raise error(ArgumentError, "limits must be 0 or more", got=list(limits), do="give such")
    if not sites or not set(sites) <= set(SITES):
        raise error(ArgumentError, "sites must be what weights read", got=list(sites), allowed=", ".join(SITES))
    model.require_next_token()
    places = _inputs(model, sites)
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model)
    kept = [{name: ExampleMeans(1) for name in ("rise", "kl", "rise_small", "kl_small")} for _ in limits]
    counts: list[dict[Site, list[int]]] = [{site: [0, 0] for site in places} for _ in limits]
    for done, batch in enumerate(read.parts):
        base = model.run(batch.tokens).logits
        mask = None if batch.text is None else batch.text[:, 1:]
        for own, count, limit in zip(kept, counts, limits, strict=True):
            shares: dict[Site, float] = {}
            edits = [Apply(str(site), _keep(site, limit, count, shares)) for site in places]
            for end, some in (("", edits), ("_small", [Apply(str(site), _small(site, shares)) for site in places])):
                for name, x in _changes(model, batch.tokens, base, some).items():
                    own[name + end].update(x.unsqueeze(-1).cpu(), batch.start, mask)
        current().report("leaving small steps out", done + 1, len(read.parts))
    told = {"method": "loss_at_deltas", "text": read.source, "seed": current().seed}
    coords = {"limit": list(limits), "layer": list(range(model.anatomy.n_layers)), "site": list(sites)}
    data = xr.Dataset(_variables(kept, counts, coords), coords=coords)
    return data.assign_attrs(dict(model.provenance) | told)


def _keep(
    site: Site, limit: float, count: dict[Site, list[int]], shares: dict[Site, float]
) -> Callable[[Tensor], Tensor]:
    """What holds small steps of a site back, and notes how many of its dimensions stay."""

    def keep(x: Tensor) -> Tensor:
        flat = x.flatten(2)
        new = held(flat, limit * flat.square().mean((1, 2), keepdim=True).sqrt().squeeze(-1))
        still, every = int((new[:, 1:] == new[:, :-1]).sum()), new[:, 1:].numel()
        count[site] = [count[site][0] + still, count[site][1] + every]
        shares[site] = still / max(1, every)
        return new.reshape(x.shape)

    return keep


def _small(site: Site, shares: Mapping[Site, float]) -> Callable[[Tensor], Tensor]:
    """What sets as large a share of a site's dimensions to 0, the smallest of each token."""

    def small(x: Tensor) -> Tensor:
        flat = x.flatten(2)
        order = flat.abs().argsort(dim=-1)
        return flat.scatter(-1, order[..., : round(shares[site] * flat.shape[-1])], 0.0).reshape(x.shape)

    return small


def _inputs(model: Model, names: Sequence[str]) -> list[Site]:
    """What weights of attention and MLPs read, in every layer that has it.

    Raises:
        SiteError: none does.
    """
    a = model.anatomy
    sites = [Site(name, i) for i in range(a.n_layers) for name in names if Site(name, i) in a.hook_points]
    if not sites:
        a.sites(parse(f"*.{names[0]}"))  # says why there are none
    return sites


def _changes(
    model: Model, tokens: Tensor, base: Float[Tensor, "row pos vocab"], edits: Sequence[Edit]
) -> dict[str, Float[Tensor, "row next"]]:
    """The rise of the loss of each token, and the divergence of what was predicted in its place, under edits."""
    logits = model.run(tokens, edits=edits).logits
    targets = tokens.to(logits.device)
    rise = (token_loss(logits, targets) - token_loss(base, targets)).double()
    rows = zip(base[:, :-1], logits[:, :-1], strict=True)
    kl = [_divergence(one.float().log_softmax(-1), other.float().log_softmax(-1)) for one, other in rows]
    return {"rise": rise, "kl": torch.stack(kl).double()}


def _divergence(p: Float[Tensor, "pos vocab"], q: Float[Tensor, "pos vocab"]) -> Float[Tensor, " pos"]:
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def _variables(
    kept: Sequence[Mapping[str, ExampleMeans]],
    counts: Sequence[Mapping[Site, Sequence[int]]],
    coords: Mapping[str, Any],
) -> dict[str, Any]:
    """The means with their intervals, and the shares."""
    meant = {"rise": "rise of the loss when small steps are left out", "kl": "divergence of what is predicted then"}
    found: dict[str, Any] = {}
    for name, meaning in meant.items():
        results = [own[name].result() for own in kept]
        ends = [mean_interval(one.total, weights=one.count) for one in results]
        about = {"unit": "nats", "meaning": meaning}
        for at, ending in enumerate(("", "_lo", "_hi")):
            found[name + ending] = ("limit", [float(one[at]) for one in ends], about)
        control = about | {"meaning": "the same of the smallest dimensions set to 0"}
        found[f"{name}_small"] = ("limit", [float(own[f"{name}_small"].mean) for own in kept], control)
    stay = {"unit": "share", "meaning": "dimensions that stay as they were"}
    every = [[sum(n) for n in zip(*count.values(), strict=True)] for count in counts]
    found["still"] = ("limit", [still / max(1, n) for still, n in every], stay)
    table = [
        [[_share(count.get(Site(name, i))) for name in coords["site"]] for i in coords["layer"]] for count in counts
    ]
    found["still_at"] = (("limit", "layer", "site"), table, stay)
    return found


def _share(count: Sequence[int] | None) -> float:
    return float("nan") if count is None or not count[1] else count[0] / count[1]
