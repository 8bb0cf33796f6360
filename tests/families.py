"""Tiny random models of every family the tests speak about.

Each entry of the table below is a name, ``family`` or ``family-variant``, and the configuration arguments
by which it differs from the family's defaults. ``build(name)`` makes the model: from its configuration alone
(no network), in eval mode and float32, always with the same weights.

Sizes are chosen so that a mistake shows. The width (40) equals no other size except all heads together, and not
even that in some families which let heads be wider than ``d_model / n_heads``. All parameters are random, *including*
the gains and biases of the norms, attention sinks and router biases, so that no identity holds merely because a
parameter was born 0 or 1. Sliding windows are 4 tokens: shorter than the 10-token probe.
"""

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

D_MODEL = 40
N_LAYERS = 3
N_HEADS = 4
D_MLP = 56
VOCAB = 101
POSITIONS = 64
WINDOW = 4
PAD, BOS, EOS = 0, 1, 2


def _rope(rotary: float | None = None, **more: Any) -> dict[str, Any]:
    """Rotary settings: the plain kind, on a fraction of each head if ``rotary`` is given."""
    settings = {"rope_type": "default", "rope_theta": 10000.0, **more}
    return settings if rotary is None else settings | {"partial_rotary_factor": rotary}


_IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
# The argument names most families share, and the older ones of the GPT-2 line.
_HF = _IDS | {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": POSITIONS,
}
_MHA = _HF | {"num_key_value_heads": 4}
_GQA = _HF | {"num_key_value_heads": 2}
_MQA = _HF | {"num_key_value_heads": 1}
_GPT = _IDS | {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_inner": D_MLP, "n_positions": POSITIONS}

_OPT = _IDS | {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "ffn_dim": D_MLP,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": D_MODEL,
}
_FALCON = _IDS | {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "ffn_hidden_size": D_MLP,
    "max_position_embeddings": POSITIONS,
}
_DEEPSEEK = _MHA | {
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "rope_parameters": _rope(),
}

# family -> (prefix of its configuration class, {variant: configuration}). The unnamed variant is the family itself.
_TABLE: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "gpt2": ("GPT2", {"": _GPT}),
    "gpt_bigcode": ("GPTBigCode", {"mqa": _GPT | {"multi_query": True}, "mha": _GPT | {"multi_query": False}}),
    "gpt_neo": (
        "GPTNeo",
        {
            "": _IDS
            | {
                "hidden_size": D_MODEL,
                "num_layers": N_LAYERS,
                "num_heads": N_HEADS,
                "intermediate_size": D_MLP,
                "max_position_embeddings": POSITIONS,
                "window_size": WINDOW,
                "attention_types": [[["global", "local"], 1], [["global"], 1]],
            }
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {
            "parallel": _HF | {"use_parallel_residual": True, "rope_parameters": _rope(0.4)},
            "sequential": _HF | {"use_parallel_residual": False, "rope_parameters": _rope(0.4)},
        },
    ),
    "gptj": ("GPTJ", {"": _GPT | {"rotary_dim": 4}}),
    "opt": (
        "OPT",
        {
            "prenorm": _OPT,
            "postnorm": _OPT | {"do_layer_norm_before": False},
            "proj": _OPT | {"word_embed_proj_dim": 24},
        },
    ),
    # BLOOM and MPT fix d_mlp at 4 * d_model.
    "bloom": ("Bloom", {"": _IDS | {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}}),
    "falcon": (
        "Falcon",
        {
            "mqa": _FALCON | {"multi_query": True, "parallel_attn": True},
            "gqa": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
            "onenorm": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            "alibi": _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        },
    ),
    "mpt": (
        "Mpt",
        {"": _IDS | {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS, "max_seq_len": POSITIONS}},
    ),
    "llama": (
        "Llama",
        {"mha": _MHA, "gqa": _GQA, "mqa": _MQA, "bias": _GQA | {"attention_bias": True, "mlp_bias": True}},
    ),
    "mistral": ("Mistral", {"": _GQA | {"sliding_window": WINDOW}}),
    "qwen2": ("Qwen2", {"": _GQA}),
    "qwen3": ("Qwen3", {"": _GQA | {"head_dim": 12}}),
    "gemma": ("Gemma", {"": _MQA | {"head_dim": 16}}),
    "gemma2": (
        "Gemma2",
        {
            "": _GQA
            | {
                "head_dim": 12,
                "query_pre_attn_scalar": 7,
                "sliding_window": WINDOW,
                "attn_logit_softcapping": 1.5,
                "final_logit_softcapping": 2.5,
            }
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "": _GQA
            | {
                "head_dim": 12,
                "query_pre_attn_scalar": 9,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            }
        },
    ),
    "phi": (
        "Phi",
        {
            "": _MHA | {"rope_parameters": _rope(0.4)},
            "qknorm": _MHA | {"rope_parameters": _rope(0.4), "qk_layernorm": True},
        },
    ),
    "phi3": ("Phi3", {"": _GQA}),
    "olmo": ("Olmo", {"": _MHA, "clip": _GQA | {"clip_qkv": 0.6}}),
    "olmo2": ("Olmo2", {"": _GQA}),
    "stablelm": (
        "StableLm",
        {
            "sequential": _GQA | {"use_qkv_bias": True, "rope_parameters": _rope(0.4)},
            "parallel": _MHA | {"use_parallel_residual": True, "rope_parameters": _rope(0.4)},
            "qknorm": _GQA | {"qk_layernorm": True, "rope_parameters": _rope(0.4)},
        },
    ),
    "starcoder2": ("Starcoder2", {"": _GQA | {"sliding_window": WINDOW}}),
    "cohere": (
        "Cohere",
        {"": _MHA | {"logit_scale": 0.25}, "qknorm": _GQA | {"logit_scale": 0.25, "use_qk_norm": True}},
    ),
    "granite": (
        "Granite",
        {
            "": _GQA
            | {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.4,
                "attention_multiplier": 0.2,
                "logits_scaling": 2.0,
            }
        },
    ),
    "smollm3": ("SmolLM3", {"": _GQA | {"no_rope_layers": [1, 1, 0]}}),
    "mixtral": ("Mixtral", {"": _GQA | {"num_local_experts": 6, "num_experts_per_tok": 2}}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "": _GQA
            | {
                "head_dim": 12,
                "num_experts": 6,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 24,
                "norm_topk_prob": True,
                "mlp_only_layers": [1],
            }
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "": _GQA
            | {
                "head_dim": 12,
                "sliding_window": WINDOW,
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "rope_parameters": _rope(
                    rope_type="yarn",
                    factor=2.0,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    truncate=False,
                    original_max_position_embeddings=POSITIONS // 2,
                ),
            }
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {"qlora": _DEEPSEEK | {"q_lora_rank": 18}, "noqlora": _DEEPSEEK | {"q_lora_rank": None}},
    ),
    "bert": ("Bert", {"": _HF}),
    "roberta": ("Roberta", {"": _HF}),
    # Not on the list: what is discovered about these must come from the module tree alone.
    "codegen": ("CodeGen", {"": _GPT | {"rotary_dim": 4}}),
    "glm4": ("Glm4", {"": _GQA | {"head_dim": 12, "rope_parameters": _rope(0.5)}}),
    "nemotron": ("Nemotron", {"": _GQA | {"rope_parameters": _rope(0.4)}}),
    "persimmon": ("Persimmon", {"": _HF | {"rope_parameters": _rope(0.4)}}),
    "ernie4_5": ("Ernie4_5", {"": _GQA | {"head_dim": 12, "use_bias": True}}),
}

UNLISTED: list[str] = ["codegen", "glm4", "nemotron", "persimmon", "ernie4_5"]
MASKED: list[str] = ["bert", "roberta"]

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{family}-{variant}" if variant else family: (prefix, settings)
    for family, (prefix, variants) in _TABLE.items()
    for variant, settings in variants.items()
}
NAMES: list[str] = list(_CONFIGS)
KIND: dict[str, str] = {n: "masked" if n.split("-")[0] in MASKED else "causal" for n in NAMES}


