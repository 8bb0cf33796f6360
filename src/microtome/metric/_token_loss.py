"""The loss of each token of a text, which means over tokens, rises and gradients are made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.axes import Tokens


def token_loss(logits: Float[Tensor, "batch pos vocab"], tokens: Tokens) -> Float[Tensor, "batch next"]:
    """Loss of each next token in nats [batch, pos - 1], from logits [batch, pos, vocab]; one row at a time."""
    rows = [
        torch.logsumexp(row[:-1].float(), -1) - row[:-1].gather(-1, target[1:, None]).squeeze(-1).float()
        for row, target in zip(logits, tokens, strict=True)
    ]
    return torch.stack(rows)
