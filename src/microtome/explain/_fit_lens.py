"""Fitting a lens: affine maps whose results, read by the model's own unembedding, say what the model says in the end.

Formula:  lens_l(x) = unembed(final_norm(x + A_l x + b_l)); the loss is the sum over places l of the mean over tokens of
          KL(p_final || softmax lens_l), from A = 0 and b = 0, the logit lens. With `ahead` = k the target is the
          model's prediction of the k-th token from there, p_final k - 1 places on.
          The gradient of a place is taken with its loss, chunk by chunk, so that no logits are kept:
          d KL / d logits = softmax(lens) - p_final.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.explain._lens_reads import head_writes
from microtome.explain._lens_value import Lens, LensKind, no_maps
from microtome.method import Text
from microtome.model import Model
from microtome.stream import TokenBatch, mean_interval
from microtome.training import fit

CHUNK = 128
"""Tokens whose logits are held at once."""


def fit_lens(
    model: Model,
    text: Any = None,
    *,
    tokens: int = 200_000,
    kind: str = "tuned",
    ahead: int = 1,
    layers: Sequence[int] | None = None,
    rank: int = 8,
    share: float = 1.0,
    optimizer: str = "sgd",
    scale: float = 1.0,
    held_out: int = 8_000,
    length: int = 128,
    rows: int = 8,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 20,
) -> Lens:
    """Fit a tuned lens, a lens of biases, or lenses of heads, and measure it on held-out text.

    Formula:  see this file's head. SGD with Nesterov momentum 0.9 and learning rate 0.1 `scale`, falling linearly to 0,
              gradients clipped to norm 1; one pass over the text, a step a batch.
    Source:   Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", 2023 (arXiv
              2303.08112); Sakarvadia et al., "Attention Lens", 2023 (arXiv 2310.16270). Departs: a `share` of the
              tokens, drawn anew for each place; 200,000 tokens; of heads, low rank and the model's own unembedding.
    Cost:     a forward of the text, and for `share` of its tokens two unembeddings for each place or head.
    Check:    its start, its gradient, a planted shift, and a fit that was stopped; tests/laws/test_lenses.py.

    Args:
        model: an open causal model.
        text: as a measure takes it; the standard library's text by default.
        tokens: of the text to fit on; all that it has where it has fewer.
        kind: "tuned", "bias" or "heads".
        ahead: which token is to be predicted: 1 is the next one.
        layers: -1 is the embedding, l the stream after layer l; all by default but the model's output. Or of heads.
        rank: of the matrix of a head.
        share: of the tokens of a batch at which each place's loss is taken.
        optimizer: "sgd", or "adamw" without decay at learning rate 0.001 `scale`.
        scale: factor of the learning rate.
        held_out: tokens after those, on which the divergence is measured.
        length: tokens of a row.
        rows: rows of a batch.
        seed: of what is drawn; that of the settings by default.
        checkpoint: a file for the state; a fit that it holds goes on.
        every: steps between two checkpoints.

    Returns:
        A `Lens`; its `kl` has means over held-out text in nats with 95 % intervals over rows, `_lo` and `_hi`: `kl`,
        `kl_logit_lens`, the `gain`, and of heads `kl_other_head`, through the map of the layer's next head.

    Raises:
        SiteError: the stream cannot be read as logits, or there are no heads.
        ArgumentError: an argument is outside what is allowed, or a layer is none of this model.
        DataError: there is too little text; the checkpoint is that of another fit.
    """
    places = _places(model, kind, ahead, layers, share, rank)
    draw = current().seed if seed is None else seed
    train, rest, source = _texts(model, text, tokens, held_out, length, rows, ahead)
    a, own = model.anatomy, model.provenance
    maps = no_maps(cast("LensKind", kind), len(places), a.n_heads, a.d_model, rank, draw)
    lens = Lens(cast("LensKind", kind), ahead, places, {name: x.to(model.device) for name, x in maps.items()})
    lr = (0.1 if optimizer == "sgd" else 1e-3) * scale
    fitted = fit(
        lens.maps, _loss_of(model, lens, share), train, len(train), optimizer=optimizer, lr=lr, schedule="linear",
        clip=1.0, seed=draw, model=model, checkpoint=checkpoint, every=every, name="fitting a lens",
    )  # fmt: skip
    said = {"text": source, "tokens": sum(batch.tokens.numel() for batch in train), "share": share, "scale": scale}
    attrs = {key: own[key] for key in ("model", "fingerprint", "dtype", "microtome")} | dict(fitted.attrs) | said
    return replace(lens, kl=held_out_divergence(model, lens, rest), attrs=attrs)


def _loss_of(model: Model, lens: Lens, share: float) -> Callable[[TokenBatch], tuple[Tensor, dict[str, float]]]:
    """The sum over places of the mean divergence of a batch, at a share of its tokens drawn anew for each place."""

    def loss(batch: TokenBatch) -> tuple[Tensor, dict[str, float]]:
        streams, log_p = _streams(model, lens, batch)
        some, p = max(1, round(share * len(log_p))), log_p.exp()
        entropy = -(p * log_p).sum(-1)
        total, parts = log_p.new_zeros(()), _parts(lens, model)
        for layer, head in parts:
            chosen = slice(None) if some == len(log_p) else torch.randperm(len(log_p))[:some].to(log_p.device)
            y = lens.apply(layer, streams(layer, head)[chosen], head)
            total = total + divergence(model, y, p[chosen], entropy[chosen]).mean()
        return total, {"kl": float(total.detach()) / len(parts)}

    return loss


class _Divergence(torch.autograd.Function):
    """KL(p || softmax unembed(y)) of each token, whose gradient is taken on the way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, p: Tensor, entropy: Tensor, model: Model) -> Tensor:
        """[token] of y [token, d_model] and p [token, vocab] with its entropy [token]."""
        kl, gradient = y.new_empty(len(y), dtype=p.dtype), torch.empty_like(y)
        for at in range(0, len(y), CHUNK):
            part = slice(at, at + CHUNK)
            with torch.set_grad_enabled(y.requires_grad):
                x = y[part].detach().requires_grad_(y.requires_grad)
                logits = model.unembed(x)
            z = logits.detach().to(p.dtype)
            lse = z.logsumexp(-1)
            kl[part] = lse - torch.einsum("tv,tv->t", p[part], z) - entropy[part]
            if y.requires_grad:
                wrong = (z - lse.unsqueeze(-1)).exp_().sub_(p[part])
                (gradient[part],) = torch.autograd.grad(logits, x, wrong.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The gradient that was taken, times that of each token's divergence."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].unsqueeze(-1).to(gradient.dtype), None, None, None


def divergence(
    model: Model, y: Float[Tensor, "token d_model"], p: Float[Tensor, "token vocab"], entropy: Float[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """KL(p || softmax unembed(y)) in nats, by token, without keeping logits; `entropy` is that of p."""
    return _Divergence.apply(y, p, entropy, model)  # pyright: ignore[reportUnknownMemberType]


def held_out_divergence(model: Model, lens: Lens, batches: Sequence[TokenBatch]) -> xr.Dataset:
    """The divergence of a lens, of the logit lens, and of heads with another head's map, by place; see `fit_lens`."""
    names = ["kl", "kl_logit_lens", *(["kl_other_head"] if lens.kind == "heads" else [])]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    heads = model.anatomy.n_heads
    with torch.no_grad():
        for batch in batches:
            streams, log_p = _streams(model, lens, batch)
            p = log_p.exp()
            entropy, count = -(p * log_p).sum(-1), len(batch.tokens)
            values: dict[str, list[Tensor]] = {name: [] for name in names}
            for layer, head in _parts(lens, model):
                x = streams(layer, head)
                read = {"kl": lens.apply(layer, x, head), "kl_logit_lens": x}
                if head is not None:
                    read["kl_other_head"] = lens.apply(layer, x, (head + 1) % heads)
                for name, y in read.items():
                    kl = divergence(model, y, p, entropy).double()
                    values[name].append(kl.reshape(count, -1).mean(1))
            for name in names:
                found[name].append(torch.stack(values[name], dim=1).cpu())
    each = {name: torch.cat(x) for name, x in found.items()}  # [row, part]
    each["gain"] = each["kl_logit_lens"] - each["kl"]
    shape = (len(lens.layers), heads) if lens.kind == "heads" else (len(lens.layers),)
    dims = ("layer", "head")[: len(shape)]
    table = {
        name + end: x
        for name, own in each.items()
        for end, x in zip(("", "_lo", "_hi"), mean_interval(own), strict=True)
    }
    data = {name: (dims, x.reshape(shape).numpy(), {"unit": "nats"}) for name, x in table.items()}
    return xr.Dataset(data, coords={"layer": list(lens.layers)}, attrs={"rows": len(each["kl"])})


def _parts(lens: Lens, model: Model) -> list[tuple[int, int | None]]:
    """The places of a lens, or the heads of its layers."""
    if lens.kind != "heads":
        return [(layer, None) for layer in lens.layers]
    return [(layer, head) for layer in lens.layers for head in range(model.anatomy.n_heads)]


def _streams(model: Model, lens: Lens, batch: TokenBatch) -> Any:
    """What the lens reads of a batch, as a function of layer and head: [token, d_model]; and log p [token, vocab]."""
    n, late = model.anatomy.n_layers, lens.ahead - 1
    of_heads = lens.kind == "heads"
    names = {i: f"{i}.attn.result" if of_heads else after_layer(i, n) for i in lens.layers}
    with torch.no_grad():
        run = model.run(batch.tokens.to(model.device), capture=list(names.values()))
        width = batch.tokens.shape[1]
        before, after = slice(batch.lead, width - late), slice(batch.lead + late, width)
        log_p = run.logits[:, after].float().log_softmax(-1).flatten(0, 1)

    def read(layer: int, head: int | None) -> Tensor:
        x = run[names[layer]][:, before]
        return (x if head is None else head_writes(model, layer, x)[:, :, head]).flatten(0, 1)

    return read, log_p


def after_layer(layer: int, layers: int) -> str:
    """The address of the stream after a layer of so many; -1 is the embedding."""
    return f"{layer}.resid_post" if layer == layers - 1 else f"{layer + 1}.resid_pre"


def _places(
    model: Model, kind: str, ahead: int, layers: Sequence[int] | None, share: float, rank: int
) -> tuple[int, ...]:
    """The places to fit.

    Raises:
        ArgumentError: something is outside what is allowed, or there are no heads.
        SiteError: the stream cannot be read as logits; ModelUnsupported: it does not predict the next token.
    """
    model.require_readable()
    model.require_next_token()
    n, limits = model.anatomy.n_layers, {"ahead": ahead >= 1, "share": 0 < share <= 1, "rank": rank >= 1}
    allowed = {"ahead": "1 or more", "share": "above 0 to 1", "rank": "1 or more"}
    for name, fits in limits.items():
        if not fits:
            got = {"ahead": ahead, "share": share, "rank": rank}[name]
            raise error(ArgumentError, f"{name} of a lens", got=got, allowed=allowed[name], do="choose another value")
    if kind not in ("tuned", "bias", "heads"):
        raise error(ArgumentError, f"no kind of lens {kind!r}", allowed="tuned, bias, heads", do="choose one")
    if kind == "heads":
        every = [i for i in range(n) if Site("attn.result", i) in model.anatomy.hook_points]
    else:
        every = list(range(-1, n - 1 if ahead == 1 else n))
    chosen = every if layers is None else sorted(set(layers))
    other = [i for i in chosen if i not in every]
    if other or not chosen:
        got, all_of = ", ".join(map(str, other)) or "none", ", ".join(map(str, every)) or "none"
        raise error(ArgumentError, f"no map is fitted to these layers of {model.anatomy.name}", got=got, allowed=all_of)
    return tuple(chosen)


def _texts(
    model: Model, text: Any, tokens: int, held_out: int, length: int, rows: int, ahead: int
) -> tuple[list[TokenBatch], list[TokenBatch], str]:
    """Batches to fit on, batches that are held out, and what they were read from.

    Raises:
        DataError: there is too little text for both.
    """
    if length <= ahead:
        raise error(ArgumentError, "rows are too short for this lens", got=length, allowed=f"over {ahead}")
    batches = Text(text, tokens=tokens + held_out, length=length, rows=rows).batches(model)
    parts = [batch for batch in batches.parts if batch.tokens.shape[1] - batch.lead >= ahead]
    size = rows * length
    rest = min(max(1, round(held_out / size)), len(parts) // 2)
    if not rest:
        do = "give more text, or shorter rows"
        what, got = "there is too little text to fit a lens and to hold some out", f"{len(parts)} batches"
        raise error(DataError, what, got=got, allowed="2 or more", do=do)
    return parts[:-rest], parts[-rest:], batches.source
