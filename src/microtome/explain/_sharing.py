"""Sharing ratios: how a prediction is shared out to tokens, each part by its projection on the sum, layer by layer.

Formula:  a part p of a sum v has the share p . v / |v|^2, so that the shares of all parts are 1. From the last position
          of the last stream back to the embedding:
          behind a layer, the stream is its input + attention + MLP; in a layer one after the other first the input of
          the MLP + MLP, then the input of the layer + attention;
          what an MLP adds came from its own position;
          what attention adds is the sum over heads h and positions j of A_h,tj v_j,h W_O,h (through a norm behind it
          with its divisor held) and biases, whose share stays with the position.
          share(l, j) = sum over t of share(l + 1, t) . (share of the ways t -> j in layer l).
Cost:     one forward; a few products a layer; a sweep of one cell a token.
Check:    shares sum to 1 in every layer; a layer that only copies gives all to what it copies;
          tests/laws/test_sharing.py.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.edit import Zero
from microtome.explain._one_prompt import asked, beside, reading
from microtome.method import AnswerToken, Argument, Column, Found, PromptText, Source, question, run_sweep
from microtome.model import Model
from microtome.run import Run


@question(
    "sharing",
    title="sharing ratios",
    question="How is a prediction shared out to tokens, if each part of a sum has its projection as its share?",
    columns=(
        Column("share", "share", "share of this token's embedding in the last stream", "attention", dims=("pos",)),
        Column("attention", "share", "the same by attention alone: its mean pattern carried back, half of it kept at "
               "each layer (rollout)", range=(0, 1), dims=("pos",)),
        Column("by_layer", "share", "share of the stream of this position before the layer", "none: see the shares",
               dims=("layer", "pos")),
        Column("deletion", "nats", "how much the log-probability of the answer falls without this token's embedding",
               "none: the truth that shares stand beside", dims=("pos",)),
        Column("rank_correlation", "correlation", "between shares and deletions", "rank_correlation_attention",
               (-1, 1), dims=()),
        Column("rank_correlation_attention", "correlation", "the same for attention alone", range=(-1, 1), dims=()),
    ),
    source=Source(
        "Han et al.", "Respect the model: Fine-grained and Robust Explanation with Sharing Ratio Decomposition", 2024,
        "2402.03348", departs="for transformers: parts are what heads bring from each position, and what MLPs add",
    ),
    cost="one forward, products of the size of attention's outputs, and a sweep of one cell a token",
    check="tests/laws/test_sharing.py",
    call='mt.explain.sharing(model, "The capital of France is")',
    reading="Each share is the part of the last position's stream that came from this token; all of them add up to 1.",
    needs=("sum", "attention and MLP", "*.attn.pattern", "*.attn.v"),
)  # fmt: skip
def sharing(
    model: Model,
    prompt: PromptText,
    *,
    answer: AnswerToken = None,
    position: Annotated[int, Argument("the position whose stream is shared out", "token")] = -1,
) -> Found:
    """Share a prediction out to the tokens of its prompt, layer by layer, by projections on the sum.

    Raises:
        PromptError: there are several prompts, or the answer is not one token.
        SiteError: the stream is not a sum, or heads are not.
    """
    tokens, read, attrs = asked(model, prompt, answer, position=position)
    names = ("attn_out", "mlp_out", "attn.pattern", "attn.v", "attn.z", "resid_post")
    run = model.run(tokens.unsqueeze(0), capture=[f"*.{name}" for name in names])
    n, length = model.anatomy.n_layers, len(tokens)
    share = torch.zeros(length, dtype=torch.float64)
    rollout = share.clone()
    share[-1] = rollout[-1] = 1.0
    by_layer = torch.zeros(n, length, dtype=torch.float64)
    for layer in reversed(range(n)):
        share = ways(model, run, layer).T @ share
        mean = run[f"{layer}.attn.pattern"][0].double().mean(0).cpu()
        rollout = (0.5 * torch.eye(length, dtype=torch.float64) + 0.5 * mean).T @ rollout
        by_layer[layer] = share
    cells = [Zero(f"embed@{p}") for p in range(length)]
    swept = run_sweep(model, tokens.unsqueeze(0), cells, reading(read)[0], stage="deleting tokens")
    deletion = -swept.effects.double()
    values: dict[str, Any] = {"share": share, "attention": rollout, "by_layer": by_layer, "deletion": deletion}
    for end, own in (("", share), ("_attention", rollout)):
        values[f"rank_correlation{end}"] = beside(own, deletion)
    coords = {"token": ("pos", model.to_words(tokens)), "layer": list(range(n))}
    return Found(values, coords=coords, attrs=attrs)


def ways(model: Model, run: Run, layer: int) -> Float[Tensor, "pos source"]:
    """[pos, source] Shares of the stream behind a layer, by the position before it they came from; rows sum to 1."""
    attention, mlp, behind = (run[f"{layer}.{name}"][0].double() for name in ("attn_out", "mlp_out", "resid_post"))
    # What an MLP adds stays at its own position; in blocks one after the other it reads what attention has added.
    whole = behind if model.anatomy.parts.form == "parallel" else behind - mlp
    share = (attention * whole).sum(-1) / whole.pow(2).sum(-1).clamp(min=1e-300)
    stays = torch.diag(1 - share)
    return (stays + share.unsqueeze(1) * _sources(model, run, layer, attention)).cpu()


def _sources(model: Model, run: Run, layer: int, out: Float[Tensor, "pos d"]) -> Float[Tensor, "pos source"]:
    """[pos, source] Shares of what attention adds, by position; rows sum to 1, and that of biases stays."""
    share = _brought(model, run, layer, out)
    return share + torch.diag(1 - share.sum(-1))


def _brought(model: Model, run: Run, layer: int, out: Float[Tensor, "pos d"]) -> Float[Tensor, "pos source"]:
    """[pos, source] Shares of what heads bring from each position in what attention adds; 1 in sum without biases."""
    weights = model.layers[layer]
    w = at_least_float32(weights.W_O.detach())
    scale = model.anatomy.hook_points[Site("attn_out", layer)].scale
    read = out * scale
    norm = weights.attn_post_norm
    if norm is not None:  # drawn back through a norm whose divisor is held: gain and centring are their own transpose
        z = run[f"{layer}.attn.z"][0]
        raw = torch.einsum("phd,hdm->pm", at_least_float32(z), w)
        raw = raw if weights.b_O is None else raw + weights.b_O.detach()
        read = (norm.centre(read * norm.gain) / norm.scale(raw).double().unsqueeze(-1)).detach()
    pattern, v = run[f"{layer}.attn.pattern"][0].double(), run[f"{layer}.attn.v"][0].double()
    v = v.repeat_interleave(pattern.shape[0] // v.shape[1], dim=1)
    along = torch.einsum("pm,hdm->hpd", read, w.double())
    parts = torch.einsum("hps,shd,hpd->ps", pattern, v, along)
    return parts / out.pow(2).sum(-1, keepdim=True).clamp(min=1e-300)
