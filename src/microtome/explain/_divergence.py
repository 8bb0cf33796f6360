"""The Jensen-Shannon divergence of two distributions.

Formula:  JSD(p, q) = KL(p | m) / 2 + KL(q | m) / 2, m = (p + q) / 2, KL(p | m) = sum p (log p - log m); 0 to log 2.
          Some public code sums KL(m | p) and KL(m | q) instead, which has no upper end and is another quantity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def jensen_shannon(a: Float[Tensor, "*of vocab"], b: Float[Tensor, "*of vocab"]) -> Float[Tensor, "*of"]:
    """The divergence in nats of two distributions, from their log-probabilities."""
    mean = torch.logaddexp(a, b) - math.log(2.0)
    parts = [torch.where(x > -torch.inf, x.exp() * (x - mean), 0.0).sum(-1) for x in (a, b)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0.0)
