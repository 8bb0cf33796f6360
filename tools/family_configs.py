"""A tiny random model of every causal family of the installed transformers.

    python tools/family_configs.py [MODEL_TYPE ...]     build each, run it twice, and say what cannot be built

``recipe(model_type)`` is a configuration: the family's own defaults with every size made small (`_SMALL`), as many
layers as it takes until each kind of layer has occurred, and what `_MORE` says of that family alone. Windows, chunks,
top-k's and lengths of rotary scaling are 4 to 16 tokens, so that a prompt of 40 goes beyond each of them.

``build(model_type)`` is the model: in eval mode and float32, without a network, with the same weights at every call,
and with *all* parameters random, gains, biases, sinks and scalars that are born 0 or 1 included, so that no identity
holds merely because of how a parameter was born.
"""

import copy
import dataclasses
import sys
import zlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 101
POSITIONS = 96
LAYERS = 3
ROPE_LENGTH = 16  # beyond which rotary angles are scaled
PAD, BOS, EOS = 0, 1, 2

# The size of every setting of these names that is not None by default.
_SIZES: list[tuple[int, str]] = [
    (LAYERS, "num_layers n_layer n_layers decoder_layers num_decoder_layers encoder_layers num_encoder_layers"),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers first_k_dense_replace "
        "num_dense_layers type_vocab_size topk_group",
    ),
    (
        2,
        "num_key_value_heads kv_n_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
        "moe_top_k n_group num_expert_group mamba_n_groups n_groups mamba_ngroups linear_num_key_heads "
        "num_global_key_value_heads swa_num_key_value_heads",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads sliding_window sliding_window_size window_size "
        "attention_window_size local_attention linear_num_value_heads rotary_dim index_n_heads mamba_n_heads "
        "swa_num_attention_heads attention_chunk_size n_mamba_heads mamba_num_heads linear_num_heads",
    ),
    (6, "num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim v_head_dim"),
    (
        8,
        "qk_nope_head_dim mamba_d_state ssm_state_size state_size index_topk laurel_rank linear_key_head_dim "
        "hidden_size_per_layer_input mamba_chunk_size chunk_size",
    ),
    (12, "linear_value_head_dim linear_head_dim kv_lora_rank index_head_dim"),
    (14, "q_lora_rank o_lora_rank"),
    (
        16,
        "head_dim d_kv global_head_dim swa_head_dim original_max_position_embeddings mamba_d_head mamba_head_dim "
        "kv_channels",
    ),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size",
    ),
    (32, "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim"),
    (56, "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_ff d_inner dff dim_ff"),
    (
        POSITIONS,
        "max_position_embeddings n_positions max_seq_len n_ctx context_length max_target_positions model_max_length "
        "max_source_positions",
    ),
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (PAD, "pad_token_id"),
    (BOS, "bos_token_id"),
    (EOS, "eos_token_id decoder_start_token_id"),
]
_SMALL: dict[str, Any] = {name: size for size, names in _SIZES for name in names.split()}
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers")


def _two_ropes() -> dict[str, dict[str, Any]]:
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    }


