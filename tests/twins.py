"""Tiny models whose weights say something: gains that matter, the same function without gains, a branch that is mute.

``build("llama-gqa/gains")`` is the family of `tests.families` with gains of norms far from 1;
``build("llama-gqa/folded")`` computes the same function with every gain 1, and the weights that read a norm multiplied
by it instead; ``build("llama-gqa/no mlp")`` and ``build("llama-gqa/no attn")`` have a branch that adds nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tests import families
from torch import nn
from transformers import PreTrainedModel

FOLDED = ("llama-gqa", "gpt2")
"""Families whose gains can be moved into the weights: every norm stands before what reads it."""
MUTE = ("llama-gqa",)

_READERS = {
    "llama": (("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
              ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))),
    "gpt2": (("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
}  # fmt: skip
_WRITERS = {
    "llama": {"mlp": "mlp.down_proj", "attn": "self_attn.o_proj"},
    "gpt2": {"mlp": "mlp.c_proj", "attn": "attn.c_proj"},
}


@torch.no_grad()
def build(name: str) -> PreTrainedModel:
    """The model of that name, with or without a variant behind a slash."""
    family, _, variant = name.partition("/")
    hf = families.build(family)
    if variant in ("gains", "folded"):
        _spread(hf)
    if variant == "folded":
        for norm, readers in _norms(hf):
            _fold(norm, readers)
    elif variant.startswith("no "):
        writers = _WRITERS[hf.config.model_type]
        for block in _blocks(hf):
            for parameter in block.get_submodule(writers[variant.removeprefix("no ")]).parameters():
                parameter.zero_()
    return hf


def _blocks(hf: Any) -> Sequence[nn.Module]:
    return hf.base_model.h if hf.config.model_type == "gpt2" else hf.base_model.layers


def _norms(hf: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every norm and what reads it."""
    for block in _blocks(hf):
        for norm, readers in _READERS[hf.config.model_type]:
            yield block.get_submodule(norm), [block.get_submodule(reader) for reader in readers]
    yield (hf.base_model.ln_f if hf.config.model_type == "gpt2" else hf.base_model.norm), [hf.lm_head]


def _spread(hf: Any) -> None:
    """Gains from 0.25 to 2.5, and an unembedding of its own, so that they can be folded into it."""
    hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.clone())
    hf.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(0)
    for norm, _ in _norms(hf):
        norm.weight.uniform_(0.25, 2.5, generator=generator)


def _fold(norm: Any, readers: list[Any]) -> None:
    """W (g x + b) = (W g)(x + b / g)."""
    for reader in readers:
        transposed = type(reader).__name__ == "Conv1D"  # [in, out]
        reader.weight.mul_(norm.weight.unsqueeze(1) if transposed else norm.weight)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(norm.weight)
    norm.weight.fill_(1)


@torch.no_grad()
def turned(hf: Any, seed: int = 0) -> Any:
    """A copy that computes the same in another orthonormal basis of the stream: of a Llama whose gains are 1."""
    hf, size = copy.deepcopy(hf), hf.config.hidden_size
    random = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(random)[0].to(hf.dtype)
    for name, weight in hf.named_parameters():
        assert weight.dim() > 1 or "bias" in name or torch.equal(weight, torch.ones_like(weight)), name
        if name.split(".")[-2] in ("o_proj", "down_proj"):
            weight.copy_(basis.T @ weight)
        elif weight.dim() > 1:
            weight.copy_(weight @ basis)
    return hf
