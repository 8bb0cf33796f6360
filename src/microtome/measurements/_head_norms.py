"""How much each attention head adds to the residual stream.

Formula:  result_norm of a head = mean |scale * gain * centre(z W_O) / divisor|, over all tokens but each row's first:
          including the branch's scale and any norm that follows the branch, with its divisor held fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from microtome.anatomy import NormWeights, Site, at_least_float32
from microtome.method import Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import ExampleMeans, Moments


@measure(
    "head_norms",
    of="head",
    sites="attn.z",
    needs=("attn_out", "W_O"),
    title="what heads add",
    question="How much does each head add to the residual stream?",
    columns=(
        Column(
            "result_norm", "norm", "mean norm of what the head adds, each row's first token left out",
            "none: a size, to compare with other heads", (0, None),
        ),
        Column(
            "result_norm_std", "norm", "standard deviation of that norm over tokens",
            "none: a spread, to compare with the mean", (0, None), interval=False,
        ),
    ),
    source=Source("Elhage et al.", "A Mathematical Framework for Transformer Circuits", 2021, where="attention heads"),
    cost="one product [head, d_head, d_head] per token and layer",
    check="tests/laws/test_measures.py",
)  # fmt: skip
class HeadNorms(Statistic):
    """The mean norm of what each head adds to the stream: |scale * gain * centre(z W_O) / divisor|.

    The branch's scale is included, and so is any norm that follows the branch, with its divisor held fixed.
    """

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """[head, d_head, d_head] G of |what a head adds|^2 = z G z, without the divisor of a norm after it."""
        self._grams: dict[int, Tensor] = {}
        self._norms: dict[int, NormWeights | None] = {}
        for layer in (layer for layer in layers if layer is not None):
            weights, point = model.layers[layer], model.anatomy.hook_points[Site("attn_out", layer)]
            write, after = at_least_float32(weights.W_O) * point.scale, weights.attn_post_norm
            write = write if after is None else after.centre(write) * after.gain
            self._grams[layer], self._norms[layer] = write @ write.transpose(1, 2), after

    def start(self, model: Model, layer: int | None) -> Kept:
        """The mean of every head, and its moments over tokens."""
        heads = model.anatomy.n_heads
        return {"result_norm": ExampleMeans(heads), "tokens": Moments(heads)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch."""
        z, layer = at_least_float32(seen["attn.z"]), seen.layer or 0
        norm = torch.einsum("bphd,hde,bphe->bph", z, self._grams[layer], z).clamp(min=0).sqrt()
        after, weights = self._norms[layer], seen.model.layers[layer]
        if after is not None:
            raw = z.flatten(2) @ at_least_float32(weights.W_O).flatten(0, 1)
            norm = norm / after.scale(raw if weights.b_O is None else raw + weights.b_O).unsqueeze(-1)
        kept["result_norm"].update(norm, seen.examples, seen.later)
        kept["tokens"].update(norm, seen.later.to(norm.device))

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """Mean and spread."""
        mean, tokens = kept["result_norm"].mean, kept["tokens"]
        return {"result_norm": mean, "result_norm_std": tokens.result().std if tokens.count else mean * torch.nan}
