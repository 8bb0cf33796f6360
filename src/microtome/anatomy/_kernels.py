"""Attention kernels, and whether their masks can be read.

The eager and the scaled-dot-product kernels are given masks of the scores' own shape. Flash, flex and paged kernels
take other forms, or none, from which the forbidden scores cannot be read.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask


def hiding_kernel(config: Any) -> str | None:
    """The name of a configuration's attention kernel if its masks cannot be read, None if they can."""
    name = getattr(config, "_attn_implementation", None)
    if name is None:
        return None
    name = str(name)
    masks = AttentionMaskInterface._global_mapping  # pyright: ignore[reportPrivateUsage]
    return None if masks.get(name) in (eager_mask, sdpa_mask) else name
