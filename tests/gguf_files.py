"""GGUF files of tiny llamas, as the converter of llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: dimensions that are turned together are neighbours."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tensors(hf: Any) -> dict[str, Tensor]:
    """The weights of a llama by their names in GGUF."""
    config = hf.config
    made = {"token_embd.weight": hf.model.embed_tokens.weight, "output_norm.weight": hf.model.norm.weight}
    made["output.weight"] = hf.lm_head.weight
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for i, layer in enumerate(hf.model.layers):
        for own, name in NAMES.items():
            for part, weight in layer.get_submodule(own).named_parameters():
                held = interleaved(weight, heads[own]) if own in heads else weight
                made[f"blk.{i}.{name}.{part}"] = held
    return {name: x.detach() for name, x in made.items()}


def write(
    hf: Any,
    path: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    more: Mapping[str, Tensor] | None = None,
    arch: str = "llama",
) -> Path:
    """Write a llama with more keys and tensors than its own."""
    import gguf

    config = hf.config
    file = gguf.GGUFWriter(path, arch)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    for key, value in (keys or {}).items():
        add = {bool: file.add_bool, int: file.add_uint32, float: file.add_float32, str: file.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    for name, x in (tensors(hf) | dict(more or {})).items():
        file.add_tensor(name, np.ascontiguousarray(x.to(torch.float32).numpy()))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
