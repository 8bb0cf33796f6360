"""How much of what the branches read is new at each token: small steps from token to token left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, parse
from microtome.context import current
from microtome.edit import Apply, Edit
from microtome.errors import ArgumentError, error
from microtome.measurements._loss import token_loss
from microtome.method import Text
from microtome.model import Model
from microtome.stream import ExampleMeans, mean_interval

SITES = ("attn.in", "mlp.in")


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
    tokens: int = 2_000,
    length: int = 128,
    rows: int = 4,
) -> xr.Dataset:
    """How much of what attention and MLPs read can stay what it was at the token before, and what that costs.

    Formula:  x_t the input of a branch behind its norm; h_0 = x_0; each dimension of h_t is that of x_t where it
              differs from h_t-1 by more than `limit` times the root mean square of x over its row, else that of
              h_t-1; every branch of every layer reads h. still = share of dimensions that stay, over t > 0.
              Control: as large a share of the dimensions of each token, those of the smallest size, set to 0.
    Source:   Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks, application in video
              processing", 2021 (arXiv 2107.07305). Departs: nothing is trained; the control by size.
    Cost:     two forwards for each limit, and one.
    Check:    a limit of 0 changes nothing; tests/laws/test_sparsity.py.

    Args:
        model: an open causal model.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        limits: relative to the root mean square of what is read.
        tokens: of the text to read.
        length: tokens of a row.
        rows: rows of a batch.

    Returns:
        A dataset with the axis `limit`: `still`, `rise` of the loss in nats with its 95 % interval over rows as `_lo`
        and `_hi`, and `rise_small`, that of the control.

    Raises:
        ArgumentError: a limit is below 0.
        SiteError: no branch of the model has an input that can be edited.
        ModelUnsupported: the model does not predict the next token.
    """
    if not limits or not all(limit >= 0 for limit in limits):
        raise error(ArgumentError, "limits must be 0 or more", got=list(limits), do="give such")
    model.require_next_token()
    sites = _inputs(model)
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model)
    base = [token_loss(model.run(b.tokens).logits, b.tokens.to(model.device)) for b in read.parts]
    found: dict[str, list[float]] = {name: [] for name in ("still", "rise", "rise_lo", "rise_hi", "rise_small")}
    for done, limit in enumerate(limits):
        counts: list[tuple[int, int]] = []

        def keep(x: Tensor, limit: float = limit, counts: list[tuple[int, int]] = counts) -> Tensor:
            new = held(x, limit * x.square().mean((1, 2), keepdim=True).sqrt().squeeze(-1))
            counts.append((int((new[:, 1:] == new[:, :-1]).sum()), new[:, 1:].numel()))
            return new

        rises = _rise(model, read.parts, base, [Apply(site, keep) for site in sites])
        still = sum(n for n, _ in counts) / max(1, sum(n for _, n in counts))

        def small(x: Tensor, share: float = still) -> Tensor:
            order = x.abs().argsort(dim=-1)
            return x.scatter(-1, order[..., : round(share * x.shape[-1])], 0.0)

        control = _rise(model, read.parts, base, [Apply(site, small) for site in sites])
        ends = mean_interval(rises.result().total, weights=rises.result().count)
        values = (still, *(float(x) for x in ends), float(control.mean))
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
        current().report("leaving small steps out", done + 1, len(limits))
    about = {"unit": "nats", "meaning": "rise of the loss when small steps are left out"}
    variables: dict[str, Any] = {name: ("limit", x, about) for name, x in found.items()}
    variables["still"] = ("limit", found["still"], {"unit": "share", "meaning": "dimensions that stay as they were"})
    told = {"method": "loss_at_deltas", "text": read.source, "seed": current().seed}
    return xr.Dataset(variables, coords={"limit": list(limits)}).assign_attrs(dict(model.provenance) | told)


def _inputs(model: Model) -> list[str]:
    """What attention and MLPs read, in every layer that has it.

    Raises:
        SiteError: none does.
    """
    a = model.anatomy
    sites = [f"{i}.{name}" for i in range(a.n_layers) for name in SITES if Site(name, i) in a.hook_points]
    if not sites:
        a.sites(parse("*.mlp.in"))  # says why there are none
    return sites


def _rise(model: Model, batches: Any, base: Sequence[Tensor], edits: list[Edit]) -> ExampleMeans:
    """The rise of the loss under edits, by row."""
    kept = ExampleMeans(1)
    for batch, whole in zip(batches, base, strict=True):
        loss = token_loss(model.run(batch.tokens, edits=edits).logits, batch.tokens.to(whole.device))
        mask = None if batch.text is None else batch.text[:, 1:]
        kept.update((loss - whole).double().unsqueeze(-1).cpu(), batch.start, mask)
    return kept
