"""What attention moves: the vector that one head carries from one position to another, as it reaches the stream.

Formula:  m[h, q <- k] = pattern[h, q, k] v_k^h W_O^h, times the scale of the branch;
          where a norm follows the branch: gain * centre(m) / s_q, with its scale s_q held at that of this run.
          attn_out_q = sum_hk m[h, q <- k] + bias_q, the bias being what the biases of W_O and of that norm give.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.errors import SiteError, error
from microtome.model import Model
from microtome.run import Run

SEEN = ("*.attn.pattern", "*.attn.v")
"""What a run must capture for its messages."""


def refuse_gated_heads(model: Model, what: str) -> None:
    """Refuse a model whose heads are gated behind their mix of values, so that what they add is no sum over positions.

    Raises:
        SiteError: they are; `what` says what cannot be had.
    """
    why = next((why for name, why in model.anatomy.unproven.items() if name.endswith(".attn.mix")), None)
    if why is not None:
        do = "ask what does not split heads by position"
        raise error(SiteError, f"{what} of {model.anatomy.name} cannot be had by source position", got=why, do=do)


class Messages:
    """The messages of one prompt's run, layer by layer."""

    def __init__(self, model: Model, run: Run, row: int = 0) -> None:
        self.model, self.run, self.row = model, run, row

    def layer(self, i: int) -> Layer:
        """Those of one layer."""
        weights, v = self.model.layers[i], self.run[f"{i}.attn.v"][self.row]
        w = at_least_float32(weights.W_O)
        v = v.repeat_interleave(w.shape[0] // v.shape[1], dim=1).to(w.dtype)
        moved = torch.einsum("khd,hdm->khm", v, w)
        return Layer(self.model, i, moved, self.run[f"{i}.attn.pattern"][self.row].to(w.dtype))


class Layer:
    """The messages of one layer of one prompt.

    Attributes:
        moved: [k_pos, head, d_model] what each head would write if it read one position alone.
        pattern: [head, q_pos, k_pos].
    """

    def __init__(
        self,
        model: Model,
        index: int,
        moved: Float[Tensor, "k_pos head d_model"],
        pattern: Float[Tensor, "head q_pos k_pos"],
    ) -> None:
        weights = model.layers[index]
        self.moved, self.pattern, self.norm = moved, pattern, weights.attn_post_norm
        self.scale = model.anatomy.hook_points[Site("attn_out", index)].scale
        self.b = None if weights.b_O is None else weights.b_O.to(moved.dtype)

    def to(self, q: int) -> Float[Tensor, "k_pos head d_model"]:
        """What reaches the stream at one position, by the position and head it comes from."""
        found = self.pattern[:, q].T.unsqueeze(-1) * self.moved
        if self.norm is not None:
            raw = found.sum((0, 1)) if self.b is None else found.sum((0, 1)) + self.b
            found = self.norm.centre(found) * self.norm.gain / self.norm.scale(raw).to(found.dtype)
        return found if self.scale == 1.0 else found * self.scale
