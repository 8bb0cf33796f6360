"""Whether heads copy: the eigenvalues of what they do to the vocabulary, without the vocabulary's square.

Formula:  M = E W_V W_O U, [vocab, vocab], E what the head reads of each token alone and U the unembedding (see
          _head_vocabulary.py). The eigenvalues of M that are not zero are those of W_O (U E) W_V, [d_head, d_head]:
          U E is summed once over the vocabulary, block by block, and is [d_model, d_model].
          ov_copying = sum of |lambda| with a positive real part / sum of |lambda|;
          ov_trace = Re sum lambda / sum |lambda|.
          Controls: the same with U of another order of the tokens, drawn by the seed.
          A head that writes nothing that U reads has no such share: NaN.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.measurements._head_vocabulary import ROWS, above_shuffled, alone, gained, unembedding, writes
from microtome.method import Column, Seen, Source, Weights, measure
from microtome.model import Model

Sums = tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model d_model"]]
_HELD: WeakKeyDictionary[Model, dict[tuple[Any, bool, Any], Sums]] = WeakKeyDictionary()
"""U E by model: for one state of its weights and one seed, by whether it is of layer 0, and by the form of the norm."""
NOTHING = 1e-6
"""Sums of eigenvalues below this share of |W_O (U E) W_V| before rounding are nothing."""


@measure(
    "ov_copying",
    of="head",
    on=Weights(),
    sites="attn.z",
    needs=("attn_out", "W_V", "W_O"),
    title="heads that copy",
    question="Which heads raise the logits of the tokens that they attend to?",
    columns=(
        Column(
            "ov_copying", "share", "share of the eigenvalues' size in the vocabulary that has a positive real part",
            "ov_copying_shuffled", (0, 1), interval=False,
        ),
        Column(
            "ov_copying_shuffled", "share", "the same with the unembedding's tokens in another order", range=(0, 1),
            interval=False,
        ),
        Column(
            "ov_trace", "ratio", "sum of the eigenvalues over the sum of their sizes: 1 where all are positive",
            "ov_trace_shuffled", (-1, 1), interval=False,
        ),
        Column(
            "ov_trace_shuffled", "ratio", "the same with the unembedding's tokens in another order", range=(-1, 1),
            interval=False,
        ),
    ),
    source=Source(
        "Elhage et al.", "A Mathematical Framework for Transformer Circuits", 2021, where="eigenvalues of OV circuits",
        departs="tokens are read behind the MLP of layer 0, relative to the mean token; the order of the tokens is a"
        " control",
    ),
    cost="the first MLP over the whole vocabulary, 4 vocab d_model^2 operations, and the eigenvalues of"
    " [d_head, d_head] per head",
    check="tests/laws/test_head_functions.py",
    atlas="full",
)  # fmt: skip
def ov_copying(seen: Seen) -> dict[str, Float[Tensor, " head"]]:
    """The share of positive eigenvalues of every head's OV circuit, in the vocabulary, and for a shuffled vocabulary.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    model, layer = seen.model, seen.layer or 0
    found: dict[str, Tensor] = {}
    for ending, product in zip(("", "_shuffled"), _vocabulary_sums(model, layer), strict=True):
        share, trace = copying(gained(model, layer), writes(model, layer), product)
        found |= {f"ov_copying{ending}": share, f"ov_trace{ending}": trace}
    return above_shuffled(found)


def copying(
    value: Float[Tensor, "head d_model d_head"],
    write: Float[Tensor, "head d_head d_model"],
    product: Float[Tensor, "d_model d_model"],
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """The share of positive eigenvalues of E value write U and their trace over their size; `product` is U E."""
    inner = write.double() @ product.double() @ value.double()
    roots = torch.linalg.eigvals(inner)
    size = roots.abs().sum(-1)
    scale = write.double().flatten(1).norm(dim=1) * product.double().norm() * value.double().flatten(1).norm(dim=1)
    there = size > NOTHING * scale
    size = torch.where(there, size, torch.nan)
    return torch.where(roots.real > 0, roots.abs(), 0.0).sum(-1) / size, roots.real.sum(-1) / size


def _vocabulary_sums(model: Model, layer: int) -> Sums:
    """U E, and U E with the tokens of U in another order; E is divided by what the layer's norm divides by."""
    norm = model.layers[layer].attn_norm
    form = None if norm is None else (norm.norm.centred, norm.norm.identity, norm.norm.eps)
    state = model.provenance["fingerprint"], current().seed
    held = _HELD.setdefault(model, {})
    if any(key[0] != state for key in held):
        held.clear()
    if (state, layer == 0, form) not in held:
        unembed = unembedding(model)
        count = min(unembed.shape[1], model.W_E.shape[0])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(current().seed)).to(unembed.device)
        sums = unembed.new_zeros((2, len(unembed), len(unembed)), dtype=torch.float64)
        for tokens in torch.arange(count, device=unembed.device).split(ROWS):
            x = alone(model, tokens, layer)
            x = x if norm is None else norm.centre(x) / norm.scale(x).unsqueeze(-1)
            sums = sums + torch.stack([unembed[:, tokens] @ x, unembed[:, order[tokens]] @ x])
        held[state, layer == 0, form] = sums[0], sums[1]
    return held[state, layer == 0, form]
