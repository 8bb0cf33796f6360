"""The tokens on which what is claimed of a model is tried."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor

from microtome.anatomy._hook_points import ROWS
from microtome.anatomy._stored import runs_on, sizes

SHORTEST = 8
"""The tokens of a row where no configuration names a short length beyond which rows are treated otherwise."""
LONG = 64
"""The longest window, or other length in a configuration, that the probe goes beyond."""
LENGTHS = re.compile("window|topk|top_k_|chunk_size|original_max_position|local_attention|block_size|num_random_blocks")


def probe(hf: Any) -> Tensor:
    """Two rows of tokens of a model's vocabulary: short, or far longer than what a longer row is treated otherwise by.

    A mask of the k best keys, for one, changes little in a row that is hardly longer than k.
    """
    d_vocab = sizes(hf.get_input_embeddings())[0]
    length = SHORTEST + 2 * max((n for n in thresholds(hf.config.get_text_config()).values() if n <= LONG), default=0)
    tokens = torch.arange(ROWS * length) * 7919 % (d_vocab - d_vocab // 4) + d_vocab // 4
    return tokens.reshape(ROWS, length).to(runs_on(hf))


def thresholds(config: Any) -> dict[str, int]:
    """Entries of a configuration that name a length beyond which rows are treated otherwise: windows, top-k, chunks."""
    entries: list[tuple[Any, Any]] = []
    for name, value in config.to_dict().items():
        entries += cast("dict[Any, Any]", value).items() if isinstance(value, dict) else [(name, value)]
    blocks, size = getattr(config, "num_random_blocks", None), getattr(config, "block_size", None)
    if isinstance(blocks, int) and isinstance(size, int):  # Zaheer et al. 2020, Big Bird: shorter rows are not sparse
        entries.append(("window of all blocks", (5 + 2 * blocks) * size))
    whole = [(str(name), n) for name, n in entries if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return {name: n for name, n in whole if LENGTHS.search(name)}