def build(name: str) -> PreTrainedModel:
    """The tiny model called ``name``: eval mode, float32, and the same weights at every call."""
    prefix, settings = _CONFIGS[name]
    config_class = getattr(transformers, f"{prefix}Config")
    # A copy, since configurations write into their nested settings.
    return made(config_class(**copy.deepcopy(settings)), name)


def made(config: Any, name: str = "") -> PreTrainedModel:
    """The model of a configuration, with the same random weights at every call of one name."""
    masked = KIND.get(name) == "masked"
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = auto.from_config(config).float().eval()
        _randomise(model)
    return model


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Make every parameter random, tied ones once. Gains of norms are about 1: norms move around the weight they
    are born with, which is 1 for those of gain ``w`` and 0 for Gemma's, of gain ``1 + w``. Nemotron's have gain
    ``1 + w`` but are born 1."""
    seen: set[int] = set()
    for module in model.modules():
        tensors = dict(module.named_parameters(recurse=False))
        # The router bias of DeepSeek-V3 is a buffer.
        tensors |= {k: b for k, b in module.named_buffers(recurse=False) if k.endswith("_bias")}
        for key, tensor in tensors.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            unit = 2 * torch.rand(tensor.shape) - 1
            if key.endswith("bias"):
                tensor.copy_(0.1 * unit)
            elif "Norm" in type(module).__name__:
                tensor.add_(0.2 * unit)
                if type(module).__name__ == "NemotronLayerNorm1P" and key == "weight":
                    tensor.sub_(1.0)
            elif isinstance(module, nn.Embedding):
                # Half of that for Gemma, which multiplies by sqrt(d_model), lest the output only repeat the input.
                scale = 0.25 if hasattr(module, "scalar_embed_scale") else 0.5
                tensor.copy_(scale * torch.randn(tensor.shape))
            elif tensor.ndim == 1:  # attention sinks
                tensor.copy_(torch.randn(tensor.shape))
            else:  # about 1 / sqrt(fan_in): branches as large as the stream, attention far from uniform
                tensor.copy_(0.16 * torch.randn(tensor.shape))


def some(every: int, names: Sequence[str] = ()) -> list[Any]:
    """All families, or those that are named, as parameters of a test, of which only each `every`-th is quick."""
    chosen = names or NAMES
    return [name if i % every == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(chosen)]