def _two_lengths(length: int) -> dict[str, Any]:
    """Rotary angles that are others for every token of a prompt that is longer."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.5, 2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": length, **factors}
    return {"rope_parameters": rope, "original_max_position_embeddings": length}


_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_GEMMA_SHARED = {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
_SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
_LLAMA4 = {
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 56,
    "moe_layers": [1, 3],
    "interleave_moe_layer_step": 2,
    "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
    "no_rope_layers": [1, 1, 1, 0],
    "floor_scale": 8,
}
_DOTS3 = {
    "head_dim": 14,
    "shared_experts_intermediate_size": 24,
    "sliding_window": 4,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 14,
    "swa_kv_lora_rank": 12,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 12,
    "swa_v_head_dim": 10,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_layer_ids": [2],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "eos_token_id": EOS,
}

# What differs by family: the settings by which its recipe departs from the shrunk one. Nested: a dict.
_MORE: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "blt": {
        "num_hidden_layers": 3,  # its cache asks for it
        "encoder_hash_byte_group_vocab": 50,
        "local_attention_window_len": 8,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {"layer_types": _SLIDES, "rope_parameters": _two_ropes()},
    "cpmant": {
        "dim_head": 16,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 0.6}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "doge": {"keep_window_size": 8},
    "dots1": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "max_window_layers": 2,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "layer_types": None},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "emu3": {"vq_config": {"codebook_size": 50, "base_channels": 32}},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.7, 0.6],
        "key_multiplier": 0.8,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.7,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.6,
        "ssm_multipliers": [0.9, 0.8, 1.1, 0.7, 1.2],
    },
    "gemma2": {"query_pre_attn_scalar": 9},
    "gemma3": {"text_config": {"query_pre_attn_scalar": 9}},
    "gemma3_text": {"query_pre_attn_scalar": 9},
    "gemma3n_text": _GEMMA_SHARED | {"intermediate_size": 56, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0]},
    "gemma4": {
        "text_config": {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "global_head_dim": 24,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        }
    },
    "gemma4_text": _GEMMA_SHARED | {"global_head_dim": 24},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "helium": {"head_dim": 8},
    "hrm_text": {"num_hidden_layers": 2, "L_cycles": 1, "L_bp_cycles": [1]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_text": {"rel_extent": 8, "logits_mup_width_multiplier": 2.0},
    "inkling2_text": {
        "rel_extent": 8,
        "unpadded_vocab_size": VOCAB,
        "log_scaling_n_floor": 8,
        "n_layers_per_attn_res_block": 2,
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _SLIDES, "num_attention_heads_per_layer": [4, 8, 4]},
    "lfm2": {"num_hidden_layers": 3, "full_attn_idxs": [1], "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"head_dim": 6, "zero_expert_num": 2, "expert_ffn_hidden_size": 24},
    "mellum": {"layer_types": _SLIDES},
    "minicpm3": {"scale_emb": 3, "dim_model_base": 16},
    "minimax": {
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "full_attn_alpha_factor": 0.8,
        "full_attn_beta_factor": 1.1,
        "linear_attn_alpha_factor": 0.9,
        "linear_attn_beta_factor": 0.7,
        "mlp_alpha_factor": 1.2,
        "mlp_beta_factor": 0.6,
    },
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 56,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 16},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "moshi": {"audio_vocab_size": 50, "depth_decoder_config": {"audio_vocab_size": 50, "input_size": 32}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "attention_head_size": 8,
        "feed_forward_size": 56,
        "axial_pos_shape": (8, 12),
        "axial_pos_embds_dim": (8, 24),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 7,
    },
    "phi4_multimodal": _two_lengths(30),  # between those of the prompts of the checks
    "rembert": {"input_embedding_size": 24, "output_embedding_size": 48},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 24,
        "shape_vocab_size": VOCAB,
    },
    "smollm3": {"no_rope_layers": [1, 1, 0], "num_hidden_layers": 3},
    "vaultgemma": {"query_pre_attn_scalar": 9},
    "xlnet": {"mem_len": 16},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},  # widths are rounded to 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "router_hidden_size": 12,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "sliding_window": 4,
    },
}

# Families of which no tiny model can be made, and why.
_ASSISTANT = "it continues another model's states and takes no token ids"
_PART = "it is the decoder of a larger model, whose configuration it cannot be built from"
IMPOSSIBLE: dict[str, str] = {
    "gemma3n": "its image encoder is of the library timm (its text decoder is gemma3n_text)",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _PART,
    "musicgen_melody": _PART,
}


def recipe(model_type: str) -> PreTrainedConfig:
    """The configuration of a tiny model of that family."""
    return _small(CONFIG_MAPPING[model_type], _MORE.get(model_type, {}))


def build(model_type: str, attention: str | None = None) -> PreTrainedModel:
    """The tiny model of that family: eval mode, float32, and the same random weights at every call.

    `attention` is the kernel, such as "eager"; that of the family by default.
    """
    config = recipe(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(model_type.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
        randomise(model)
    return model


def prompt(rows: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens, ``[rows, length]``."""
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _small(config_class: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration of that class."""
    names = {field.name for field in dataclasses.fields(config_class)}
    born = config_class()
    settings: dict[str, Any] = {n: s for n, s in _SMALL.items() if n in names and vars(born).get(n) is not None}
    if {"kv_lora_rank", "num_key_value_heads"} <= names:  # latent attention has no groups of heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if "is_decoder" in names and not getattr(born, "is_encoder_decoder", False):
        settings["is_decoder"] = True
    for name in _DEPTHS:
        if name in names:
            settings |= _layers(born, name, more.get(name))
            break
    rope = vars(born).get("rope_parameters")
    if isinstance(rope, dict) and "original_max_position_embeddings" in rope and "rope_parameters" in names:
        settings["rope_parameters"] = rope | {"original_max_position_embeddings": ROPE_LENGTH}
    nested = _nested(born, more)
    settings |= nested | {k: v for k, v in more.items() if k not in nested}
    return config_class(**copy.deepcopy(settings))


def _nested(born: PreTrainedConfig, more: dict[str, Any]) -> dict[str, Any]:
    """The configurations inside one, small as well."""
    inside = {k: type(v) for k, v in vars(born).items() if isinstance(v, PreTrainedConfig)}
    return {name: _small(kind, more.get(name, {})) for name, kind in inside.items()}


def _layers(born: PreTrainedConfig, depth: str, wanted: int | None) -> dict[str, Any]:
    """As many layers as it takes until each kind has occurred, and the lists of settings by layer cut to that."""
    full = getattr(born, depth)
    # Lists of kinds: those that name each layer by its number have other values each.
    lists = {k: v for k, v in vars(born).items() if isinstance(v, list | tuple) and len(v) == full and full > 1}
    lists = {k: v for k, v in lists.items() if len(set(v)) < 4}
    need = [1 + max(v.index(kind) for kind in v) for v in lists.values()]
    count = wanted or max([LAYERS, *need])
    return {depth: count} | {k: list(v[:count]) for k, v in lists.items() if k in _fields(born)}


def _fields(config: PreTrainedConfig) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Make every parameter random, tied ones once, and so every buffer that is saved with the weights."""
    seen: set[int] = set()
    for module in model.modules():
        tensors = dict(module.named_parameters(recurse=False))
        kept = module._non_persistent_buffers_set
        tensors |= {k: b for k, b in module.named_buffers(recurse=False) if k not in kept and b.is_floating_point()}
        for key, tensor in tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                _randomise(module, key, tensor)


def _randomise(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    unit = 2 * torch.rand(tensor.shape) - 1
    if key.endswith("bias"):
        tensor.copy_(0.1 * unit)
    elif "Norm" in type(module).__name__:
        tensor.add_(0.2 * unit)
        if type(module).__name__ == "NemotronLayerNorm1P" and key == "weight":  # gain 1 + w, but born 1
            tensor.sub_(1.0)
    elif isinstance(module, nn.Embedding):
        # Half of that where it is multiplied by sqrt(d_model), lest the output only repeat the input.
        tensor.copy_((0.25 if hasattr(module, "scalar_embed_scale") else 0.5) * torch.randn(tensor.shape))
    elif tensor.ndim <= 1:  # sinks, scales of branches, decays: around what they are born with
        tensor.add_(0.3 * torch.randn(tensor.shape))
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        tensor.copy_(torch.randn(tensor.shape) / tensor[0].numel() ** 0.5)
    else:  # about 1 / sqrt(fan_in): branches as large as the stream, attention far from uniform
        tensor.copy_(0.17 * torch.randn(tensor.shape))


def limit_memory(gigabytes: int = 6) -> None:
    """Let this process fail, and not the machine, where a size was forgotten above."""
    import resource  # not on every system

    resource.setrlimit(resource.RLIMIT_DATA, (gigabytes << 30, gigabytes << 30))


def check(model_type: str) -> str:
    """One line on the tiny model of that family: that it runs and repeats itself, or what is wrong with it."""
    model = build(model_type)
    ids = prompt()
    with torch.inference_mode():
        first, again = (model(input_ids=ids).logits for _ in range(2))
    assert first.shape[:2] == ids.shape, f"logits of shape {tuple(first.shape)}"
    assert bool(first.isfinite().all()), "logits that are not finite"
    assert torch.equal(first, again), f"two equal runs differ by {float((first - again).abs().max()):.1e}"
    size = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {size / 1e6:.2f} M, logits {float(first.mean()):.2f} ± {float(first.std()):.2f}"


def main() -> None:
    limit_memory()
    for model_type in sys.argv[1:] or FAMILIES:
        try:
            line = check(model_type) if model_type not in IMPOSSIBLE else f"IMPOSSIBLE {IMPOSSIBLE[model_type]}"
        except Exception as problem:  # noqa: BLE001 - any failure is one line
            line = f"FAILS {type(problem).__name__}: {str(problem).strip().splitlines()[:3]}"
        print(f"{model_type:28} {line}", flush=True)


if __name__ == "__main__":
    main()
